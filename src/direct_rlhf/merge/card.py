"""README.md and merge.json of a merged model: what was merged, how, and with which normalisation, default or not."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from direct_rlhf import __version__
from direct_rlhf.merge.plan import MergePlan
from direct_rlhf.merge.types import Method
from direct_rlhf.recipe.merge_file import LoadedMerge
from direct_rlhf.recipe.merge_methods import MethodParameters
from direct_rlhf.run.atomic import write_json

Notes = Mapping[str, Mapping[str, float]]  # by tensor

NORMALISATION = {
    ("normalize", True): "each weight is divided by the sum of the weights",
    ("normalize", False): "weights are used as they are given, whatever their sum",
    ("merge", "mean"): "what is added up is divided by the sum of its weights",
    ("merge", "sum"): "what is added up is not divided by the sum of its weights",
}


def write_card(plan: MergePlan, method: Method, notes: Notes, folder: Path) -> None:
    """Both files. ``notes`` is what the method found, by tensor."""
    (folder / "README.md").write_text(card(plan, method, notes), encoding="utf-8")
    write_json(folder / "merge.json", record(plan, notes), null_nonfinite=True)


def record(plan: MergePlan, notes: Notes) -> dict[str, Any]:
    """merge.json: the same, for programs."""
    return {
        "version": __version__,
        "method": plan.merge.method,
        "base": plan.merge.base,
        "models": [{"ref": expert.ref, "key": expert.key} for expert in plan.merge.experts],
        "commits": {ref: source.hub.revision for ref, source in plan.sources.items() if source.hub},
        "parameters": {name: values for name, (values, _) in used(plan).items()},
        "yaml": plan.merge.yaml,
        "notes": list(plan.notes),
        "tensors": {name: dict(found) for name, found in notes.items()},
    }


def card(plan: MergePlan, method: Method, notes: Notes) -> str:
    """README.md."""
    merge = plan.merge
    lines = [
        "---",
        "library_name: transformers",
        "tags: [merge, direct-rlhf]",
        "---",
        f"# {plan.out.name}",
        "",
        f"Made by `direct-rlhf merge` {__version__} with {method.title} ({method.source}), computed in "
        f"{' and '.join(used(plan)['precision'][0])}.",
        "",
        "## Models",
        "",
        "| model | part | commit |",
        "|---|---|---|",
        *_models(plan),
        "",
        "## Parameters",
        "",
        f"**Normalisation: {normalisation(plan)}.**",
        "",
        "| parameter | value | set by |",
        "|---|---|---|",
        *(f"| {name} | {_shown(values)} | {origin} |" for name, (values, origin) in used(plan).items()),
        "",
        "The file, as it was given:",
        "",
        "```yaml",
        merge.yaml.rstrip().replace("```", "'''"),
        "```",
    ]
    if plan.notes:
        lines += ["", "## Notes", "", *(f"- {note}." for note in plan.notes)]
    if notes:
        lines += ["", "## What the method found", "", "| | mean over tensors | smallest | largest | tensors |"]
        lines += ["|---|---|---|---|---|", *_found(notes), "", "By tensor: merge.json."]
    return "\n".join(lines) + "\n"


def normalisation(plan: MergePlan) -> str:
    """What was done with the weights' sum, and whether the file says so."""
    for name in ("normalize", "merge"):
        if name in plan.merge.parameters_class.model_fields:
            values, origin = used(plan)[name]
            said = "; ".join(f"`{name}: {_plain(value)}`, {NORMALISATION[name, value]}" for value in values)
            return f"{said} ({origin})"
    return "none: this method does not divide by a sum of weights"


def used(plan: MergePlan) -> dict[str, tuple[list[Any], str]]:
    """Each parameter of the method: its values over the tensors, and what set it."""
    made: list[MethodParameters] = []
    for job in plan.jobs:
        if job.parameters is not None and not any(job.parameters is one for one in made):
            made.append(job.parameters)
    found: dict[str, tuple[list[Any], str]] = {}
    for name in plan.merge.parameters_class.model_fields:
        values: list[Any] = []
        for parameters in made:
            if (value := getattr(parameters, name)) not in values:
                values.append(value)
        found[name] = (values, _origin(plan.merge, name))
    return found


def _origin(merge: LoadedMerge, name: str) -> str:
    written = name in merge.settings or any(name in expert.settings for expert in merge.experts)
    if written or (name in ("seed", "reference") and name in merge.file.model_fields_set):
        return "file"
    if name in merge.preset and name not in ("seed", "reference"):
        return f"merge_method: {merge.file.merge_method}"
    reference = merge.preset.get("reference")
    if name in merge.parameters_class.references.get(str(reference), {}):
        return f"reference: {reference}"
    return "default"


def _models(plan: MergePlan) -> Iterator[str]:
    merge = plan.merge
    commits = {ref: source.hub.revision if source.hub else "" for ref, source in plan.sources.items()}
    if merge.base is not None:
        yield f"| {_cell(merge.base)} | base | {commits[merge.base]} |"
    for expert in merge.experts:
        yield f"| {_cell(expert.ref)} | merged | {commits[expert.ref]} |"


def _found(notes: Notes) -> Iterator[str]:
    by_name: dict[str, list[float]] = {}
    for found in notes.values():
        for name, value in found.items():
            by_name.setdefault(name, []).append(float(value))
    for name, values in by_name.items():
        mean = sum(values) / len(values)
        yield f"| {_cell(name)} | {mean:.4g} | {min(values):.4g} | {max(values):.4g} | {len(values)} |"


def _shown(values: list[Any]) -> str:
    if len(values) > 3:
        return f"{_plain(values[0])} ... {_plain(values[-1])} ({len(values)} values over the tensors)"
    return " or ".join(map(_plain, values))


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_plain, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else _cell(str(value))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
