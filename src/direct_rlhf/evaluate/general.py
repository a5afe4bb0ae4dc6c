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
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import ConfigError, Interrupted
from direct_rlhf.evaluate.records import Item, Summary
from direct_rlhf.evaluate.statistics import summarise
from direct_rlhf.models.memory import ChunkSize
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
    report: Callable[[str], None],
    folder: Path | None = None,
    share: bool = True,
) -> tuple[dict[str, TaskResult], list[Item], int]:
    """Results by task, one Item per document (and filter), and how many requests had a token across the border.

    ``folder`` is where relative YAML paths start from; ``report`` is told when a batch did not fit into memory. A
    task's metric is acc_norm where it declares that, else the first it declares; with several filters the first gives
    the headline. An item's id holds a hash of its document, so that only equal documents are ever paired.
    Errors: ConfigError for an unknown task, a metric without per-document values, unknown generation settings;
    Interrupted when asked to stop.
    """
    with progress("general tasks") as bar:

        def on_done(done: int) -> None:
            if should_stop():
                raise Interrupted("the general tasks were stopped on request; they start again on resume")
            bar.advance(done)

        tasks = GeneralTasks(section, seed=seed, folder=folder)
        batch = ChunkSize("general tasks", batch_size, report)
        measured, merges = tasks.measure(model, tokens, limit=section.limit, batch=batch, on_done=on_done, share=share)
    results: dict[str, TaskResult] = {}
    items: list[Item] = []
    for name, task in tasks.tasks.items():
        by_filter = measured[name]
        first, *others = by_filter
        summaries = {key: summarise(found, draws=draws, seed=seed) for key, found in by_filter.items()}
        results[name] = TaskResult(
            metric=metric_name(task),
            summary=summaries[first],
            num_fewshot=int(task.config.num_fewshot or 0),
            higher_is_better=higher_is_better(task),
            other_filters={key: summaries[key] for key in others},
        )
        items += [item for found in by_filter.values() for item in found]
    return results, items, merges


class GeneralTasks:
    """The section's lm-eval tasks, loaded once and measured as often as one likes.

    ``tasks`` are lm-eval's Task objects by name, in the section's order. Errors: ConfigError for an unknown task.
    """

    def __init__(self, section: GeneralSection, *, seed: int, folder: Path | None) -> None:
        self.seed = seed
        with _quiet(), _own_random_states(seed), tempfile.TemporaryDirectory(prefix="drlhf-") as cache:
            self.tasks = _load_tasks(section, folder, cache)
        for task in self.tasks.values():
            _set_shots(task, section.num_fewshot)

    def measure(
        self,
        model: Any,
        tokens: Tokens,
        *,
        limit: int | None,
        batch: ChunkSize,
        on_done: Callable[[int], None],
        share: bool = True,
    ) -> tuple[dict[str, dict[str, list[Item]]], int]:
        """Task -> answer filter -> one Item per document, in their order; and the number of boundary merges.

        The first ``limit`` documents, and the same shots at every call. ``on_done`` is told how many requests are
        finished, and may raise to stop.
        """
        with _quiet() as loud, _own_random_states(self.seed):
            from lm_eval.evaluator import evaluate

            from direct_rlhf.evaluate.backend import LanguageModelBackend

            backend = LanguageModelBackend(
                model, tokens, batch=batch, seed=self.seed, share=share, on_done=on_done, working=loud
            )
            for task in self.tasks.values():  # drawing shots moves its random state
                task.set_fewshot_seed(seed=self.seed)
            # simple_evaluate would also seed this process's random states and call pip and git to describe the machine
            output = evaluate(backend, {"tasks": self.tasks}, limit=limit, bootstrap_iters=0, log_samples=True)
        found = {
            name: _task_items(name, task, output["samples"][name], backend.notes) for name, task in self.tasks.items()
        }
        return found, backend.notes.boundary_merges


def _load_tasks(section: GeneralSection, folder: Path | None, cache: str) -> dict[str, Any]:
    """The lm-eval Task objects of the section's entries by name, each once and in their order."""
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
    return tasks


def _set_shots(task: Any, num_fewshot: int | None) -> None:
    """lm-eval's rule: the recipe's number of shots wins, but not over a task that says 0 itself."""
    own = task.config.num_fewshot
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _with_cache(config: Mapping[str, Any], cache: str) -> dict[str, Any]:
    """The config with its local files prepared under ``cache``, not in the user's home, and not needed afterwards."""
    if config.get("dataset_path") not in LOCAL_BUILDERS:
        return dict(config)
    own = {"cache_dir": cache, "keep_in_memory": True}
    return {**config, "dataset_kwargs": {**config.get("dataset_kwargs", {}), **own}}


def metric_name(task: Any) -> str:
    """acc_norm where the task declares it, else its first metric."""
    declared = list(task.higher_is_better())
    return "acc_norm" if "acc_norm" in declared else str(declared[0])


def higher_is_better(task: Any) -> bool:
    """Which way that metric points."""
    return bool(task.higher_is_better().get(metric_name(task), True))


def _task_items(task_name: str, task: Any, rows: Sequence[Mapping[str, Any]], notes: "Notes") -> dict[str, list[Item]]:
    """Filter -> one item per document; the first filter's items carry the task's name, the others' `task/filter`."""
    metric = metric_name(task)
    cluster_field = (task.config.metadata or {}).get("cluster_field")  # a document field that repeats, e.g. a passage
    found: dict[str, list[Item]] = {}
    for row in sorted(rows, key=lambda row: row["doc_id"]):
        name = str(row["filter"])
        label = task_name if name == rows[0]["filter"] else f"{task_name}/{name}"
        cluster = str(row["doc"][cluster_field]) if cluster_field else ""
        unit = hashlib.sha256(cluster.encode()).hexdigest()[:16] if cluster else ""
        found.setdefault(name, []).append(_item(task, metric, row, label, unit, (task_name, row["doc_id"]), notes))
    return found


def _item(
    task: Any, metric: str, row: Mapping[str, Any], label: str, cluster: str, key: tuple[str, int], notes: "Notes"
) -> Item:
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
def _own_random_states(seed: int) -> Iterator[None]:
    """Python's and NumPy's global random states as of ``seed``, and afterwards what they were before.

    lm-eval draws names from them, and code that comes with a task may draw more.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


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
