"""The model card that is written with a trained model, and the results page of one that was only measured."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from direct_rlhf import __version__
from direct_rlhf.errors import ConfigError
from direct_rlhf.report.mixture import in_words
from direct_rlhf.report.read import RunData, TaskResult, mapping, read_run
from direct_rlhf.report.samples import visible
from direct_rlhf.report.words import (
    HEADLINES,
    arm_label,
    difference_of,
    is_miniature,
    reference_label,
    show_difference,
    show_estimate,
    show_number,
)

MADE = {
    "base": "The base model as it was loaded.",
    "sft": "Supervised fine-tuning of the base on the chosen answers.",
    "sft_ppo": "Supervised fine-tuning of the base on the chosen answers, then PPO against a reward model.",
    "dpo": "Direct preference optimisation of the base on the preference pairs.",
    "direct_ppo": "PPO against a reward model, directly on the base, with no supervised fine-tuning in between.",
}


def model_card(run: Path, arm: str) -> str:
    """The card of ``arm`` as Markdown with YAML front matter. ConfigError if the run holds nothing of that arm."""
    data = read_run(run)
    if data.arm(arm) is None and arm not in (data.recipe.get("arms") or []):
        have = ", ".join(one.name for one in data.arms) or "none"
        raise ConfigError(f"{run}: this run has no arm {arm!r}; it has {have}")
    sections = (_front(data), _intro(data, arm), _results(data, arm), _training(data, arm), _dialogue(data), _use(data))
    return "\n\n".join(sections) + "\n"


def results_page(run: Path, arm: str) -> str:
    """What was measured of a model that was not made here, as Markdown for its card. ConfigError as ``model_card``."""
    data = read_run(run)
    found = data.arm(arm)
    if found is None:
        raise ConfigError(f"{run}: nothing was measured of {arm!r} here")
    intro = (
        f"# {visible(arm)}: what was measured\n\n"
        f"Model `{visible(found.model or arm)}`, measured by direct-rlhf {__version__}; seed {data.seed}; "
        f"recipe SHA-256 `{visible(data.recipe_sha256 or 'not recorded')}`."
    )
    limits = (
        "## Limits\n\nThe numbers hold for the prompts that were measured, in the dialogue format above, and by the "
        "judge and the classifier\nthat the recipe names; no person judged an answer."
    )
    return "\n\n".join((intro, _results(data, arm), _dialogue(data), limits)) + "\n"


def _front(run: RunData) -> str:
    base = mapping(run.recipe.get("model")).get("base")
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "unknown",
        "tags": ["direct-rlhf", "rlhf"],
    }
    if base and not is_miniature(run):
        front["base_model"] = str(base)
    hub = [path.removeprefix("hf:").split(":")[0] for path in _source_paths(run) if path.startswith("hf:")]
    if hub:
        front["datasets"] = sorted(set(hub))
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---"


def _sources(run: RunData) -> list[tuple[str, Mapping[str, Any]]]:
    """(role, source) of every data source of the recipe."""
    data = mapping(run.recipe.get("data"))
    return [(role, mapping(one)) for role in ("preferences", "prompts", "text") for one in data.get(role) or []]


def _source_paths(run: RunData) -> list[str]:
    return [str(source.get("path")) for _, source in _sources(run)]


def _intro(run: RunData, arm: str) -> str:
    base = mapping(run.recipe.get("model")).get("base", "not recorded")
    lines = [
        f"# {visible(run.name)}: {visible(arm_label(arm))}",
        "",
        f"{MADE.get(arm, 'A model of this run.')} Made by direct-rlhf {__version__} from `{visible(base)}`.",
    ]
    if is_miniature(run):
        lines += ["", "**A miniature.** It lives in a small made-up world and is of no use outside of it."]
    return "\n".join(lines)


def _results(run: RunData, arm: str) -> str:
    found = run.arm(arm)
    rows = [
        "## Results",
        "",
        f"| metric | value [95 %] | against {visible(reference_label(run))}, paired [95 %] |",
        "|---|--:|--:|",
    ]
    for metric in HEADLINES:
        value = show_estimate(found.metric(metric.key) if found else None, metric.percent)
        difference = (
            "" if arm == run.reference else show_difference(difference_of(run, arm, metric.key), metric.percent)
        )
        rows.append(f"| {metric.label} | {value} | {difference} |")
    rows += _tasks(found.tasks) if found else []
    failed = {suite: n for suite, (_, n) in (found.counts if found else {}).items() if n}
    if failed:
        rows += ["", "Failed items, in no mean: " + ", ".join(f"{suite} {n}" for suite, n in failed.items()) + "."]
    return "\n".join(rows)


def _tasks(tasks: Sequence[TaskResult]) -> list[str]:
    """Every general task with what its number was made under."""
    if not tasks:
        return []
    rows = [
        "",
        "| general task | metric | worked examples | value ± standard error | documents |",
        "|---|---|---|--:|--:|",
    ]
    for task in tasks:
        percent = task.value is not None and 0 <= task.value <= 1
        error = "" if task.value is None or task.stderr is None else f" ± {show_number(task.stderr, percent)}"
        value = show_number(task.value, percent) + error
        documents = None if task.n_scored is None else task.n_scored + task.n_unparsed + (task.n_failed or 0)
        failed = f", {task.n_failed} failed" if task.n_failed else ""
        cells = (visible(task.name), visible(task.metric), task.shots or "none", value, f"{documents}{failed}")
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _training(run: RunData, arm: str) -> str:
    lines = ["## Training", ""]
    for role, source in _sources(run) if arm != "base" else []:
        weight = source.get("weight", 1)
        lines.append(
            f"- {role}: `{visible(source.get('path'))}` ({visible(source.get('kind', 'helpful'))}, weight {weight})"
        )
    if arm != "base" and (mixed := in_words(run)):
        lines.append(f"- mixture: {mixed}")
    seed = "not recorded" if run.seed is None else run.seed
    lines.append(f"- seed: {seed}; recipe SHA-256: `{visible(run.recipe_sha256 or 'not recorded')}`")
    name = "ppo" if arm.endswith("ppo") else arm
    if arm != "base" and run.recipe.get(name):
        section = _without_urls(run.recipe[name])
        lines += ["", "Recipe of this stage:", "", _fenced(yaml.safe_dump({name: section}, sort_keys=False), "yaml")]
    return "\n".join(lines)


def _without_urls(value: Any) -> Any:
    """A recipe section without the addresses of endpoints: those can hold keys, and a card is published."""
    if isinstance(value, Mapping):
        return {key: "(left out)" if key == "url" else _without_urls(inner) for key, inner in value.items()}
    return value


def _dialogue(run: RunData) -> str:
    dialogue = mapping(run.recipe.get("dialogue"))
    human = str(dialogue.get("human", "\n\nHuman:"))
    assistant = str(dialogue.get("assistant", "\n\nAssistant:"))
    stops = dialogue.get("stop_strings") or [human]
    if dialogue.get("format") == "chat_template":
        form = "The tokenizer's own chat template."
    else:
        form = "Plain text; the model continues after the last marker:\n\n" + _fenced(
            f"{human} Hello!{assistant}", "text"
        )
    shown = ", ".join(f"`{json.dumps(stop, ensure_ascii=False)}`" for stop in stops)
    return f"## Dialogue format\n\n{form}\n\nStop at the end-of-text token or at {shown}, whichever comes first."


def _use(run: RunData) -> str:
    dialogue = mapping(run.recipe.get("dialogue"))
    human = str(dialogue.get("human", "\n\nHuman:"))
    assistant = str(dialogue.get("assistant", "\n\nAssistant:"))
    stops = [str(stop) for stop in dialogue.get("stop_strings") or [human]]
    prompt = f"{human} What can you do?{assistant}"
    code = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this card lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer({_literal(prompt)}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128, stop_strings={_literal(stops)}, tokenizer=tokenizer)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
    if dialogue.get("format") == "chat_template":
        code = code.replace(
            f'tokenizer({_literal(prompt)}, return_tensors="pt")',
            (
                'tokenizer.apply_chat_template([{"role": "user", "content": "What can you do?"}], '
                'add_generation_prompt=True, return_dict=True, return_tensors="pt")'
            ),
        )
    return (
        f"## How to load it\n\n{_fenced(code, 'python')}\n\n"
        "## Intended use and limits\n\n"
        "For research on alignment. The numbers above hold for the prompts that were measured and by the judge and\n"
        "the classifier that the recipe names; no person judged an answer. The model can be wrong, rude or\n"
        "harmful, most of all on other prompts. Its licence follows from those of the base model and of the data,\n"
        "which direct-rlhf does not know: state it before you publish."
    )


def _literal(value: object) -> str:
    return json.dumps(value, ensure_ascii=True)


def _fenced(text: str, language: str) -> str:
    """A code block that the text cannot close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"
