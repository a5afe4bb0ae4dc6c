"""What a study of the three H's found, as `three_h.json`: the balance of every model, and what is compared with what.

models        by name: each H, their mean, the worst of them, the general mean, with intervals and settings
differences   paired, on the same questions: every route against the base, the chosen merge against the mixtures,
              R-TSVM against every other merge
conflicts     what training for one H does to the others, and how alike the experts' task vectors are
costs         seconds of training, merging and searching, by paradigm and route
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from direct_rlhf.evaluate.balance import MEAN, WORST, balance, balance_difference, of_kinds
from direct_rlhf.evaluate.records import Item, Summary, read_items
from direct_rlhf.evaluate.statistics import holm, paired_difference
from direct_rlhf.evaluate.suite import by_metric, difference_record
from direct_rlhf.recipe.schema import Recipe
from direct_rlhf.run.atomic import read_json, read_jsonl
from direct_rlhf.study.entries import Entry
from direct_rlhf.study.search import TRIES

GENERAL = "general"
R_TSVM = "r_tsvm"


def study_table(run: Path, recipe: Recipe, entries: Sequence[Entry]) -> dict[str, Any]:
    """Everything that the report shows, from the run directory's files."""
    section = recipe.three_h
    assert section is not None
    kinds = section.kinds
    draws = {"draws": recipe.evaluation.bootstrap_draws, "seed": recipe.seed}
    items = {one.name: of_kinds(read_items(_file(run, one, "conversation")), kinds) for one in entries}
    general = {one.name: _general(run, one) for one in entries}
    models = [_model(run, one, items[one.name], kinds, draws) for one in entries]
    differences = [
        row for ours, theirs in _compared(entries) for row in _differences(ours, theirs, items, general, kinds, draws)
    ]
    _adjust(differences, {one.name: one.route for one in entries})
    return {
        "kinds": kinds,
        "paradigms": section.paradigms,
        "models": models,
        "differences": differences,
        "conflicts": {paradigm: _conflicts(paradigm, entries) for paradigm in section.paradigms},
        "costs": {paradigm: _costs(run, paradigm, entries) for paradigm in section.paradigms},
    }


def chosen(entries: Sequence[Entry], paradigm: str, route: str) -> Entry | None:
    """The entry of a route that did best on the validation questions (the first of equals)."""
    found = [one for one in entries if (one.paradigm, one.route, one.of) == (paradigm, route, "")]
    scored = [one for one in found if one.validation is not None]
    return max(scored, key=lambda one: one.validation or 0.0) if scored else None


def _file(run: Path, one: Entry, suite: str) -> Path:
    return run / "evaluation" / one.name / f"{suite}.jsonl"


def _general(run: Path, one: Entry) -> list[Item] | None:
    file = _file(run, one, GENERAL)
    return by_metric(GENERAL, read_items(file))["general.mean"] if file.exists() else None


def _model(
    run: Path, one: Entry, items: Sequence[Item], kinds: Sequence[str], draws: Mapping[str, int]
) -> dict[str, Any]:
    found = balance(items, kinds, **draws)
    general: dict[str, Any] = {}
    if (file := _file(run, one, GENERAL).with_suffix(".json")).exists():
        result = read_json(file)
        general = {"value": result["mean"], "ci": result["ci"], "n_scored": result["n_scored"]}
    return {
        "name": one.name,
        "route": one.route,
        "paradigm": one.paradigm,
        "title": one.title,
        "settings": dict(one.settings),
        "validation": one.validation,
        "masks_of": one.of or None,
        "by_kind": {kind: _shown(summary) for kind, summary in found.by_kind.items()},
        MEAN: _shown(found.mean),
        WORST: found.worst,
        GENERAL: general or None,
    }


def _shown(summary: Summary) -> dict[str, Any]:
    counts = summary.counts
    ci = None if summary.low is None else [summary.low, summary.high]
    return {
        "value": summary.mean,
        "ci": ci,
        "n_scored": counts.n_scored,
        "n_failed": counts.n_failed,
        "n_unparsed": counts.n_unparsed,
    }


def _compared(entries: Sequence[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """(ours, theirs), each pair once."""
    by_name = {one.name: one for one in entries}
    pairs: dict[tuple[str, str], None] = {}
    base = entries[0]
    for one in entries[1:]:
        if one.route != "ablation":
            pairs[one.name, base.name] = None
    for paradigm in dict.fromkeys(one.paradigm for one in entries if one.paradigm):
        own = [one for one in entries if one.paradigm == paradigm and not one.of]
        merge, mixture = (chosen(entries, paradigm, route) for route in ("merge", "mixture"))
        tsvm = next((one for one in own if one.route == "merge" and one.settings.get("method") == R_TSVM), None)
        for ours in [one for one in (merge, tsvm) if one]:
            for theirs in own:
                if theirs.route == "mixture":
                    pairs[ours.name, theirs.name] = None
        for theirs in own:
            if tsvm and theirs.route == "merge" and theirs is not tsvm:
                pairs[tsvm.name, theirs.name] = None
            if theirs.route == "ablation" and theirs is not (first := _first(own, "ablation")):
                pairs[theirs.name, first.name] = None
        if merge and mixture:
            pairs[merge.name, mixture.name] = None
    for arm, against in pairs:
        yield by_name[arm], by_name[against]


def _first(entries: Sequence[Entry], route: str) -> Entry:
    return next(one for one in entries if one.route == route)


def _differences(
    ours: Entry,
    theirs: Entry,
    items: Mapping[str, Sequence[Item]],
    general: Mapping[str, Sequence[Item] | None],
    kinds: Sequence[str],
    draws: Mapping[str, int],
) -> Iterator[dict[str, Any]]:
    found = balance_difference(items[ours.name], items[theirs.name], kinds, **draws)
    own, other = general[ours.name], general[theirs.name]
    if own is not None and other is not None:
        found[GENERAL] = paired_difference(own, other, draws=draws["draws"], seed=draws["seed"])
    for metric, difference in found.items():
        yield {"arm": ours.name, "against": theirs.name, "metric": metric, **difference_record(difference)}


def _adjust(differences: Sequence[dict[str, Any]], routes: Mapping[str, str]) -> None:
    """``p_holm`` of one model's means against several others of its paradigm, which are tested together."""
    families: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in differences:
        if row["against"] != "base" and row["metric"] == MEAN and row["p"] is not None:
            families[row["arm"], routes[row["against"]]].append(row)
    for rows in families.values():
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_holm"] = p


def _conflicts(paradigm: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """How alike the experts' task vectors are; what each expert does to every H stands among the differences."""
    from direct_rlhf.merge.likeness import likeness

    experts = [one for one in entries if (one.paradigm, one.route) == (paradigm, "expert")]
    found = likeness(entries[0].path, {one.title: one.path for one in experts})
    return {
        "experts": {one.title: one.name for one in experts},
        "pairs": [{"kinds": [a.title, b.title], **found[a.title, b.title]} for a, b in combinations(experts, 2)],
    }


def _costs(run: Path, paradigm: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """Seconds by route; a route has those of the models that it starts from."""
    own = [one for one in entries if one.paradigm == paradigm and not one.of]
    objectives = _seconds(run / "parts" / "objectives")
    experts = sum(_seconds(run / "parts" / one.name) for one in own if one.route == "expert")
    uses_objectives = paradigm == "direct_ppo"
    rows: dict[str, Any] = {
        "experts": {"train": experts + objectives * uses_objectives},
        "mixtures": {
            one.title: {
                "train": _seconds(run / "parts" / one.name),
                "objectives": objectives if _scored(run / "parts" / one.name) else 0.0,
            }
            for one in own
            if one.route == "mixture"
        },
        "merges": {},
    }
    for one in own:
        if one.route in ("merge", "ablation"):
            tries = read_jsonl(run / "search" / one.name / TRIES)
            rows["merges"][one.name] = {
                "tries": len(tries),
                "merge": sum(line["merge_seconds"] for line in tries),
                "measure": sum(line["measure_seconds"] for line in tries),
            }
    return rows


def _seconds(part: Path) -> float:
    return sum(float(read_json(file)["seconds"]) for file in sorted((part / "stages").glob("*.json")))


def _scored(part: Path) -> bool:
    """Whether a mixture was chosen by the kinds' reward models."""
    file = part / "stages" / "mixture.json"
    return file.exists() and bool(read_json(file)["facts"].get("conflicts"))
