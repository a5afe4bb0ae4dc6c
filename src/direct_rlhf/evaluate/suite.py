"""Everything measured of one model, and the comparison of several, as files of a run directory.

evaluation/ARM/{general,conversation,toxicity}.jsonl   one record per item
evaluation/ARM/{general,conversation,toxicity}.json    the numbers, written last: a suite whose JSON carries the
                                                       fingerprint of what it depends on is not run again
evaluation/ARM/general/TEST.json                       tests that are done, while the suite is not
evaluation/comparisons.json                            paired differences
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.evaluate.chats import digest
from direct_rlhf.evaluate.records import Item, read_items, write_items
from direct_rlhf.evaluate.statistics import Difference, holm, paired_difference
from direct_rlhf.evaluate.suites import SUITES, Subject, inputs
from direct_rlhf.run.atomic import read_json, write_json
from direct_rlhf.run.context import StageContext

RELEASE = 1  # raise it when a suite's numbers change meaning: old results are then measured again
SCORES = (1.0, 10.0)  # range of a conversation score


def evaluate_arm(ctx: StageContext, arm: str, model_path: str, *, folder: Path | None = None) -> dict[str, Any]:
    """Run the recipe's suites on the model and return the arm's entry of results.json.

    ``folder`` is where relative paths of the recipe start from (default: the working folder).
    Errors: ConfigError and DataError for faulty inputs; Interrupted when asked to stop; suites that are done stay done.
    """
    from direct_rlhf.models.loading import load_causal_lm, parameters_sha256

    recipe = ctx.recipe
    options: dict[str, Any] = {"trust_remote_code": recipe.model.trust_remote_code}
    # a revision names a state of the base's repository; the other arms were made here
    revision = recipe.model.revision if arm == "base" else None
    tokens = load_tokens(model_path, revision=revision, folder=folder, **options)
    model = load_causal_lm(model_path, dtype=recipe.model.dtype, device=ctx.device, revision=revision, **options)
    subject = Subject(ctx, arm, model, tokens, DialogueFormat(recipe.dialogue, tokens), folder)
    identity = {"model": parameters_sha256(model), "tokenizer": tokens.sha256, "release": RELEASE}
    entry: dict[str, Any] = {"model": model_path}
    for name in recipe.evaluation.suites:
        ctx.check_stop()
        path = ctx.run.path / "evaluation" / arm / f"{name}.json"
        fingerprint = digest(identity | {"suite": name} | inputs(subject, name))
        result = _finished(path, fingerprint)
        if result is None:
            path.unlink(missing_ok=True)  # the items are about to change under it
            result, items = SUITES[name](replace(subject, fingerprint=fingerprint))
            write_items(path.with_suffix(".jsonl"), items)
            result = {"fingerprint": fingerprint, **result}
            write_json(path, result)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)  # what a stopped suite would have gone on from
        entry[name] = {key: value for key, value in result.items() if key != "fingerprint"}
    return entry


def compare(
    ctx: StageContext, arms: Sequence[str], against: str = "base", *, folder: Path | None = None
) -> list[dict[str, Any]]:
    """Paired differences of any two arms, those against ``against`` first, written to evaluation/comparisons.json.

    With `evaluation.conversation.pairwise` their answers are judged side by side too (evaluation/pairwise.json).
    ``folder`` is where relative paths of the recipe start from.

    Metrics: general.mean, general.TASK, conversation.score and toxicity.RATE, as far as both were measured. ``p_holm``
    of a task is adjusted for all tasks of the pair. A verdict of `higher` or `lower` needs an interval without 0.
    """
    evaluation = ctx.recipe.evaluation
    settings: dict[str, int] = {"draws": evaluation.bootstrap_draws, "seed": ctx.recipe.seed}
    place = ctx.run.path / "evaluation"
    rows: list[dict[str, Any]] = []
    others = [arm for arm in arms if arm != against]
    pairs = [(arm, against) for arm in others] + [(later, arm) for arm, later in combinations(others, 2)]
    for arm, other in pairs:
        for suite in evaluation.suites:
            paths = [place / name / f"{suite}.jsonl" for name in (arm, other)]
            if not all(path.exists() for path in paths):
                continue
            ours, theirs = (by_metric(suite, read_items(path)) for path in paths)
            value_range = SCORES if suite == "conversation" else (0.0, 1.0)
            found = {
                metric: paired_difference(ours[metric], theirs[metric], **settings, value_range=value_range)
                for metric in ours
                if metric in theirs
            }
            tested = {metric: x.p for metric, x in found.items() if x.p is not None and suite == "general"}
            tested.pop("general.mean", None)
            adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
            for metric, difference in found.items():
                row = {"arm": arm, "against": other, "metric": metric, **difference_record(difference)}
                rows.append(row | ({"p_holm": adjusted[metric]} if metric in adjusted else {}))
    write_json(place / "comparisons.json", rows)
    if "conversation" in evaluation.suites and evaluation.conversation.pairwise:
        from direct_rlhf.evaluate.judging import Judging

        Judging(ctx, folder).compare(arms, against)
    return rows


def by_metric(suite: str, items: Sequence[Item]) -> dict[str, list[Item]]:
    """Metric -> its items. Items of a task's further answer filters (`task/filter`) and of the lens belong to none."""
    if suite == "conversation":
        return {"conversation.score": list(items)}
    found: dict[str, list[Item]] = {"general.mean": []} if suite == "general" else {}
    for item in items:
        if "/" not in item.task:
            found.setdefault(f"{suite}.{item.task}", []).append(item)
            if suite == "general":
                found["general.mean"].append(item)
    return found


def difference_record(found: Difference) -> dict[str, Any]:
    return {
        "difference": found.difference,
        "ci": None if found.low is None else [found.low, found.high],
        "p": found.p,
        "n": found.n_pairs,
        "n_dropped": found.n_dropped,
        "extremes": None if found.worst is None else [found.worst, found.best],
        "verdict": found.verdict,
    }


def _finished(path: Path, fingerprint: str) -> dict[str, Any] | None:
    if not path.exists() or not path.with_suffix(".jsonl").exists():
        return None
    result = read_json(path)
    return result if isinstance(result, dict) and result.get("fingerprint") == fingerprint else None
