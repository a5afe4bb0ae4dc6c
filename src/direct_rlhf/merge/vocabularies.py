"""Whether two models give every token the same id, from their tokenizers' files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from direct_rlhf.data.tokens import TOKENIZER_FILES
from direct_rlhf.errors import MergeError

_WITHOUT_JSON = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as its files have it."""

    ref: str
    folder: Path

    @classmethod
    def find(cls, ref: str, folders: Sequence[Path]) -> "Vocabulary | None":
        """The tokenizer in the first of the folders that has one."""
        for folder in folders:
            if any((folder / name).is_file() for name in ("tokenizer.json", *_WITHOUT_JSON)):
                return cls(ref, folder)
        return None

    @property
    def files(self) -> Iterator[Path]:
        """All files that belong to it."""
        return (self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file())

    @cached_property
    def content(self) -> Mapping[str, Any] | None:
        """tokenizer.json; None where there is none."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_bytes())
            return content if isinstance(content, dict) else {}
        except ValueError as error:
            raise MergeError(f"{self.ref}: {path} is not valid JSON ({error}). Fetch it again.") from error

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token to id, from tokenizer.json."""
        model = (self.content or {}).get("model") or {}
        pieces = model.get("vocab") or {}
        if isinstance(pieces, list):  # Unigram: [[piece, score], ...]
            pieces = {piece[0]: index for index, piece in enumerate(pieces)}
        added = (self.content or {}).get("added_tokens") or []
        return {**pieces, **{token["content"]: token["id"] for token in added}}

    @cached_property
    def merges(self) -> list[str]:
        """The merges of BPE in one form of the two that files have."""
        merges = ((self.content or {}).get("model") or {}).get("merges") or []
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def differences(one: Vocabulary, other: Vocabulary) -> str:
    """What ``other`` has otherwise than ``one``, in words; empty if every text has the same pieces and ids."""
    if one.content is not None and other.content is not None:
        return "" if _same_bytes(one, other, "tokenizer.json") else _json_differences(one, other)
    shared = [name for name in _WITHOUT_JSON if all((v.folder / name).is_file() for v in (one, other))]
    if not shared:
        return "its tokenizer is in files of another kind, which cannot be compared"
    different = [name for name in shared if not _same_bytes(one, other, name)]
    return f"its {' and '.join(different)} differ" if different else ""


def conflicts(one: Vocabulary, other: Vocabulary) -> str:
    """Where an id means two tokens, in words; empty if what both have is the same and the rest only one of them has."""
    if one.content is None or other.content is None:
        return differences(one, other)
    mine, others = ({index: token for token, index in v.ids.items()} for v in (one, other))
    found = sorted(index for index in mine.keys() & others.keys() if mine[index] != others[index])
    if not found:
        return ""
    more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
    return f"id {found[0]} is {others[found[0]]!r} there and {mine[found[0]]!r} here{more}"


def _json_differences(one: Vocabulary, other: Vocabulary) -> str:
    said = []
    lacks, extra = one.ids.keys() - other.ids.keys(), other.ids.keys() - one.ids.keys()
    moved = [token for token in one.ids.keys() & other.ids.keys() if one.ids[token] != other.ids[token]]
    if lacks:
        said.append(f"it lacks {_tokens(lacks, one.ids)}")
    if extra:
        said.append(f"it also has {_tokens(extra, other.ids)}")
    if moved:
        first = min(moved, key=lambda token: one.ids[token])
        said.append(f"{len(moved)} have other ids, such as {first!r}: {other.ids[first]} instead of {one.ids[first]}")
    if not said and one.merges != other.merges:
        said.append("its merges differ")
    return "; ".join(said)


def _tokens(tokens: Any, ids: Mapping[str, int]) -> str:
    shown = ", ".join(f"{token!r} ({ids[token]})" for token in islice(sorted(tokens, key=lambda t: ids[t]), 3))
    return shown if len(tokens) <= 3 else f"{len(tokens)} tokens such as {shown}"


def _same_bytes(one: Vocabulary, other: Vocabulary, name: str) -> bool:
    first, second = one.folder / name, other.folder / name
    if first.stat().st_size != second.stat().st_size:
        return False
    return first.samefile(second) or first.read_bytes() == second.read_bytes()
