"""General skill: any lm-eval tasks on our own forward, aggregated by us from the per-document rows.

lm-eval prepares documents and prompts and computes each document's metrics; the means are made here, so that a document
whose log-probabilities are not finite, or whose gold answer is none of the choices, is counted as failed instead of
becoming a number.
"""

import hashlib
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import ConfigError, Interrupted
from direct_rlhf.evaluate.records import Item, Summary
from direct_rlhf.evaluate.statistics import summarise
from direct_rlhf.evaluate.tasks import (
    GeneralTest,
    draws_per_document,
    load_tests,
    own_random_states,
    quiet,
    set_shots,
    templates_compiled_once,
)
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.recipe.schema import GeneralSection
from direct_rlhf.run.atomic import read_json, write_json

if TYPE_CHECKING:
    from direct_rlhf.evaluate.backend import Notes
    from direct_rlhf.run.context import Bar, MakesBars

NOTED = ("boundary_merges", "truncated", "capped")


@dataclass(frozen=True)
class TaskResult:
    """One test's headline metric (named) with its counts, and what its number was made under."""

    metric: str
    summary: Summary
    num_fewshot: int
    fewshot: str = "none"  # fixed, per-document or none
    higher_is_better: bool = True
    other_filters: Mapping[str, Summary] = field(default_factory=dict)  # further answer filters of the same outputs
    parts: Mapping[str, Summary] = field(default_factory=dict)  # of a test of several lm-eval tasks: each one's own
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One test on one model: an Item per document for each answer filter, the first of which gives the headline."""

    by_filter: Mapping[str, list[Item]]
    notes: Mapping[str, int]  # requests: boundary_merges, truncated, capped (see backend.Notes)


class Finished:
    """Tests that are done, as files of ``folder``: an evaluation that was stopped measures only the others."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self._fingerprint = folder, fingerprint

    def read(self, name: str) -> Measured | None:
        path = self._path(name)
        found = read_json(path) if path.exists() else {}
        if found.get("fingerprint") != self._fingerprint:
            return None
        items = {key: [Item(**item) for item in rows] for key, rows in found["by_filter"].items()}
        return Measured(items, found["notes"])

    def write(self, name: str, measured: Measured) -> None:
        rows = {key: [asdict(item) for item in items] for key, items in measured.by_filter.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(
            self._path(name), {"fingerprint": self._fingerprint, "notes": dict(measured.notes), "by_filter": rows}
        )

    def _path(self, name: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.json"


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
    data: Path | None = None,
    finished: Finished | None = None,
    share: bool = True,
) -> tuple[dict[str, TaskResult], list[Item]]:
    """Results by test, and one Item per document (and filter).

    ``folder`` is where relative YAML paths start from, ``data`` the folder of test sets; ``report`` is told when a
    batch did not fit into memory. A task's metric is acc_norm where it declares that, else the first it declares; with
    several filters the first gives the headline. An item's id holds a hash of its document, so that only equal
    documents are ever paired. Tests in ``finished`` are not measured again, and those measured are kept there.
    Errors: ConfigError for an unknown task, a metric without per-document values, unknown generation settings;
    Interrupted when asked to stop.
    """
    tasks = GeneralTasks(section, seed=seed, folder=folder, data=data)
    batch = ChunkSize("general tasks", batch_size, report)
    results: dict[str, TaskResult] = {}
    items: list[Item] = []
    for test in tasks.tests.values():
        measured = finished.read(test.name) if finished else None
        if measured is None:
            with progress(f"general: {test.name}") as bar:

                def on_done(done: int, bar: "Bar" = bar) -> None:
                    if should_stop():
                        raise Interrupted("the general tasks were stopped on request; they go on on resume")
                    bar.advance(done)

                measured = tasks.measure(
                    model, tokens, names=[test.name], limit=section.limit, batch=batch, on_done=on_done, share=share
                )[test.name]
            if finished:
                finished.write(test.name, measured)
        results[test.name] = _result(test, measured, section.fewshot, draws=draws, seed=seed)
        items += [item for found in measured.by_filter.values() for item in found]
    return results, items


def _result(test: GeneralTest, measured: Measured, fewshot: str, *, draws: int, seed: int) -> TaskResult:
    first, *others = measured.by_filter
    summaries = {key: summarise(found, draws=draws, seed=seed) for key, found in measured.by_filter.items()}
    parts: dict[str, list[Item]] = {}
    if len(test.tasks) > 1:
        for item in measured.by_filter[first]:
            parts.setdefault(item.extra["part"], []).append(item)
    shots = int(test.first.config.num_fewshot or 0)
    drawn = any(map(draws_per_document, test.tasks.values()))
    return TaskResult(
        metric=test.metric,
        summary=summaries[first],
        num_fewshot=shots,
        fewshot="none" if not shots else "per-document" if drawn else "fixed",
        higher_is_better=test.higher_is_better,
        other_filters={key: summaries[key] for key in others},
        parts={part: summarise(found, draws=draws, seed=seed) for part, found in parts.items()},
        notes=measured.notes,
    )


class GeneralTasks:
    """The section's tests, loaded once and measured as often as one likes.

    Errors: ConfigError for an unknown task, or more worked examples than there are.
    """

    def __init__(self, section: GeneralSection, *, seed: int, folder: Path | None, data: Path | None = None) -> None:
        self.seed = seed
        with quiet(), own_random_states(seed), tempfile.TemporaryDirectory(prefix="drlhf-") as cache:
            self.tests = {test.name: test for test in load_tests(section, folder, data, cache)}
        for test in self.tests.values():
            for task in test.tasks.values():
                set_shots(task, section.num_fewshot, section.fewshot)

    def measure(
        self,
        model: Any,
        tokens: Tokens,
        *,
        limit: int | None,
        batch: ChunkSize,
        on_done: Callable[[int], None],
        names: Sequence[str] | None = None,
        share: bool = True,
    ) -> dict[str, Measured]:
        """The tests of these ``names`` (default: all): one Item per document, in their order.

        The first ``limit`` documents, and the same shots at every call. ``on_done`` is told how many requests are
        finished, and may raise to stop.
        """
        tests = [self.tests[name] for name in names or self.tests]
        asked = {task: (test, n) for test in tests for task, n in test.documents(limit).items() if n}
        with quiet() as loud, own_random_states(self.seed), templates_compiled_once():
            from lm_eval.evaluator import evaluate

            from direct_rlhf.evaluate.backend import LanguageModelBackend

            backend = LanguageModelBackend(
                model, tokens, batch=batch, seed=self.seed, share=share, on_done=on_done, working=loud
            )
            for task, (test, _) in asked.items():  # drawing shots moves its random state
                test.tasks[task].set_fewshot_seed(seed=self.seed)
            # simple_evaluate would also seed this process's random states and call pip and git to describe the machine
            output = evaluate(
                backend,
                {"tasks": {task: test.tasks[task] for task, (test, _) in asked.items()}},
                samples={task: list(range(n)) for task, (_, n) in asked.items()},
                bootstrap_iters=0,
                log_samples=True,
            )
        found: dict[str, dict[str, list[Item]]] = {test.name: {} for test in tests}
        for task, (test, _) in asked.items():
            for key, items in _task_items(test, task, output["samples"][task], backend.notes).items():
                found[test.name].setdefault(key, []).extend(items)
        notes = {name: getattr(backend.notes, name) for name in NOTED}
        return {
            test.name: Measured(
                found[test.name], {name: sum(counts[task] for task in test.tasks) for name, counts in notes.items()}
            )
            for test in tests
        }


def _task_items(
    test: GeneralTest, task_name: str, rows: Sequence[Mapping[str, Any]], notes: "Notes"
) -> dict[str, list[Item]]:
    """Filter -> one item per document; the first filter's items carry the test's name, the others' `test/filter`."""
    task = test.tasks[task_name]
    cluster_field = (task.config.metadata or {}).get("cluster_field")  # a document field that repeats, e.g. a passage
    found: dict[str, list[Item]] = {}
    for row in sorted(rows, key=lambda row: row["doc_id"]):
        name = str(row["filter"])
        label = test.name if name == rows[0]["filter"] else f"{test.name}/{name}"
        cluster = str(row["doc"][cluster_field]) if cluster_field else ""
        unit = hashlib.sha256(cluster.encode()).hexdigest()[:16] if cluster else ""
        item = _item(task, test.metric, row, label, unit, (task_name, row["doc_id"]), notes)
        if part := test.part(task_name):
            item = replace(item, id=f"{part}/{item.id}", extra={"part": part, **item.extra})
        found.setdefault(name, []).append(item)
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
