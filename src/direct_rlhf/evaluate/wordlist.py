"""A list of words to look for: in finished texts, and character by character while a text is being written."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from direct_rlhf.errors import DataError

Nodes = frozenset[int]  # places in the trie of listed words
NOWHERE: Nodes = frozenset()


def read_words(path: Path) -> list[str]:
    """One word or phrase a line; blank lines and lines that start with # are skipped. DataError if there is none."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    words = [line for line in lines if line and not line.startswith("#")]
    if not words:
        raise DataError(f"{path}: holds no words. Give a text file with one word a line.")
    return words


def is_word_character(char: str) -> bool:
    return char.isalnum() or char in "_\ufffd"  # an unfinished UTF-8 character is taken for a letter


def whole_word_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the words or phrases where it stands as whole words, in any case."""
    longest_first = sorted(set(words), key=lambda word: (-len(word), word))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


class Trie:
    """The words in lower, Capital and UPPER case. A phrase that holds another entry is left out: the other is there."""

    def __init__(self, words: Sequence[str]) -> None:
        folded = sorted({word.lower() for word in words})
        patterns = {word: whole_word_pattern([word]) for word in folded}
        self.words = [word for word in folded if not any(o != word and patterns[o].search(word) for o in folded)]
        self._children: list[dict[str, int]] = [{}]
        self._ends: set[int] = set()
        for word in self.words:
            for variant in (word, word.capitalize(), word.upper()):
                node = 0
                for char in variant:
                    node = self._children[node].setdefault(char, len(self._children))
                    if node == len(self._children):
                        self._children.append({})
                self._ends.add(node)

    @property
    def longest(self) -> int:
        return max(map(len, self.words))

    def begin(self, char: str) -> Nodes:
        """Words that begin with ``char``."""
        node = self._children[0].get(char)
        return NOWHERE if node is None else frozenset((node,))

    def step(self, nodes: Nodes, char: str) -> Nodes:
        """Words still possible when ``char`` follows."""
        if not nodes:
            return nodes
        return frozenset(self._children[node][char] for node in nodes if char in self._children[node])

    def complete(self, nodes: Nodes) -> bool:
        """Whether all letters of a word are there, so that its end would make it one."""
        return not self._ends.isdisjoint(nodes)

    def next_characters(self, nodes: Nodes) -> set[str]:
        return {char for node in nodes for char in self._children[node]}
