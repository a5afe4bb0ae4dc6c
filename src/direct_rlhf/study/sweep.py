"""`direct-rlhf merge --sweep`: a merge file's parameters searched against an evaluation, and the best merged.

A sweep is a run: its directory keeps every try, so that it goes on where it was stopped.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from direct_rlhf.attempt import attempt
from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.load import LoadedRecipe
from direct_rlhf.recipe.merge import load_merge, merge_of
from direct_rlhf.recipe.schema import EvaluationSection
from direct_rlhf.recipe.source import parse_yaml, read_yaml
from direct_rlhf.run.context import NoBars
from direct_rlhf.run.directory import RunDirectory
from direct_rlhf.run.signals import StopFlag
from direct_rlhf.stages import Study
from direct_rlhf.study.search import Measured, Tried, best, combinations, merger, search, shown, with_settings

METRICS = "general.mean, conversation.score, conversation.CATEGORY, toxicity.RATE; with - before it, lower is better"


def read_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`scale=0.3,0.5` and so on. Errors: ConfigError for a text that is none, and for a parameter named twice."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--sweep {text}: write KEY=VALUE,VALUE, such as scale=0.3,0.5,1.0")
        if name in grid:
            raise ConfigError(f"--sweep {text}: {name} is named twice. Give all its values at once.")
        document = parse_yaml(f"values: [{values}]", "--sweep")
        if document.problems:
            raise ConfigError(f"--sweep {text}: the values cannot be read. Write KEY=VALUE,VALUE.")
        grid[name] = document.data["values"]
    combinations(grid)
    return grid


def sweep(
    file: Path,
    out: Path,
    grid: Mapping[str, Sequence[Any]],
    loaded: LoadedRecipe,
    *,
    metric: str,
    root: Path,
    resume: bool,
    overwrite: bool,
    device: str = "auto",
    threads: int | None = None,
    say: Callable[[str], None],
) -> list[Tried]:
    """Tries every combination, merges the best into ``out`` and returns all, in order.

    ``loaded`` is the recipe whose evaluation measures; only the suite of ``metric`` runs. ``overwrite`` is for
    ``out``, ``device`` and ``threads`` for the merges.
    Errors: ConfigError for what is wrong with file, grid or metric, before the first merge; Interrupted (resumable).
    """
    lower, metric = metric.startswith("-"), metric.removeprefix("-")
    suite, _, name = metric.partition(".")
    if suite not in ("general", "conversation", "toxicity") or not name:
        raise ConfigError(f"--metric {metric}: no such metric. There are: {METRICS}.")
    load_merge(file)
    content = read_yaml(file, str(file), "merge file").data
    settings = combinations(grid)
    for one in settings:
        merge_of(with_settings(content, one), file.parent)
    if out.exists() and not overwrite:
        raise ConfigError(f"{out}: exists. Choose another folder, or replace it with --overwrite.")
    evaluation = EvaluationSection.model_validate(loaded.recipe.evaluation.model_dump() | {"suites": [suite]})
    recipe = loaded.recipe.model_copy(update={"evaluation": evaluation, "name": f"sweep-{out.name}", "three_h": None})
    loaded = loaded.with_recipe(recipe)
    with StopFlag() as stop:
        directory = RunDirectory.open(root, loaded, resume=resume, overwrite=False)
        with attempt(directory, stop):
            study = Study(loaded, directory, stop)
            study.check_judge()
            make = merger(file.parent, stop, device=device, threads=threads)

            def measure(model: Path) -> Measured:
                from direct_rlhf.evaluate.suite import evaluate_arm

                context = replace(study.context, progress=NoBars())
                value = _number(evaluate_arm(context, "candidate", str(model), folder=loaded.folder), suite, name)
                return Measured(None if value is None else -value if lower else value, {metric: value})

            tried = search(
                content,
                settings,
                folder=file.parent,
                place=directory.path / "search",
                make=make,
                measure=measure,
                key=f"{metric} {hashlib.sha256(loaded.yaml.encode()).hexdigest()}",
                say=say,
            )
            chosen = best(tried)
            say(f"Best: {shown(chosen.settings)}")
            make(with_settings(content, chosen.settings), out)
    return tried


def _number(entry: Mapping[str, Any], suite: str, name: str) -> float | None:
    """The metric in an entry of `evaluate_arm`. Errors: ConfigError, with what there is, for one that is not there."""
    found: Mapping[str, Any] = entry[suite]
    names = {"general": {"mean": found.get("mean")}, "conversation": {"score": found.get("score")}, "toxicity": found}
    known = dict(names[suite])
    if suite == "conversation":
        known |= found["by_category"]
    if suite == "general":
        known |= {task: one["value"] for task, one in found["tasks"].items()}
    numbers = {key: value for key, value in known.items() if value is None or isinstance(value, int | float)}
    if name not in numbers:
        raise ConfigError(f"--metric {suite}.{name}: was not measured. There are: {', '.join(sorted(numbers))}.")
    return numbers[name]
