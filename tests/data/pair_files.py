"""Small preference files and what loading them gives."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from direct_rlhf.data.load import load_preferences
from direct_rlhf.data.types import PreferenceData, PreferencePair
from direct_rlhf.recipe.schema import DataSection, DataSource


def pair_row(at: int = 0, **more: object) -> dict[str, object]:
    return {"prompt": f"question {at}", "chosen": f"good {at}", "rejected": f"bad {at}"} | more


def jsonl(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def section(*names: str, **settings: Any) -> DataSection:
    return DataSection(preferences=[DataSource(path=name) for name in names], **settings)


def load(folder: Path, data: DataSection, seed: int = 0) -> PreferenceData:
    return load_preferences(data, folder=folder, seed=seed)


def everything(data: PreferenceData) -> list[PreferencePair]:
    return [*data.train, *data.held_out]


def sources(rows: Iterable[Any]) -> list[str]:
    return sorted(row.source for row in rows)
