"""A judge's words: what its verdict is, and how an answer is shown to it so that the answer cannot forge one.

Reading a reply, after invisible characters are dropped:

    score    the last double bracket that holds a digit: `[[8]]`, `[[ 8.5 ]]`, `[[7/10]]`; from 1 to 10
    choice   the last double bracket: `[[A]]`, `[[B]]`, `[[C]]` (a tie)

If the last one is anything else (`[[15]]`, `[[7/5]]`, `[[Tie]]`), the reply holds no verdict: an earlier bracket is
never taken in its place, as it may be quoted or refused ("not [[A]] but ...").

Showing an answer: double brackets and the prompt's delimiters (end marks, role headers) come apart. What was written
stays readable; it only is no delimiter any more.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

Choice = Literal["A", "B", "C"]
LOWEST, HIGHEST = 1.0, 10.0
MARK_LENGTH = 80  # a longer line of a prompt is an instruction and no delimiter

_INVISIBLE = {"\u034f", "\u115f", "\u1160", "\u17b4", "\u17b5", "\u3164", "\uffa0"}  # shown as nothing, yet not Cf
_BRACKET = re.compile(r"\[\[([^\[\]]*)\]\]")
_SCORE = re.compile(r"\s*([0-9]{1,4}(?:\.[0-9]{1,4})?)\s*(?:/\s*10\s*)?")
_ROLE = r"(user|human|system|judge|assistant(?: [ab])?|reference(?: answer)?)[*_ \t]*:"
_HEADER = re.compile(rf"^((?:[^\w\n]|_){{0,40}}){_ROLE}", re.IGNORECASE | re.MULTILINE)
_INLINE_HEADER = re.compile(rf"(#{{1,6}}\s*){_ROLE}", re.IGNORECASE)
_START_OR_END = re.compile(
    r"[\[<|]{1,3}\s*((?:the\s+)?(?:start|end)\s+of\b[^\[\]<>|\n]{0,80}?)\s*[\]>|]{1,3}", re.IGNORECASE
)
_SPECIAL = re.compile(r"<\s*\|\s*([^<>|\n]{1,80}?)\s*\|\s*>")  # <|im_start|> and the like
_TITLE = re.compile(r"\[\s*((?:user\s+)?question|instruction|/?inst|/?sys)\s*\]", re.IGNORECASE)


def clean(text: str) -> str:
    """The text without zero-width, bidi and other format characters; half a surrogate pair becomes `?`."""
    kept = "".join(
        c for c in text if unicodedata.category(c) != "Cf" and c not in _INVISIBLE and not 0xFE00 <= ord(c) <= 0xFE0F
    )
    return kept.encode("utf-8", "replace").decode()


def parse_score(reply: str) -> float | None:
    """The rating, 1 to 10; None if the reply holds none."""
    attempts = [held for held in _BRACKET.findall(clean(reply)) if any(c.isdigit() for c in held)]
    found = _SCORE.fullmatch(attempts[-1]) if attempts else None
    if found is None:
        return None
    score = float(found[1])
    return score if LOWEST <= score <= HIGHEST else None


def parse_choice(reply: str) -> Choice | None:
    """Which side is better (A is the one shown first), C for a tie; None if the reply does not say."""
    attempts = [held.strip() for held in _BRACKET.findall(clean(reply))]
    choices: dict[str, Choice] = {"A": "A", "B": "B", "C": "C"}
    return choices.get(attempts[-1]) if attempts else None


def delimiters(template: str) -> tuple[str, ...]:
    """The short lines of a judge prompt that hold no field: what an answer must not be able to write.

    A line of signs alone (`-----`) is not among them, as an answer needs its rules and tables.
    """
    lines = {" ".join(clean(line).split()) for line in template.splitlines() if "{" not in line}
    lines = {line for line in lines if len(line) <= MARK_LENGTH and len(_words(line)) > 2}
    return tuple(sorted(lines, key=lambda line: (-len(line), line)))


def neutralise(answer: str, marks: Iterable[str] = ()) -> str:
    """The answer as a judge may see it: without invisible characters, double brackets and delimiters.

    ``marks`` are the delimiters of the prompt that it goes into; the usual ones are known without.
    Cases:   neutralising twice changes nothing more; text without brackets and delimiters stays as it is.
    """
    text = clean(answer)
    while True:  # taking one delimiter apart may join another
        before = text
        text = re.sub(r"\](?=\])", "] ", re.sub(r"\[(?=\[)", "[ ", text))
        for pattern in (_START_OR_END, _SPECIAL, _TITLE):
            text = pattern.sub(lambda found: f"({found[1].strip('/ ')})", text)
        for mark in marks:
            text = _mark(mark).sub(lambda found: f"({_words(found[0])})", text)
        for pattern in (_HEADER, _INLINE_HEADER):
            text = pattern.sub(lambda found: f"{_lead(found[1])}({found[2]})", text)
        if text == before:
            return text


def _mark(mark: str) -> re.Pattern[str]:
    """The delimiter in any case and spacing, as a line of its own where it is made of words alone."""
    pattern = r"\s+".join(re.escape(word) for word in mark.split())
    if _words(mark) == mark:
        return re.compile(rf"^[^\S\n]*{pattern}[^\S\n]*$", re.IGNORECASE | re.MULTILINE)
    return re.compile(pattern, re.IGNORECASE)


def _words(mark: str) -> str:
    """What is left of a delimiter when the signs around it go."""
    return re.sub(r"^[\W_]+|[\W_]+$", "", mark)


def _lead(signs: str) -> str:
    """What may stay in front of a header: bullets and white space, but no hashes, brackets or emphasis."""
    return re.sub(r"[#*_<>|\[\]]", "", signs)
