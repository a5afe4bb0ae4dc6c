"""The normal form that every accepted data format becomes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["human", "assistant", "system"]


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue; ``text`` carries no marker and no outer white space."""

    role: Role
    text: str


Turns = tuple[Turn, ...]


def prompt_hash(turns: Turns) -> str:
    """16 hex digits of SHA-256 over roles and white-space-folded, case-folded texts; equal prompts get equal hashes."""
    folded = [(turn.role, " ".join(turn.text.casefold().split())) for turn in turns]
    return hashlib.sha256(json.dumps(folded, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Prompt:
    """A dialogue that waits for an assistant turn (its last turn is human)."""

    id: str
    turns: Turns
    kind: str
    source: str  # FILE:LINE


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, the first preferred."""

    id: str
    prompt: Turns
    chosen: str
    rejected: str
    kind: str
    source: str  # FILE:LINE
    margin: float | None = None
    cut_early: bool = False  # the source's two dialogues go on after the answers that are compared here


@dataclass(frozen=True)
class RejectedRow:
    """A row that was not used, and why. ``reason`` is a short fixed word, ``detail`` a sentence."""

    source: str  # FILE:LINE
    reason: str
    detail: str


@dataclass(frozen=True)
class PreferenceData:
    """Preference pairs, split by prompt hash; the sources' mixing weights are already applied to ``train``."""

    train: tuple[PreferencePair, ...]
    held_out: tuple[PreferencePair, ...]
    rejected: tuple[RejectedRow, ...]
    counts: Mapping[str, int] = field(default_factory=dict)  # rows read, kept, and rejected by reason
    formats: Mapping[str, str] = field(default_factory=dict)  # path -> format found


@dataclass(frozen=True)
class PromptData:
    """Prompts for PPO, split as preference pairs are (a prompt held out there is held out here)."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    rejected: tuple[RejectedRow, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
