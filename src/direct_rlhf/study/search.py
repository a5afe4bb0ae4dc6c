"""Which settings of a merge do best in an evaluation: a few combinations, each merged, measured and written down.

    PLACE/tries.jsonl    one line a combination, written when it is measured: a search goes on after them
    PLACE/candidate/     the merged model that is being measured

Merging is repeatable, so no candidate is kept: the best is merged again.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from direct_rlhf.errors import ConfigError
from direct_rlhf.evaluate.chats import digest
from direct_rlhf.recipe.merge import merge_of
from direct_rlhf.run.atomic import append_jsonl, read_jsonl
from direct_rlhf.run.context import NoBars

TRIES = "tries.jsonl"
WEIGHTS = "weights"  # a setting that gives every model its own weight


@dataclass(frozen=True)
class Measured:
    """What the evaluation says of one candidate; more is better. None: it has no score that counts."""

    score: float | None
    shown: Mapping[str, Any]


@dataclass(frozen=True)
class Tried:
    """One combination and what it came to."""

    settings: Mapping[str, Any]
    score: float | None
    shown: Mapping[str, Any]
    merge_seconds: float
    measure_seconds: float


Maker = Callable[[Mapping[str, Any], Path], None]  # from the content of a merge file, a model in a folder


def merger(folder: Path, should_stop: Callable[[], bool], *, device: str = "auto", threads: int | None = None) -> Maker:
    """Merges what stands in a merge file of ``folder``, without a bar; a model that is there is replaced."""

    def make(content: Mapping[str, Any], out: Path) -> None:
        from direct_rlhf.merge.executor import Execution, merge_models

        how = Execution(device=device, threads=threads, should_stop=should_stop, progress=NoBars())
        merge_models(merge_of(content, folder), out, overwrite=True, how=how)

    return make


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, the last key fastest; one without settings for an empty grid."""
    empty = [key for key, values in grid.items() if not values]
    if empty:
        raise ConfigError(f"{', '.join(empty)}: no value to try. Give at least one.")
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def with_settings(merge: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a merge file with these parameters; `weights` gives each model its own."""
    parameters = {**(merge.get("parameters") or {}), **{k: v for k, v in settings.items() if k != WEIGHTS}}
    found = {**merge, "parameters": parameters}
    if WEIGHTS not in settings:
        return found
    weights, models = settings[WEIGHTS], merge.get("models", [])
    if not isinstance(weights, list) or len(weights) != len(models):
        raise ConfigError(f"{WEIGHTS} = {weights}: give a list with one number for each of the {len(models)} models")
    weighted = [
        {**model, "parameters": {**(model.get("parameters") or {}), "weight": weight}}
        for model, weight in zip(models, weights, strict=True)
    ]
    return found | {"models": weighted}


def search(
    merge: Mapping[str, Any],
    settings: Sequence[Mapping[str, Any]],
    *,
    folder: Path,
    place: Path,
    make: Maker,
    measure: Callable[[Path], Measured],
    key: str,
    say: Callable[[str], None],
) -> list[Tried]:
    """Merges and measures each combination that is not in PLACE/tries.jsonl yet, in order.

    ``make(merge, out)`` merges the content of a merge file; ``key`` stands for all that a measurement depends on beside
    the merge. Errors: ConfigError for a combination that cannot be, before the first is merged.
    """
    wanted = [with_settings(merge, one) for one in settings]
    for one in wanted:
        merge_of(one, folder)
    place.mkdir(parents=True, exist_ok=True)
    known = {line["key"]: line for line in read_jsonl(place / TRIES)} if (place / TRIES).exists() else {}
    found = []
    for content, chosen in zip(wanted, settings, strict=True):
        identity = digest([content, key])
        if identity not in known:
            known[identity] = {"key": identity, **_try(content, chosen, place / "candidate", make, measure)}
            append_jsonl(place / TRIES, known[identity])
            say(f"{place.name}: {shown(chosen)}: {_number(known[identity]['score'])}")
        line = known[identity]
        found.append(Tried(chosen, line["score"], line["shown"], line["merge_seconds"], line["measure_seconds"]))
    return found


def best(tried: Sequence[Tried]) -> Tried:
    """The highest score, the first of equals. Errors: ConfigError if no combination has one."""
    scored = [one for one in tried if one.score is not None]
    if not scored:
        raise ConfigError("none of the combinations has a score: the evaluation failed for each of them")
    return max(scored, key=lambda one: one.score or 0.0)


def shown(settings: Mapping[str, Any]) -> str:
    """`lambda 0.3, density 0.2`; `defaults` for none."""
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "defaults"


def _try(
    content: Mapping[str, Any],
    chosen: Mapping[str, Any],
    candidate: Path,
    make: Maker,
    measure: Callable[[Path], Measured],
) -> dict[str, Any]:
    shutil.rmtree(candidate, ignore_errors=True)
    start = time.monotonic()
    make(content, candidate)
    merged = time.monotonic()
    measured = measure(candidate)
    shutil.rmtree(candidate)
    return {
        "settings": dict(chosen),
        "score": measured.score,
        "shown": dict(measured.shown),
        "merge_seconds": merged - start,
        "measure_seconds": time.monotonic() - merged,
    }


def _number(score: float | None) -> str:
    return "no score" if score is None else f"{score:.4g}"
