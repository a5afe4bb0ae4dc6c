"""Stop strings found while decoding, and text streamed no earlier than it is certain.

A stop string may span several tokens, may start inside one, and token borders may cut a character's UTF-8 bytes.
Only ids are compared with text here: kept ids are never re-tokenised.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no whole character (yet)


class Decoder(Protocol):
    """The part of ``Tokens`` that stop strings need."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class StopHit:
    """Where a row's stop string begins."""

    position: int  # characters of the row's text before it
    n_tokens_before: int  # tokens that begin before it; the last of them may reach into it


class StopTracker:
    """Finds the first stop string of each row, token by token.

    A token that cannot hold the last character of a stop string costs a look-up. For the others, a tail of the row is
    decoded that is longer than the longest stop string by one token; the whole row is decoded once, at the hit.
    """

    def __init__(self, tokens: Decoder, stop_strings: Sequence[str]) -> None:
        """Errors: ValueError for an empty stop string, which would end every answer before it began."""
        if not all(stop_strings):
            raise ValueError("a stop string is empty: every answer would end before it began; remove it")
        self._tokens = tokens
        self._stop_strings = tuple(stop_strings)
        self._longest = max(map(len, stop_strings), default=0)
        self._last_chars = frozenset(stop[-1] for stop in stop_strings)
        self._n_chars: dict[int, int] = {}  # per id: at least so many; 0 where its bytes may be part of a character
        self._harmless: set[int] = set()  # ids that can complete no stop string
        self._ids: defaultdict[int, list[int]] = defaultdict(list)

    def ids(self, row: int) -> list[int]:
        """The ids pushed to a row so far."""
        return self._ids[row]

    def push(self, row: int, token_id: int) -> StopHit | None:
        """Append a token to a row; the hit if this completes the row's first stop string."""
        ids = self._ids[row]
        ids.append(token_id)
        if token_id not in self._n_chars:
            self._learn(token_id)
        if token_id in self._harmless or not self._stop_strings:
            return None
        tail = self._tokens.decode(ids[self._tail_start(ids) :])
        if not any(stop in tail for stop in self._stop_strings):
            return None
        return self._locate(ids)

    def _learn(self, token_id: int) -> None:
        text = self._tokens.decode([token_id])
        self._n_chars[token_id] = 0 if INCOMPLETE in text else len(text)
        # A decoder may strip a space at the start of a text, so that a token alone does not show it.
        if INCOMPLETE not in text and " " not in self._last_chars and self._last_chars.isdisjoint(text):
            self._harmless.add(token_id)

    def _tail_start(self, ids: Sequence[int]) -> int:
        """First token of the tail: after it and before the last token lie enough characters to begin any stop string.

        It is no token that may begin in the middle of a character: some decoders (byte fallback) then give up on all
        the bytes that follow it.
        """
        start, n_chars = len(ids) - 2, 0
        while start > 0 and (n_chars < self._longest - 1 or not self._n_chars[ids[start]]):
            n_chars += self._n_chars[ids[start]]
            start -= 1
        return max(start, 0)

    def _locate(self, ids: Sequence[int]) -> StopHit | None:
        text = self._tokens.decode(ids)
        positions = [position for stop in self._stop_strings if (position := text.find(stop)) >= 0]
        if not positions:
            return None  # the tail began in the middle of a character
        position = min(positions)
        n_before = len(ids)
        while n_before > 0 and self._begin(ids, n_before - 1, text) >= position:
            n_before -= 1
        return StopHit(position, n_before)

    def _begin(self, ids: Sequence[int], index: int, text: str) -> int:
        """The character of ``text`` in which token ``index`` begins."""
        begin = 0
        for end in range(index, -1, -1):
            before = self._tokens.decode(ids[:end])
            begin = max(begin, _common_prefix(before, text))
            if text.startswith(before):
                break  # else the border after ``end`` tokens is in the middle of a character
        return begin


class TextStream:
    """The text of one growing row, given out as soon as it can no longer change or turn into a stop string."""

    def __init__(self, tokens: Decoder, stop_strings: Sequence[str]) -> None:
        self._tokens = tokens
        self._stop_strings = tuple(stop_strings)
        self._n_given = 0

    def push(self, ids: Sequence[int]) -> str:
        """Text that has become certain, given all ids of the row so far (no stop string is complete in them)."""
        text = self._tokens.decode(ids).rstrip(INCOMPLETE)
        held = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        return self._give(text[: len(text) - held])

    def finish(self, text: str) -> str:
        """What is left of the row's final text."""
        return self._give(text)

    def _give(self, text: str) -> str:
        new = text[self._n_given :]
        self._n_given += len(new)
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _common_prefix(left: str, right: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
