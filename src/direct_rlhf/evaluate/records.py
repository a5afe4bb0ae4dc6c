"""The result record: one row per item, and the mean that is never shown without its counts.

Status says what an item's value is worth:

    scored     a value was measured
    unparsed   there is output, but no answer could be read from it: the metric's convention is the value
               (mostly 0 = wrong), or there is none
    failed     no usable output (the model, a sampler or a judge failed): no value, out of every mean, counted

Missing is never 0: a mean over nothing is None.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from direct_rlhf.errors import DataError
from direct_rlhf.run.atomic import write_jsonl

Status = Literal["scored", "failed", "unparsed"]


@dataclass(frozen=True)
class Item:
    """One measured thing. ``(task, id)`` names it, equally for every model, so that models can be paired by it."""

    task: str
    id: str
    status: Status
    value: float | None  # finite; None if failed
    output: str | None = None  # what the model wrote, raw
    finish: str | None = None  # how it ended: eos, stop or length
    reason: str = ""  # why it failed or could not be parsed: a short fixed word
    cluster: str = ""  # unit of resampling (the question, prompt or passage that repeats); "" = the item itself
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"item {self.task}/{self.id}: value {self.value} is not finite; record it as failed")
        if self.status == "scored" and self.value is None:
            raise ValueError(f"item {self.task}/{self.id}: scored, but without a value")
        if self.status == "failed" and (self.value is not None or not self.reason):
            raise ValueError(f"item {self.task}/{self.id}: a failed item has no value and a reason")

    @property
    def unit(self) -> str:
        return self.cluster or self.id


@dataclass(frozen=True)
class Counts:
    """How many items there were and what became of them."""

    n_total: int
    n_scored: int
    n_failed: int
    n_unparsed: int
    n_valued: int  # those in the mean: scored, and unparsed with a conventional value
    reasons: Mapping[str, int]  # of the failed and the unparsed

    @property
    def coverage(self) -> float:
        """Share of items that are in the mean; 0 when there are none."""
        return self.n_valued / self.n_total if self.n_total else 0.0


@dataclass(frozen=True)
class Summary:
    """A mean with its 95 % interval and what it rests on; ``mean`` is None when nothing could be scored."""

    mean: float | None
    low: float | None
    high: float | None
    stderr: float | None
    counts: Counts

    def headline(self, min_coverage: float) -> float | None:
        """The mean, or None where fewer than ``min_coverage`` of the items are in it."""
        return self.mean if self.counts.coverage >= min_coverage else None

    def as_json(self) -> dict[str, Any]:
        counts = asdict(self.counts)
        return {"mean": self.mean, "low": self.low, "high": self.high, "stderr": self.stderr, **counts}


def count(items: Iterable[Item]) -> Counts:
    items = list(items)
    status = Counter(item.status for item in items)
    return Counts(
        n_total=len(items),
        n_scored=status["scored"],
        n_failed=status["failed"],
        n_unparsed=status["unparsed"],
        n_valued=sum(item.value is not None for item in items),
        reasons=dict(sorted(Counter(item.reason for item in items if item.status != "scored").items())),
    )


def write_items(path: Path, items: Sequence[Item]) -> None:
    """All items as JSONL, atomically."""
    write_jsonl(path, [asdict(item) for item in items])


def read_items(path: Path) -> list[Item]:
    """The items of a JSONL file. DataError names the line that is no item."""
    items = []
    # not splitlines(): answers may hold other line separators, which JSON leaves unescaped; and not the reader of
    # run.atomic, which forgives a cut last line: this file is written as a whole, so a cut is damage
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(Item(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path}:{number}: not an evaluation item ({error}). Delete the file to measure again."
            ) from error
    return items
