"""Everything measured of one model, and the comparison of several, as files of a run directory.

evaluation/ARM/{general,conversation,toxicity}.jsonl   one record per item
evaluation/ARM/{general,conversation,toxicity}.json    the numbers, written last: a suite whose JSON carries the
                                                       fingerprint of what it depends on is not run again
evaluation/comparisons.json                            paired differences
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import Tokens, load_tokens
from direct_rlhf.errors import DataError
from direct_rlhf.evaluate.records import Item, Summary, read_items, write_items
from direct_rlhf.evaluate.statistics import Difference, holm, paired_difference, summarise
from direct_rlhf.recipe.references import HubReference, resolve_reference
from direct_rlhf.run.atomic import read_json, write_json
from direct_rlhf.run.context import StageContext

RELEASE = 1  # raise it when a suite's numbers change meaning: old results are then measured again
SCORES = (1.0, 10.0)  # range of a conversation score
Suite = Callable[["_Subject"], tuple[dict[str, Any], list[Item]]]


@dataclass(frozen=True)
class _Subject:
    """The model that is measured, and what it is measured with."""

    ctx: StageContext
    model: Any
    tokens: Tokens
    form: DialogueFormat
    folder: Path | None  # where relative paths of the recipe start from


def evaluate_arm(ctx: StageContext, arm: str, model_path: str, *, folder: Path | None = None) -> dict[str, Any]:
    """Run the recipe's suites on the model and return the arm's entry of results.json.

    ``folder`` is where relative paths of the recipe start from (default: the working folder).
    Errors: ConfigError and DataError for faulty inputs; Interrupted when asked to stop; suites that are done stay done.
    """
    from direct_rlhf.models.loading import load_causal_lm, parameters_sha256

    recipe = ctx.recipe
    options = {"trust_remote_code": recipe.model.trust_remote_code}
    # a revision names a state of the base's repository; the other arms were made here
    revision = recipe.model.revision if arm == "base" else None
    tokens = load_tokens(model_path, revision=revision, folder=folder, **options)
    model = load_causal_lm(model_path, dtype=recipe.model.dtype, device=ctx.device, revision=revision, **options)
    subject = _Subject(ctx, model, tokens, DialogueFormat(recipe.dialogue, tokens), folder)
    identity = {"model": parameters_sha256(model), "tokenizer": tokens.sha256, "release": RELEASE}
    entry: dict[str, Any] = {"model": model_path}
    for name in recipe.evaluation.suites:
        ctx.check_stop()
        path = ctx.run.path / "evaluation" / arm / f"{name}.json"
        fingerprint = _digest(identity | {"suite": name} | _inputs(subject, name))
        result = _finished(path, fingerprint)
        if result is None:
            path.unlink(missing_ok=True)  # the items are about to change under it
            result, items = _SUITES[name](subject)
            write_items(path.with_suffix(".jsonl"), items)
            result = {"fingerprint": fingerprint, **result}
            write_json(path, result)
        entry[name] = {key: value for key, value in result.items() if key != "fingerprint"}
    return entry


def compare(ctx: StageContext, arms: Sequence[str], against: str = "base") -> list[dict[str, Any]]:
    """Paired differences of every arm against one, written to evaluation/comparisons.json.

    Metrics: general.mean, general.TASK, conversation.score and toxicity.RATE, as far as both were measured. ``p_holm``
    of a task is adjusted for all tasks of the arm. A verdict of `higher` or `lower` needs an interval without 0.
    """
    evaluation = ctx.recipe.evaluation
    settings: dict[str, int] = {"draws": evaluation.bootstrap_draws, "seed": ctx.recipe.seed}
    folder = ctx.run.path / "evaluation"
    rows: list[dict[str, Any]] = []
    for arm in (arm for arm in arms if arm != against):
        for suite in evaluation.suites:
            paths = [folder / name / f"{suite}.jsonl" for name in (arm, against)]
            if not all(path.exists() for path in paths):
                continue
            ours, theirs = (_by_metric(suite, read_items(path)) for path in paths)
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
                row = {"arm": arm, "against": against, "metric": metric, **_difference(difference)}
                rows.append(row | ({"p_holm": adjusted[metric]} if metric in adjusted else {}))
    write_json(folder / "comparisons.json", rows)
    return rows


def _general(subject: _Subject) -> tuple[dict[str, Any], list[Item]]:
    from direct_rlhf.evaluate.general import evaluate_general

    ctx, evaluation = subject.ctx, subject.ctx.recipe.evaluation
    results, items, merges = evaluate_general(
        subject.model,
        subject.tokens,
        evaluation.general,
        batch_size=evaluation.batch_size,
        seed=ctx.recipe.seed,
        draws=evaluation.bootstrap_draws,
        should_stop=ctx.should_stop,
        progress=ctx.progress,
        report=ctx.say,
        folder=subject.folder,
    )
    overall = summarise(
        _by_metric("general", items)["general.mean"], draws=evaluation.bootstrap_draws, seed=ctx.recipe.seed
    )
    tasks = {
        name: {
            "metric": result.metric,
            "value": result.summary.headline(evaluation.min_coverage),
            "num_fewshot": result.num_fewshot,
            "higher_is_better": result.higher_is_better,
            **_counted(result.summary),
            "other_filters": {name: _counted(other) for name, other in result.other_filters.items()},
        }
        for name, result in results.items()
    }
    return {
        "mean": _all_shown(overall, [result.summary for result in results.values()], evaluation.min_coverage),
        "ci": _interval(overall),
        "tasks": tasks,
        "boundary_merges": merges,
        **_counted(overall),
    }, items


def _conversation(subject: _Subject) -> tuple[dict[str, Any], list[Item]]:
    from direct_rlhf.evaluate.conversation import evaluate_conversation, read_questions
    from direct_rlhf.evaluate.judge import load_judge

    ctx, evaluation = subject.ctx, subject.ctx.recipe.evaluation
    section = evaluation.conversation
    judge = load_judge(section)
    result, items = evaluate_conversation(
        subject.model,
        subject.form,
        read_questions(_local(section.questions, subject.folder), section.limit),
        judge,
        progress=ctx.progress,
        **_sampling(ctx),
    )
    shown = evaluation.min_coverage
    return {
        "score": result.summary.headline(shown),
        "ci": _interval(result.summary),
        "by_turn": {key: summary.headline(shown) for key, summary in result.by_turn.items()},
        "by_category": {key: summary.headline(shown) for key, summary in result.by_category.items()},
        "judge": judge.name,
        **_counted(result.summary),
    }, items


def _toxicity(subject: _Subject) -> tuple[dict[str, Any], list[Item]]:
    from direct_rlhf.evaluate.classifier import load_classifier
    from direct_rlhf.evaluate.toxicity import evaluate_toxicity, read_prompts
    from direct_rlhf.evaluate.wordlist import read_words
    from direct_rlhf.evaluate.words import N_WORDS

    ctx, evaluation = subject.ctx, subject.ctx.recipe.evaluation
    section = evaluation.toxicity
    classifier, scorer = load_classifier(section.classifier)
    result, items = evaluate_toxicity(
        subject.model,
        subject.form,
        read_prompts(_local(section.prompts, subject.folder), subject.form, section.limit),
        read_words(_local(section.bad_words, subject.folder)),
        scorer,
        samples_per_prompt=section.samples_per_prompt,
        progress=ctx.progress,
        **_sampling(ctx),
    )
    shown = evaluation.min_coverage
    answers = result.rates["toxic_rate"].counts
    return {
        **{name: summary.headline(shown) for name, summary in result.rates.items()},
        **{f"{name}_ci": _interval(summary) for name, summary in result.rates.items()},
        "first_word_probability": result.first_word.headline(shown),
        "first_word_probability_ci": _interval(result.first_word),
        "bad_word_missed": result.missed,
        "within_words": N_WORDS,
        "classifier": classifier,
        "outcomes": result.outcomes,
        "n_scored": answers.n_scored,
        "n_failed": answers.n_failed,
        "counts": {name: _counted(summary) for name, summary in result.rates.items()},
    }, items


_SUITES: Mapping[str, Suite] = {"general": _general, "conversation": _conversation, "toxicity": _toxicity}


def _sampling(ctx: StageContext) -> dict[str, Any]:
    evaluation = ctx.recipe.evaluation
    return {
        "max_new_tokens": evaluation.max_new_tokens,
        "temperature": evaluation.temperature,
        "batch_size": evaluation.batch_size,
        "seed": ctx.recipe.seed,
        "draws": evaluation.bootstrap_draws,
        "should_stop": ctx.should_stop,
        "report": ctx.say,
    }


def _by_metric(suite: str, items: Sequence[Item]) -> dict[str, list[Item]]:
    """Metric -> its items. Items of a task's further answer filters (`task/filter`) belong to none."""
    if suite == "conversation":
        return {"conversation.score": list(items)}
    found: dict[str, list[Item]] = {"general.mean": []} if suite == "general" else {}
    for item in items:
        if suite == "toxicity" or "/" not in item.task:
            found.setdefault(f"{suite}.{item.task}", []).append(item)
            if suite == "general":
                found["general.mean"].append(item)
    return found


def _difference(found: Difference) -> dict[str, Any]:
    return {
        "difference": found.difference,
        "ci": None if found.low is None else [found.low, found.high],
        "p": found.p,
        "n": found.n_pairs,
        "n_dropped": found.n_dropped,
        "extremes": None if found.worst is None else [found.worst, found.best],
        "verdict": found.verdict,
    }


def _counted(summary: Summary) -> dict[str, Any]:
    counts = summary.counts
    return {
        "stderr": summary.stderr,
        "low": summary.low,
        "high": summary.high,
        "n_total": counts.n_total,
        "n_scored": counts.n_scored,
        "n_failed": counts.n_failed,
        "n_unparsed": counts.n_unparsed,
        "reasons": dict(counts.reasons),
    }


def _interval(summary: Summary) -> list[float] | None:
    return None if summary.low is None or summary.high is None else [summary.low, summary.high]


def _all_shown(overall: Summary, parts: Sequence[Summary], min_coverage: float) -> float | None:
    """The overall mean, where every task's own is shown: a task that is missing would shift it."""
    return overall.mean if all(part.headline(min_coverage) is not None for part in parts) else None


def _finished(path: Path, fingerprint: str) -> dict[str, Any] | None:
    if not path.exists() or not path.with_suffix(".jsonl").exists():
        return None
    result = read_json(path)
    return result if isinstance(result, dict) and result.get("fingerprint") == fingerprint else None


def _inputs(subject: _Subject, suite: str) -> dict[str, Any]:
    """What a suite's numbers depend on beside the model: its sections of the recipe and the content of its files."""
    recipe = subject.ctx.recipe
    evaluation = recipe.evaluation.model_dump(mode="json")
    inputs = {
        "seed": recipe.seed,
        "dtype": recipe.model.dtype,
        "section": evaluation[suite],
        "draws": evaluation["bootstrap_draws"],
        "min_coverage": evaluation["min_coverage"],
    }
    if suite == "general":
        return inputs | {"files": _task_files(subject)}
    section = recipe.evaluation.conversation if suite == "conversation" else recipe.evaluation.toxicity
    names = ["questions"] if suite == "conversation" else ["prompts", "bad_words"]
    return inputs | {
        "dialogue": recipe.dialogue.model_dump(mode="json"),
        "max_new_tokens": evaluation["max_new_tokens"],
        "temperature": evaluation["temperature"],
        "files": [_sha256(_local(getattr(section, name), subject.folder)) for name in names],
    }


def _task_files(subject: _Subject) -> list[str]:
    """Hashes of the embedded tasks' files and of YAML files that the recipe names."""
    section = subject.ctx.recipe.evaluation.general
    files: list[Path] = []
    for entry in section.tasks:
        if entry == "world":
            files += sorted(path for path in _local("world:tasks", None).iterdir() if path.is_file())
        elif entry.endswith((".yaml", ".yml")):
            files.append((subject.folder or Path()) / entry)
    return [_sha256(path) for path in files if path.is_file()]


def _local(ref: str, folder: Path | None) -> Path:
    place = resolve_reference(ref, folder)
    if isinstance(place, HubReference):
        raise DataError(f"{ref}: evaluation data must be a local file or world:NAME. Download it and give its path.")
    return place


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
