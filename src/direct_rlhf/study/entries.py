"""What the study of the three H's compares."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Route = Literal["base", "expert", "mixture", "merge", "ablation"]


@dataclass(frozen=True)
class Entry:
    """One model of the study."""

    name: str
    route: Route
    paradigm: str  # "" for the base
    title: str  # the kind of an expert; the recipe's name of a mixture, merge or variant
    path: Path
    settings: Mapping[str, Any]
    validation: float | None = None  # the score on the validation questions, which chose the settings of a merge
    of: str = ""  # the entry that this one repeats with other random masks
