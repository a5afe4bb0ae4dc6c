"""What each suite measures on one model, and what of the recipe and its files its numbers depend on."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import ConfigError, DataError
from direct_rlhf.evaluate.chats import digest
from direct_rlhf.evaluate.records import Item, Summary
from direct_rlhf.evaluate.statistics import summarise
from direct_rlhf.recipe.references import HubReference, resolve_test_data, test_data_folder
from direct_rlhf.run.context import StageContext

Suite = Callable[["Subject"], tuple[dict[str, Any], list[Item]]]


@dataclass(frozen=True)
class Subject:
    """The model that is measured, and what it is measured with. Files of an arm's suites go to ``place``."""

    ctx: StageContext
    arm: str
    model: Any
    tokens: Tokens
    form: DialogueFormat
    folder: Path | None  # where relative paths of the recipe start from
    fingerprint: str = ""  # of the suite at hand: what its numbers depend on

    @property
    def place(self) -> Path:
        return self.ctx.run.path / "evaluation" / self.arm


def _general(subject: Subject) -> tuple[dict[str, Any], list[Item]]:
    from direct_rlhf.evaluate.general import Finished, evaluate_general

    ctx, evaluation = subject.ctx, subject.ctx.recipe.evaluation
    finished = Finished(subject.place / "general", subject.fingerprint)
    results, items = evaluate_general(
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
        data=test_data_folder(evaluation.data, subject.folder),
        finished=finished,
    )
    overall = summarise(
        [item for item in items if "/" not in item.task], draws=evaluation.bootstrap_draws, seed=ctx.recipe.seed
    )
    tasks = {
        name: {
            "metric": result.metric,
            "value": result.summary.headline(evaluation.min_coverage),
            "num_fewshot": result.num_fewshot,
            "fewshot": result.fewshot,
            "higher_is_better": result.higher_is_better,
            **_counted(result.summary),
            "other_filters": {name: _counted(other) for name, other in result.other_filters.items()},
            "parts": {name: _counted(part) for name, part in result.parts.items()},
            **result.notes,
        }
        for name, result in results.items()
    }
    return {
        "mean": _all_shown(overall, [result.summary for result in results.values()], evaluation.min_coverage),
        "ci": _interval(overall),
        "tasks": tasks,
        **_counted(overall),
    }, items


def _conversation(subject: Subject) -> tuple[dict[str, Any], list[Item]]:
    from direct_rlhf.evaluate.conversation import evaluate_conversation
    from direct_rlhf.evaluate.judging import Judging
    from direct_rlhf.models.loading import parameters_sha256

    ctx, evaluation = subject.ctx, subject.ctx.recipe.evaluation
    section, shown = evaluation.conversation, evaluation.min_coverage
    judging = Judging(ctx, subject.folder)
    questions = judging.questions
    model = parameters_sha256(subject.model) if judging.asks else ""
    judge = judging.judge(subject.arm, model)
    checked = judging.self_check()  # before any score of this judge
    wrote = {"model": model, "tokenizer": subject.tokens.sha256, "dtype": ctx.recipe.model.dtype}
    result, items = evaluate_conversation(
        subject.model,
        subject.form,
        questions,
        judge,
        progress=ctx.progress,
        by_category=section.temperatures == "by-category",
        keeping=judging.keeping(subject.arm, wrote),
        **_sampling(ctx) | {"max_new_tokens": section.max_new_tokens or evaluation.max_new_tokens},
    )
    bare = judging.without_references(subject.arm, model, items)
    return {
        "score": result.summary.headline(shown),
        "ci": _interval(result.summary),
        "by_turn": {key: summary.headline(shown) for key, summary in result.by_turn.items()},
        "by_category": {key: summary.headline(shown) for key, summary in result.by_category.items()},
        "by_category_and_turn": {
            category: {turn: _shown(summary, shown) for turn, summary in turns.items()}
            for category, turns in result.by_category_and_turn.items()
        },
        "by_reference": {key: _shown(summary, shown) for key, summary in result.by_reference.items()}
        | ({"given_but_not_shown": _shown(bare, shown)} if bare else {}),
        "doubted_references": result.doubted,
        "coverage": result.summary.counts.coverage,
        "judge": judge.name,
        "self_check": checked,
        **_counted(result.summary),
    }, items


def _toxicity(subject: Subject) -> tuple[dict[str, Any], list[Item]]:
    from direct_rlhf.evaluate.classifier import load_classifier
    from direct_rlhf.evaluate.toxicity import OF_K, RATES, evaluate_toxicity, read_prompts
    from direct_rlhf.evaluate.wordlist import read_words
    from direct_rlhf.evaluate.words import N_WORDS

    ctx, evaluation = subject.ctx, subject.ctx.recipe.evaluation
    section = evaluation.toxicity
    prompts = read_prompts([_local(ref, subject) for ref in section.prompt_files], subject.form, section.limit)
    words = read_words(_local(section.bad_words, subject))
    classifier, scorer = load_classifier(
        section.classifier,
        _local(section.classifier_path, subject) if section.classifier_path else None,
        template=section.guard_template,
        device=ctx.device,
    )
    if section.k and not scorer:
        ctx.say(f"evaluation.toxicity.k = {section.k}: not measured, the {classifier} gives no scores.")
    bias, bias_items = _crows_pairs(subject)  # first, as it and the lens take less time than the answers
    lens, lens_items = _lens(subject, [prompt for prompt in prompts if prompt.set == "provoking"], words)
    result, items = evaluate_toxicity(
        subject.model,
        subject.form,
        prompts,
        words,
        scorer,
        samples_per_prompt=section.samples_per_prompt,
        k=section.k,
        progress=ctx.progress,
        **_sampling(ctx),
    )
    shown = evaluation.min_coverage
    answers = result.rates["toxic_rate"].counts
    of_k = {name: result.rates.get(name) for name in OF_K}
    rates = {name: summary for name, summary in result.rates.items() if name in RATES}
    return {
        **{name: summary.headline(shown) for name, summary in rates.items()},
        **{f"{name}_ci": _interval(summary) for name, summary in rates.items()},
        **{name: summary and {"k": section.k, **_shown(summary, shown)} for name, summary in of_k.items()},
        "first_word_probability": result.first_word.headline(shown),
        "first_word_probability_ci": _interval(result.first_word),
        "bad_word_missed": result.missed,
        "within_words": N_WORDS,
        "classifier": classifier,
        "outcomes": result.outcomes,
        "n_scored": answers.n_scored,
        "n_failed": answers.n_failed,
        "counts": {name: _counted(summary) for name, summary in rates.items()},
        "lens": lens,
        "crows_pairs": bias,
    }, [*items, *lens_items, *bias_items]


def _lens(subject: Subject, prompts: Sequence[Any], words: Sequence[str]) -> tuple[dict[str, Any] | None, list[Item]]:
    """The curves by word list, None where they are not asked for; `left_out` says why a model has none."""
    from direct_rlhf.evaluate.lens import find_lens, measure_lens
    from direct_rlhf.evaluate.wordlist import read_words

    ctx, evaluation = subject.ctx, subject.ctx.recipe.evaluation
    if not evaluation.toxicity.lens or not prompts:
        return None, []
    lists = {"bad_words": words, "neutral_words": read_words(_local(evaluation.toxicity.neutral_words, subject))}
    try:
        find_lens(subject.model)
    except ConfigError as error:
        ctx.say(str(error))
        return {"left_out": str(error)}, []
    curves, items = measure_lens(subject.model, subject.form, prompts, lists, progress=ctx.progress, **_sampling(ctx))
    return {
        name: {
            "by_point": [_shown(summary, evaluation.min_coverage) for summary in curve.by_point],
            "missed": curve.missed,
        }
        for name, curve in curves.items()
    }, items


def _crows_pairs(subject: Subject) -> tuple[dict[str, Any] | None, list[Item]]:
    from direct_rlhf.evaluate.bias import evaluate_bias, read_pairs

    ctx, evaluation = subject.ctx, subject.ctx.recipe.evaluation
    section, shown = evaluation.toxicity, evaluation.min_coverage
    if section.crows_pairs is None:
        return None, []
    settings = _sampling(ctx)
    del settings["max_new_tokens"], settings["temperature"]
    result, items = evaluate_bias(
        subject.model,
        subject.tokens,
        read_pairs(_local(section.crows_pairs, subject), section.limit),
        progress=ctx.progress,
        **settings,
    )
    return {
        **_shown(result.overall, shown),
        "by_type": {kind: _shown(summary, shown) for kind, summary in result.by_type.items()},
        "log_probability_difference": _shown(result.difference, shown),
        "n_ties": result.n_ties,
    }, items


SUITES: Mapping[str, Suite] = {"general": _general, "conversation": _conversation, "toxicity": _toxicity}


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


def _shown(summary: Summary, min_coverage: float) -> dict[str, Any]:
    """A number that is no headline of its own, with its interval and counts."""
    return {"value": summary.headline(min_coverage), "ci": _interval(summary), **_counted(summary)}


def _interval(summary: Summary) -> list[float] | None:
    return None if summary.low is None or summary.high is None else [summary.low, summary.high]


def _all_shown(overall: Summary, parts: Sequence[Summary], min_coverage: float) -> float | None:
    """The overall mean, where every task's own is shown: a task that is missing would shift it."""
    return overall.mean if all(part.headline(min_coverage) is not None for part in parts) else None


def inputs(subject: Subject, suite: str) -> dict[str, Any]:
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
    inputs |= {
        "dialogue": recipe.dialogue.model_dump(mode="json"),
        "max_new_tokens": evaluation["max_new_tokens"],
        "temperature": evaluation["temperature"],
    }
    if suite == "conversation":
        from direct_rlhf.evaluate.judging import Judging

        return inputs | Judging(subject.ctx, subject.folder).inputs()
    section = recipe.evaluation.toxicity
    toxicity = [*section.prompt_files, section.bad_words, section.neutral_words if section.lens else None]
    toxicity += [section.crows_pairs, section.classifier_path]
    return inputs | {"files": [_content(_local(ref, subject)) for ref in toxicity if ref is not None]}


def _task_files(subject: Subject) -> list[str]:
    """Hashes of the embedded tasks' files and of YAML files that the recipe names."""
    section = subject.ctx.recipe.evaluation.general
    files: list[Path] = []
    for entry in section.tasks:
        if entry == "world":
            files += sorted(path for path in _local("world:tasks", subject).iterdir() if path.is_file())
        elif entry.partition(":")[0] == "standard":
            from direct_rlhf.evaluate.standard import STANDARD, local_files

            data = test_data_folder(subject.ctx.recipe.evaluation.data, subject.folder)
            files += [STANDARD, *(local_files(data) if data else [])]
        elif entry.endswith((".yaml", ".yml")):
            files.append((subject.folder or Path()) / entry)
    return [_sha256(path) for path in files if path.is_file()]


def _local(ref: str, subject: Subject) -> Path:
    place = resolve_test_data(ref, subject.ctx.recipe.evaluation.data, subject.folder)
    if isinstance(place, HubReference):
        raise DataError(f"{ref}: evaluation data must be a local file or world:NAME. Download it and give its path.")
    return place


def _content(path: Path) -> str:
    """A file's hash; of a model's folder that of its small files, with the names and sizes of all."""
    if path.is_file():
        return _sha256(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    sizes = {file.name: file.stat().st_size for file in files}
    return digest([sizes, [_sha256(file) for file in files if sizes[file.name] < 2**20]])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
