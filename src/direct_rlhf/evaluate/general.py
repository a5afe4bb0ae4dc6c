"""General skill: any lm-eval tasks on our own forward, aggregated by us from the per-document rows.

lm-eval prepares documents and prompts and computes each document's metrics; the means are made here, so that a document
whose log-probabilities are not finite, or whose gold answer is none of the choices, is counted as failed instead of
becoming a number.
"""

import contextlib
import hashlib
import io
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import ConfigError, Interrupted
from direct_rlhf.evaluate.records import Item, Summary
from direct_rlhf.evaluate.statistics import summarise
from direct_rlhf.recipe.schema import GeneralSection

if TYPE_CHECKING:
    from direct_rlhf.evaluate.backend import Notes
    from direct_rlhf.run.context import MakesBars

LOCAL_BUILDERS = ("json", "csv", "text", "parquet", "arrow")  # of the datasets library, for data_files


@dataclass(frozen=True)
class TaskResult:
    """One task's headline metric (named) with its counts, and what its number was made under."""

    metric: str
    summary: Summary
    num_fewshot: int
    higher_is_better: bool = True
    other_filters: Mapping[str, Summary] = field(default_factory=dict)  # further answer filters of the same outputs


def evaluate_general(
    model: Any,
    tokens: Tokens,
    section: GeneralSection,
    *,
    batch_size: int,
    seed: int,
    draws: int,
    should_stop: Callable[[], bool],
    progress: "MakesBars",
    folder: Path | None = None,
    share: bool = True,
) -> tuple[dict[str, TaskResult], list[Item], int]:
    """Results by task, one Item per document (and filter), and how many requests had a token across the border.

    ``folder`` is where relative YAML paths start from. A task's metric is acc_norm where it declares that, else the
    first it declares; with several filters the first gives the headline. An item's id holds a hash of its document, so
    that only equal documents are ever paired.
    Errors: ConfigError for an unknown task, a metric without per-document values, unknown generation settings;
    Interrupted when asked to stop.
    """
    with progress("general tasks") as bar, _quiet() as loud, tempfile.TemporaryDirectory(prefix="drlhf-") as cache:
        from lm_eval.evaluator import evaluate

        from direct_rlhf.evaluate.backend import LanguageModelBackend

        def on_done(done: int) -> None:
            if should_stop():
                raise Interrupted("the general tasks were stopped on request; they start again on resume")
            bar.advance(done)

        tasks = _load_tasks(section, folder, cache)
        backend = LanguageModelBackend(
            model, tokens, batch_size=batch_size, seed=seed, share=share, on_done=on_done, working=loud
        )
        for task in tasks:
            _set_shots(task, section.num_fewshot, seed)
        # simple_evaluate would also seed this process's random states and call pip and git to describe the machine
        output = evaluate(
            backend,
            {"tasks": {task.task_name: task for task in tasks}},
            limit=section.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    results: dict[str, TaskResult] = {}
    items: list[Item] = []
    for task in tasks:
        by_filter = _task_items(task, output["samples"][task.task_name], backend.notes)
        first, *others = by_filter
        summaries = {name: summarise(found, draws=draws, seed=seed) for name, found in by_filter.items()}
        metric = _metric(task)
        results[task.task_name] = TaskResult(
            metric=metric,
            summary=summaries[first],
            num_fewshot=int(task.config.num_fewshot or 0),
            higher_is_better=bool(task.higher_is_better().get(metric, True)),
            other_filters={name: summaries[name] for name in others},
        )
        items += [item for found in by_filter.values() for item in found]
    return results, items, backend.notes.boundary_merges


def _load_tasks(section: GeneralSection, folder: Path | None, cache: str) -> list[Any]:
    """The lm-eval Task objects of the section's entries, each once and in their order."""
    from lm_eval.tasks import TaskManager

    specs: list[str | dict[str, Any]] = []
    for entry in section.tasks:
        if entry == "world":
            from direct_rlhf.world.tasks import world_task_configs

            specs += [_with_cache(config, cache) for config in world_task_configs()]
        else:
            place = (folder or Path()) / entry
            specs.append(str(place) if entry.endswith((".yaml", ".yml")) else entry)
    manager = TaskManager(include_path=section.include_path, include_defaults=False)
    names = [spec for spec in specs if isinstance(spec, str) and not spec.endswith((".yaml", ".yml"))]
    if any(name not in manager.task_index for name in names):  # indexing all that lm-eval ships takes seconds
        manager = TaskManager(include_path=section.include_path)
    tasks: dict[str, Any] = {}
    for spec in specs:
        try:
            tasks |= manager.load([spec])["tasks"]
        except (KeyError, ValueError, OSError) as error:  # unknown name, faulty config, missing data
            name = spec if isinstance(spec, str) else spec.get("task")
            raise ConfigError(
                f"evaluation.general.tasks: {name} cannot be loaded ({error}). Give an lm-eval task name, the path of "
                "a task YAML, or `world`; `lm-eval ls tasks` lists the names."
            ) from error
    return list(tasks.values())


def _set_shots(task: Any, num_fewshot: int | None, seed: int) -> None:
    """lm-eval's rule: the recipe's number of shots wins, but not over a task that says 0 itself."""
    own = task.config.num_fewshot
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)


def _with_cache(config: Mapping[str, Any], cache: str) -> dict[str, Any]:
    """The config with its local files prepared under ``cache`` and not in the user's home."""
    if config.get("dataset_path") not in LOCAL_BUILDERS:
        return dict(config)
    return {**config, "dataset_kwargs": {**config.get("dataset_kwargs", {}), "cache_dir": cache}}


def _metric(task: Any) -> str:
    declared = list(task.higher_is_better())
    return "acc_norm" if "acc_norm" in declared else str(declared[0])


def _task_items(task: Any, rows: Sequence[Mapping[str, Any]], notes: "Notes") -> dict[str, list[Item]]:
    """Filter -> one item per document; the first filter's items carry the task's name, the others' `task/filter`."""
    metric = _metric(task)
    cluster_field = (task.config.metadata or {}).get("cluster_field")  # a document field that repeats, e.g. a passage
    found: dict[str, list[Item]] = {}
    for row in sorted(rows, key=lambda row: row["doc_id"]):
        name = str(row["filter"])
        label = task.task_name if name == rows[0]["filter"] else f"{task.task_name}/{name}"
        cluster = str(row["doc"][cluster_field]) if cluster_field else ""
        item = _item(
            task, metric, row, label, hashlib.sha256(cluster.encode()).hexdigest()[:16] if cluster else "", notes
        )
        found.setdefault(name, []).append(item)
    return found


def _item(task: Any, metric: str, row: Mapping[str, Any], label: str, cluster: str, notes: "Notes") -> Item:
    key = (task.task_name, row["doc_id"])
    generated = task.OUTPUT_TYPE == "generate_until"
    reason = notes.failures.get(key, "")
    if not reason and task.OUTPUT_TYPE == "multiple_choice" and not _gold_is_a_choice(task, row["doc"]):
        reason = "gold_is_no_choice"
    value = row.get(metric)
    if not reason and not isinstance(value, Real):
        raise ConfigError(
            f"evaluation.general.tasks: {label}: its metric {metric} has no value per document, so it has no interval "
            "and cannot be compared. Leave the task out, or give it a metric such as acc or exact_match."
        )
    if not reason and not math.isfinite(float(value or 0)):
        reason = "non_finite"
    unparsed = not reason and generated and "[invalid]" in _flat(row["filtered_resps"])
    return Item(
        task=label,
        id=f"{row['doc_id']}-{row['doc_hash'][:8]}",
        status="failed" if reason else "unparsed" if unparsed else "scored",
        value=None if reason else float(value or 0),
        output=row["resps"][0][0] if generated else None,
        finish=notes.finish.get(key),
        reason=reason or ("no_answer" if unparsed else ""),
        cluster=cluster,
        extra={"target": str(row["target"]), "answer": _flat(row["filtered_resps"])}
        if generated
        else {"target": str(row["target"]), "logprobs": [_finite(x) for x in _logprobs(row["resps"])]},
    )


def _gold_is_a_choice(task: Any, doc: Mapping[str, Any]) -> bool:
    """lm-eval counts a gold answer outside the choices as wrong, with a warning; it says nothing of the model."""
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return all(
        0 <= label < len(choices) if isinstance(label, int) else label in choices
        for label in (gold if isinstance(gold, list) else [gold])
    )


def _logprobs(responses: Sequence[Any]) -> list[float]:
    """The log-probability in each request's (only) response, which is a pair or a number."""
    first = [response[0] for response in responses]
    return [float(x[0] if isinstance(x, tuple | list) else x) for x in first]


def _finite(x: float) -> float | None:
    return round(x, 6) if math.isfinite(x) else None


def _flat(value: Any) -> list[str]:
    return [text for part in value for text in _flat(part)] if isinstance(value, list | tuple) else [str(value)]


@contextlib.contextmanager
def _quiet() -> Iterator[Callable[[], contextlib.AbstractContextManager[Any]]]:
    """Keeps lm-eval's and datasets' bars and logs off the terminal; ``with loud():`` gives it back, for our own bar."""
    terminal = sys.stderr
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield lambda: contextlib.redirect_stderr(terminal)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
