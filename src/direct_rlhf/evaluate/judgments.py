"""Rows that cost something, kept one by one as they come: replies of a judge, and the answers it judges.

A row is on the disk (fsync) before its `put` returns, so that a run that is killed pays for it once. Its key names all
that it depends on; whatever changes, changes the key, and the row is asked for again.
"""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from direct_rlhf.errors import DataError
from direct_rlhf.run.atomic import append_jsonl, read_jsonl

NAME = "judgments.jsonl"
ANSWERS = "answers.jsonl"


class Kept:
    """A JSONL file of rows by ``key``. A last line that a crash cut off is left out, with a warning."""

    def __init__(self, path: Path) -> None:
        """Errors: DataError for a file with a line that is no such row."""
        self.path = path
        self._lock = threading.Lock()
        self._rows: dict[str, Mapping[str, Any]] = {}
        for row in rows_of(path):
            self._rows[row["key"]] = row

    def get(self, key: str) -> Mapping[str, Any] | None:
        return self._rows.get(key)

    def put(self, key: str, row: Mapping[str, Any]) -> None:
        kept = {"key": key, **row}
        with self._lock:
            append_jsonl(self.path, kept)
            self._rows[key] = kept

    def __len__(self) -> int:
        return len(self._rows)


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of such a file; none if it is not there."""
    for number, row in enumerate(read_jsonl(path) if path.exists() else [], 1):
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise DataError(
                f"{path}: row {number} has no key. Remove the line, or the file to pay for all of it again."
            )
        yield row


def spent(evaluation: Path) -> tuple[int, float]:
    """Paid replies of a run, and what they cost: all judgment files below its evaluation folder."""
    calls, cost = 0, 0.0
    for path in sorted(evaluation.rglob(NAME)):
        for row in rows_of(path):
            calls += 1
            cost += float(row.get("cost", 0.0))
    return calls, cost
