"""Rows of every accepted format into the normal form.

    explicit   {"prompt": str, "chosen": str, "rejected": str}
    implicit   {"chosen": str, "rejected": str}: two transcripts with the recipe's markers
    hh         the same with Anthropic's markers, whatever the recipe's are
    messages   {"chosen": [{"role", "content"}], "rejected": [...]}, with or without "prompt": [...];
               after such a prompt the two answers may be strings
    sharegpt   {"conversations": [{"from", "value"}], "chosen": {"from", "value"}, "rejected": {...}}
    alpaca     {"instruction": str, "input": str, "chosen": str, "rejected": str}, or "output": [chosen, rejected]
    prompt     {"prompt": str | [...]}            text       {"text": str}

Optional columns: "margin" (number), "kind" (word), "system" (sharegpt, alpaca), "history" (alpaca).

Two whole dialogues are cut at their last common *turn*. If the first turn that differs is an assistant turn in both,
these two are the answers: the same human turn was answered in two ways. What follows them answers different texts, so
it is dropped and the pair is marked ``cut_early``. If it is not, there is no human turn that both answer, and the row
is rejected as `diverges_early`. Consecutive turns of one role are kept as they are. A rejected answer may be empty (to
answer nothing is worse than the chosen answer), a chosen one not.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from direct_rlhf.data.dialogue import parse_transcript
from direct_rlhf.data.types import PreferencePair, Prompt, RejectedRow, Role, Turn, Turns, prompt_hash
from direct_rlhf.recipe.schema import DialogueSection

RowFormat = Literal["explicit", "implicit", "messages", "sharegpt", "alpaca", "hh", "prompt", "text"]
SET_ASIDE = frozenset({"identical", "duplicate", "diverges_early", "too_long", "template"})
"""Reasons that are rules of ours about good rows; every other reason means a malformed row."""
_HH = DialogueSection()
_ROLES: Mapping[object, Role] = {
    "user": "human", "human": "human", "assistant": "assistant", "gpt": "assistant", "system": "system",
}  # fmt: skip
_Row = Mapping[str, Any]


class _Bad(Exception):
    """Why a row is not used: (reason, detail)."""


def recognise(row: _Row) -> RowFormat | None:
    """The format that a row's keys and types speak for."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "conversations" in row:
        return "sharegpt"
    if "instruction" in row:
        return "alpaca"
    if isinstance(chosen, list) or (isinstance(chosen, str) and isinstance(row.get("prompt"), list)):
        return "messages"
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(row.get("prompt"), str):
            return "explicit"
        return "hh" if _HH.human in chosen else "implicit"
    if "prompt" in row and "chosen" not in row:
        return "prompt"
    return "text" if isinstance(row.get("text"), str) else None


def to_pair(
    row: _Row, found: RowFormat, *, dialogue: DialogueSection, kind: str, source: str
) -> PreferencePair | RejectedRow:
    """A preference row in normal form; ``kind`` is used where the row names none."""
    try:
        return _pair(row, found, dialogue, kind, source)
    except _Bad as bad:
        return RejectedRow(source, *bad.args)


def to_prompt(
    row: _Row, found: RowFormat, *, dialogue: DialogueSection, kind: str, source: str
) -> Prompt | RejectedRow:
    """The prompt of a prompt row or of a preference row."""
    try:
        if found == "prompt":
            turns = _checked(_prompt_turns(_get(row, "prompt"), dialogue))
        else:
            turns = _pair(row, found, dialogue, kind, source).prompt
        return Prompt(prompt_hash(turns), turns, _kind(row, kind), source)
    except _Bad as bad:
        return RejectedRow(source, *bad.args)


def to_text(row: _Row, *, source: str) -> str | RejectedRow:
    """The text of a text row, unchanged."""
    try:
        text = _text(_get(row, "text"), "text")
    except _Bad as bad:
        return RejectedRow(source, *bad.args)
    return text if text.strip() else RejectedRow(source, "empty_text", "text is empty")


def _pair(row: _Row, found: RowFormat, dialogue: DialogueSection, kind: str, source: str) -> PreferencePair:
    markers = _HH if found == "hh" else dialogue
    cut_early = False
    if found == "explicit":
        prompt, chosen, rejected = _prompt_turns(_get(row, "prompt"), dialogue), *_answers(row)
    elif found in ("implicit", "hh"):
        dialogues = [_transcript(_text(_get(row, key), key), markers, key) for key in ("chosen", "rejected")]
        prompt, chosen, rejected, cut_early = _cut(*dialogues)
    elif found == "alpaca":
        prompt, chosen, rejected = _alpaca_prompt(row), *_answers(row)
    elif found in ("messages", "sharegpt"):
        before = _get(row, "conversations") if found == "sharegpt" else row.get("prompt")
        head = _messages(before, "prompt") if isinstance(before, list) else ()
        if found == "sharegpt" and row.get("system"):
            head = (Turn("system", _text(row["system"], "system").strip()), *head)
        dialogues = [_continued(head, _get(row, key), key) for key in ("chosen", "rejected")]
        prompt, chosen, rejected, cut_early = _cut(*dialogues)
    else:
        raise _Bad("missing_key", f"a {found} row holds no preference: chosen and rejected are missing")
    prompt, chosen, rejected = _checked(prompt), chosen.strip(), rejected.strip()
    if not chosen:
        raise _Bad("empty_chosen", "the chosen answer is empty")
    if chosen == rejected:
        raise _Bad("identical", "chosen and rejected are the same")
    return PreferencePair(
        _pair_id(prompt, chosen, rejected), prompt, chosen, rejected, _kind(row, kind), source, _margin(row), cut_early
    )


def _cut(chosen: Turns, rejected: Turns) -> tuple[Turns, str, str, bool]:
    """Prompt, the two answers, and whether a dialogue goes on after its answer."""
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1].role != "assistant":
            raise _Bad(
                "roles_out_of_order", f"{key} ends with a {turns[-1].role} turn, it must end with an assistant turn"
            )
    if chosen == rejected:
        raise _Bad("identical", "chosen and rejected are the same")
    pairs = zip(chosen, rejected, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if at == min(len(chosen), len(rejected)) or {chosen[at].role, rejected[at].role} != {"assistant"}:
        raise _Bad(
            "diverges_early", f"chosen and rejected part at turn {at + 1}, which is not an assistant turn in both"
        )
    return chosen[:at], chosen[at].text, rejected[at].text, at + 1 < max(len(chosen), len(rejected))


def _checked(turns: Turns) -> Turns:
    """The turns of a prompt: system first if at all, then human first and last."""
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    if not spoken:
        raise _Bad("empty_prompt", "the prompt has no human turn")
    if any(turn.role == "system" for turn in spoken):
        raise _Bad("roles_out_of_order", "a system turn must come before all others")
    if spoken[0].role != "human" or spoken[-1].role != "human":
        order = ", ".join(turn.role for turn in turns)
        raise _Bad("roles_out_of_order", f"a prompt must start and end with a human turn, its turns are: {order[:200]}")
    if not spoken[-1].text:
        raise _Bad("empty_prompt", "the last human turn is empty")
    return turns


def _prompt_turns(value: object, dialogue: DialogueSection) -> Turns:
    """A prompt: messages, a transcript (opens with a human marker or ends with an assistant one), or one human turn."""
    if isinstance(value, list):
        return _messages(value, "prompt")
    text = _text(value, "prompt")
    for markers in (dialogue, _HH):
        if text.startswith(markers.human) or text.rstrip().endswith(markers.assistant):
            turns = parse_transcript(text, markers)
            waits = turns[-1] == Turn("assistant", "")
            return turns[:-1] if waits else turns
    return (Turn("human", text.strip()),)


def _transcript(text: str, markers: DialogueSection, key: str) -> Turns:
    turns = parse_transcript(text, markers)
    if not text.strip():
        raise _Bad("empty_chosen" if key == "chosen" else "empty_prompt", f"{key} is empty")
    if all(turn.role == "system" for turn in turns):
        raise _Bad("no_turns", f"{key} holds no {markers.human!r} and no {markers.assistant!r}; add a prompt column")
    return turns


def _continued(head: Turns, value: object, key: str) -> Turns:
    """The whole dialogue: ``head``, then an answer; or the dialogue itself where it opens with another turn."""
    if isinstance(value, str):
        return (*head, Turn("assistant", _text(value, key).strip()))
    turns = _messages(value if isinstance(value, list) else [value], key)
    if not turns:
        raise _Bad("empty_chosen" if key == "chosen" else "wrong_type", f"{key} holds no message")
    return head + turns if turns[0].role == "assistant" else turns


def _messages(value: list[Any], where: str) -> Turns:
    turns = []
    for at, message in enumerate(value):
        place = f"{where}[{at}]"
        if not isinstance(message, Mapping):
            raise _Bad("wrong_type", f"{place} must be a message, is a {type(message).__name__}")
        keys = ("from", "value") if "from" in message else ("role", "content")
        role, text = (_get(message, key, place) for key in keys)
        if not isinstance(role, str) or role not in _ROLES:
            raise _Bad("unknown_role", f"{place} has role {str(role)[:40]!r}; known: {', '.join(map(str, _ROLES))}")
        turns.append(Turn(_ROLES[role], _text(text, f"{place}.{keys[1]}").strip()))
    return tuple(turns)


def _answers(row: _Row) -> tuple[str, str]:
    if "chosen" not in row and "output" in row:
        output = row["output"]
        if not isinstance(output, list) or len(output) != 2:
            raise _Bad("wrong_type", "output must be a list of two answers, the chosen one first")
        return _text(output[0], "output[0]"), _text(output[1], "output[1]")
    return _text(_get(row, "chosen"), "chosen"), _text(_get(row, "rejected"), "rejected")


def _alpaca_prompt(row: _Row) -> Turns:
    turns = []
    if row.get("system"):
        turns.append(Turn("system", _text(row["system"], "system").strip()))
    history = row.get("history") or []
    if not isinstance(history, list):
        raise _Bad("wrong_type", f"history must be a list, is {type(history).__name__}")
    for at, said in enumerate(history):
        if not isinstance(said, list) or len(said) != 2:
            raise _Bad("wrong_type", f"history[{at}] must be [question, answer]")
        turns.append(Turn("human", _text(said[0], f"history[{at}]").strip()))
        turns.append(Turn("assistant", _text(said[1], f"history[{at}]").strip()))
    parts = [_text(_get(row, "instruction"), "instruction").strip(), _text(row.get("input") or "", "input").strip()]
    return (*turns, Turn("human", "\n".join(part for part in parts if part)))


def _get(row: _Row, key: str, place: str = "") -> Any:
    if key not in row:
        raise _Bad(
            "missing_key", f"{place + '.' if place else ''}{key} is missing; there is: {', '.join(map(str, row))[:200]}"
        )
    return row[key]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _Bad("wrong_type", f"{where} must be text, is {'null' if value is None else type(value).__name__}")
    if "\0" in value:
        raise _Bad("nul", f"{where} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Bad("lone_surrogate", f"{where} holds half a surrogate pair at character {error.start}") from error
    return value


def _kind(row: _Row, default: str) -> str:
    kind = row.get("kind")
    if kind is None or kind == "":
        return default
    return _text(kind, "kind")[:40]


def _margin(row: _Row) -> float | None:
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) < math.inf:
        raise _Bad("wrong_type", f"margin must be a finite number, is {str(margin)[:40]}")
    try:
        return float(margin)
    except OverflowError as error:
        raise _Bad("wrong_type", "margin is an integer too large for a float") from error


def _pair_id(prompt: Turns, chosen: str, rejected: str) -> str:
    """Equal for pairs that differ in white space and case only."""
    folded = [prompt_hash(prompt)] + [" ".join(text.casefold().split()) for text in (chosen, rejected)]
    return hashlib.sha256(json.dumps(folded, ensure_ascii=False).encode()).hexdigest()[:16]
