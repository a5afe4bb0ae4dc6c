"""Whether training has seen what the evaluation asks: equal texts, found by a hash that ignores how they are typed."""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator

from direct_rlhf.data.types import PreferencePair, Prompt


class _Plain(dict[int, str]):
    """For ``str.translate``: what each character becomes, worked out when it is first met."""

    OPERATORS = frozenset("*/%&#@\\")  # punctuation by category; 6 / 2 is not 6 * 2

    def __missing__(self, code: int) -> str:
        character, category = chr(code), unicodedata.category(chr(code))
        if category == "Pd" or character == "\u2212":  # the minus sign
            plain = " - "
        elif category[0] in "LMNS":
            plain = character
        else:
            plain = f" {character} " if character in self.OPERATORS else " "
        self[code] = plain
        return plain


_PLAIN = _Plain()


def normalised_hash(text: str) -> str:
    """16 hex digits of SHA-256 over the words of ``text``; equal for texts that differ in form only.

    Form is Unicode compatibility (NFKC), case, white space, the kind of dash, and punctuation other than dashes and
    operators. A text without any word has the hash "", which equals nothing in ``overlaps``.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = folded.translate(_PLAIN).split()
    return hashlib.sha256(" ".join(words).encode(errors="surrogatepass")).hexdigest()[:16] if words else ""


def overlaps(train: Iterable[tuple[str, str]], evaluation: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Which training texts are evaluation texts: (train source, evaluation id), in the order of ``train``.

    ``train``: (source, text), the source being FILE:LINE; a row may give several texts (``human_turns``).
    ``evaluation``: (id, text); a text that several items ask is found once for each of them, and an item may have
    several texts (a question with and without "Question:" in front). A follow-up such as "And why?" is no question by
    itself, so give first turns only. A pair is listed once.
    """
    asked: dict[str, list[str]] = {}
    for item, text in evaluation:
        asked.setdefault(normalised_hash(text), []).append(item)
    asked.pop("", None)
    found = ((source, item) for source, text in train for item in asked.get(normalised_hash(text), ()))
    return list(dict.fromkeys(found))


def human_turns(rows: Iterable[PreferencePair | Prompt]) -> Iterator[tuple[str, str]]:
    """(source, text) of every human turn of every prompt, the form in which ``overlaps`` takes training rows."""
    for row in rows:
        for turn in row.prompt if isinstance(row, PreferencePair) else row.turns:
            if turn.role == "human":
                yield row.source, turn.text
