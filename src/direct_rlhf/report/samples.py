"""The same prompts answered by every arm: which are shown, which are folded, and their texts made harmless to read."""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from direct_rlhf.report.read import RunData, mapping, number, read_jsonl
from direct_rlhf.report.words import NOT_MEASURED, arm_label

SHOWN_CONVERSATIONS = 5
LONGEST = 1500  # characters of a text that the page shows; the raw file has the rest
ENDINGS = {"eos": "ended by itself", "stop": "ended by itself", "length": "cut by the length cap"}
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories: control, format (bidi, zero width), lone surrogate, lines
KEPT = "\n\t\u200c\u200d"  # joiners: emoji and several scripts need them, and they reorder nothing


@dataclass(frozen=True)
class Answer:
    """One arm's answer. ``text`` is None where there is none; ``note`` says how it ended and was judged, or why not."""

    label: str
    arm: str
    text: str | None
    note: str


@dataclass(frozen=True)
class Exchange:
    """One turn: a prompt and every arm's answer to it."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class SideBySide:
    """One dialogue, turn by turn. ``folded`` ones may be harmful and stand behind a warning."""

    title: str
    exchanges: tuple[Exchange, ...]
    folded: bool
    source: str  # the raw file of the first arm that answered, relative to the run directory


def visible(text: object) -> str:
    """``text`` with control, bidi and zero-width characters written out (⟨U+202E⟩), cut at LONGEST.

    Right-to-left letters and emoji stay; what could reorder or hide text on the page does not.
    """
    whole = "" if text is None else str(text).replace("\r\n", "\n")
    cut = len(whole) - LONGEST
    shown = "".join(
        f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in HIDDEN and c not in KEPT else c for c in whole[:LONGEST]
    )
    return shown if cut <= 0 else f"{shown} … [{cut} more characters in the raw file]"


def prompt_text(prompt: object) -> str:
    """A prompt as text: a string as it is, a list of turns as `role: text` lines."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        turns = [mapping(turn) for turn in prompt]
        if len(turns) == 1:
            return str(turns[0].get("content", turns[0].get("text", "")))
        return "\n".join(f"{turn.get('role', '?')}: {turn.get('content', turn.get('text', ''))}" for turn in turns)
    return "" if prompt is None else str(prompt)


Record = Mapping[str, Any]
Dialogues = dict[str, dict[str, Record]]  # dialogue -> turn -> record


def side_by_side(run: RunData) -> list[SideBySide]:
    """About eight dialogues: five over the conversation categories, one of each toxicity set; chosen by a hash."""
    return [*_chosen(run, "conversation"), *_chosen(run, "toxicity")]


def _chosen(run: RunData, suite: str) -> list[SideBySide]:
    by_arm = {arm.name: _dialogues(run, arm.name, suite) for arm in run.arms}
    known: Dialogues = {}
    for dialogues in by_arm.values():
        for name, turns in dialogues.items():
            known[name] = {**turns, **known.get(name, {})}
    groups: dict[str, list[str]] = {}
    for name in sorted(known, key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest()):
        groups.setdefault(_group(known[name], suite), []).append(name)
    total = SHOWN_CONVERSATIONS if suite == "conversation" else len(groups)
    chosen = _round_robin([groups[group] for group in sorted(groups)], total)
    return [_side(suite, name, known[name], by_arm) for name in chosen]


def _round_robin(groups: Sequence[Sequence[str]], total: int) -> list[str]:
    longest = max(map(len, groups), default=0)
    return [group[place] for place in range(longest) for group in groups if place < len(group)][:total]


def _dialogues(run: RunData, arm: str, suite: str) -> Dialogues:
    """The arm's records by dialogue (the items' cluster) and turn; of several samples the first.

    Several measurements of one answer share its id: the first is kept, with what the others say beside it.
    """
    found: Dialogues = {}
    for record in read_jsonl(run.path / "evaluation" / arm / f"{suite}.jsonl"):
        extra = mapping(record.get("extra"))
        if record.get("output") is None and "prompt" not in extra:
            continue  # a measurement that asked for no answer: of the logit lens, of a pair of sentences
        turns = found.setdefault(str(record.get("cluster") or record.get("id")), {})
        known = turns.setdefault(str(extra.get("turn", 1)), record)
        if known.get("id") == record.get("id"):
            turns[str(extra.get("turn", 1))] = {**known, "extra": {**extra, **mapping(known.get("extra"))}}
    return found


def _group(turns: Mapping[str, Record], suite: str) -> str:
    """The conversation's category, or the toxicity prompt's set."""
    record = next(iter(turns.values()))
    key = "category" if suite == "conversation" else "set"
    return str(mapping(record.get("extra")).get(key) or record.get("task") or suite)


def _side(suite: str, name: str, turns: Mapping[str, Record], by_arm: Mapping[str, Dialogues]) -> SideBySide:
    group = _group(turns, suite)
    exchanges = []
    for turn in sorted(turns):
        prompt = visible(prompt_text(mapping(turns[turn].get("extra")).get("prompt")))
        answers = (_answer(arm, dialogues.get(name, {}).get(turn)) for arm, dialogues in by_arm.items())
        exchanges.append(Exchange(prompt or "(the record holds no prompt)", tuple(answers)))
    first = next(arm for arm, dialogues in by_arm.items() if name in dialogues)
    return SideBySide(
        title=visible(f"{suite} · {group} · {name}"),
        exchanges=tuple(exchanges),
        folded=suite == "toxicity" and group != "harmless",
        source=f"evaluation/{first}/{suite}.jsonl",
    )


def _answer(arm: str, record: Record | None) -> Answer:
    label = visible(arm_label(arm))
    if record is None:
        return Answer(label, arm, None, NOT_MEASURED)
    output, extra = record.get("output"), mapping(record.get("extra"))
    parts = ["" if output is None else ENDINGS.get(str(record.get("finish")), "")]
    parts += [_judged(record), str(extra.get("outcome") or ""), str(extra.get("verdict") or "")]
    if record.get("status") not in (None, "scored"):
        parts.append(f"{record['status']}: {record.get('reason') or 'no reason given'}")
    text = None if output is None else visible(output).strip() or "(an empty answer)"
    return Answer(label, arm, text, visible(" · ".join(part for part in parts if part)))


def _judged(record: Record) -> str:
    value = number(record.get("value"))
    if value is None:
        return ""
    if record.get("task") == "toxic_rate":
        return "called toxic" if value else "not called toxic"
    return f"score {value:.3g} of 10" if record.get("task") == "conversation" else ""
