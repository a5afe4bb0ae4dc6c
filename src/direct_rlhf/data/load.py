"""From the recipe's data section to preference pairs, prompts and texts, with every row accounted for.

    read = kept + rejected        (``counts``: "read", "kept", "cut_early" (part of kept), then one entry per reason)

The held-out split hashes the prompt alone: no seed, file order or other row moves a prompt to the other side.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.formats import SET_ASIDE, RowFormat, recognise, to_pair, to_prompt, to_text
from direct_rlhf.data.rows import RawRow, fingerprint, fingerprints, locate, read_rows
from direct_rlhf.data.types import PreferenceData, PreferencePair, Prompt, PromptData, RejectedRow, prompt_hash
from direct_rlhf.errors import ConfigError, DataError
from direct_rlhf.recipe.schema import DataSection, DataSource, DialogueSection
from direct_rlhf.run.atomic import write_jsonl

__all__ = [
    "TextData", "fingerprint", "fingerprints", "fits", "fits_prompts", "load_preferences", "load_prompts",
    "load_text_data", "load_texts", "sniff", "write_rejected",
]  # fmt: skip

SNIFFED_ROWS = 50
_PAIRS = ("explicit", "implicit", "messages", "sharegpt", "alpaca", "hh")
_ACCEPTED: Mapping[str, tuple[str, ...]] = {"preferences": _PAIRS, "prompts": (*_PAIRS, "prompt"), "text": ("text",)}
_KEYS = {
    "preferences": "prompt + chosen + rejected, chosen + rejected (transcripts or message lists), conversations + "
    "chosen + rejected, or instruction + chosen + rejected",
    "prompts": "prompt, or the keys of a preference row",
    "text": "text",
}
_PLAIN = DialogueSection()

T = TypeVar("T")


@dataclass(frozen=True)
class TextData:
    """Plain texts; the sources' weights are already applied."""

    texts: tuple[str, ...]
    rejected: tuple[RejectedRow, ...]
    counts: dict[str, int] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)


@dataclass
class _Found(Generic[T]):
    """What the sources of one kind gave: good rows with the source each came from."""

    rows: list[tuple[DataSource, T]] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)

    def counts(self, kept: int) -> dict[str, int]:
        reasons = Counter(row.reason for row in self.rejected)
        return {"read": kept + len(self.rejected), "kept": kept, **dict(sorted(reasons.items()))}


def load_preferences(
    section: DataSection, *, folder: Path | None, seed: int, dialogue: DialogueSection = _PLAIN
) -> PreferenceData:
    """All preference pairs of the recipe. ``dialogue`` gives the markers of transcripts (`format: implicit`).

    ``seed`` chooses which rows a source of weight below 1 uses; the split and all else do not depend on it. With a
    mixture they come in the order of their content, whatever that of the files, and of a pair that stands in several
    kinds the one of the first name stays.
    Errors: ConfigError if there is no source; DataError for a damaged file or too many malformed rows.
    """
    if not section.preferences:
        raise ConfigError("data.preferences is empty: name at least one source of preference pairs.")
    found: _Found[PreferencePair] = _read(section, "preferences", section.preferences, folder, dialogue)
    if section.mixture.type != "none":
        found.rows.sort(key=lambda row: _content(row[1]))
    pairs = _unique(found, lambda pair: pair.id)
    train, held_out = _split(pairs, section, seed, lambda pair: (pair.id, prompt_hash(pair.prompt)))
    counts = found.counts(len(pairs))
    counts["cut_early"] = sum(pair.cut_early for _, pair in pairs)
    return PreferenceData(tuple(train), tuple(held_out), tuple(found.rejected), counts, found.formats)


def load_prompts(
    section: DataSection, *, folder: Path | None, seed: int, dialogue: DialogueSection = _PLAIN
) -> PromptData:
    """Prompts for PPO: those of ``section.prompts``, else of ``section.preferences``; equal ones are one prompt.

    A prompt that ``load_preferences`` holds out is held out here. Errors: as there.
    """
    sources = section.prompts or section.preferences
    if not sources:
        raise ConfigError("data.prompts and data.preferences are empty: name at least one source of prompts.")
    found: _Found[Prompt] = _read(section, "prompts", sources, folder, dialogue)
    if section.mixture.type != "none":
        found.rows.sort(key=lambda row: _content(row[1]))
    prompts = _unique(found, lambda prompt: prompt.id)
    train, held_out = _split(prompts, section, seed, lambda prompt: (prompt.id, prompt.id))
    return PromptData(tuple(train), tuple(held_out), tuple(found.rejected), found.counts(len(prompts)), found.formats)


def load_text_data(section: DataSection, *, folder: Path | None) -> TextData:
    """The plain texts of ``section.text`` with the rows that were not used; no source gives no text."""
    found: _Found[str] = _read(section, "text", section.text, folder, _PLAIN)
    texts = [text for source, text in found.rows for _ in range(_times(source.weight, text, 0))]
    return TextData(tuple(texts), tuple(found.rejected), found.counts(len(found.rows)), found.formats)


def load_texts(section: DataSection, *, folder: Path | None) -> list[str]:
    """The plain texts of ``section.text``, for the ptx loss."""
    return list(load_text_data(section, folder=folder).texts)


def fits(
    pairs: Iterable[PreferencePair], dialogue_format: DialogueFormat, section: DataSection
) -> tuple[list[PreferencePair], list[RejectedRow]]:
    """Pairs whose prompt and both answers fit, and the rest with reasons.

    Nothing that differs between chosen and rejected is ever cut off: answers are whole or the pair goes ("too_long").
    A pair whose answers get equal ids carries no preference ("identical"); one that a chat template refuses, no ids.
    """
    kept, rejected = [], []
    max_prompt, max_answer = section.max_prompt_tokens, section.max_answer_tokens
    for pair in pairs:
        try:
            both = [
                dialogue_format.encode_dialogue(
                    pair.prompt, answer, max_prompt_tokens=max_prompt, max_answer_tokens=max_answer
                )
                for answer in (pair.chosen, pair.rejected)
            ]
        except DataError as error:
            rejected.append(RejectedRow(pair.source, "template", str(error)))
            continue
        chosen, other = both
        if chosen is None or other is None:
            if dialogue_format.encode_prompt(pair.prompt, max_prompt) is None:
                detail = f"the last human turn passes data.max_prompt_tokens = {max_prompt}"
            else:
                longer = " and ".join(key for key, ids in zip(("chosen", "rejected"), both, strict=True) if ids is None)
                detail = f"{longer}: longer than data.max_answer_tokens = {max_answer}"
            rejected.append(RejectedRow(pair.source, "too_long", detail))
        elif chosen.answer_ids == other.answer_ids:
            rejected.append(RejectedRow(pair.source, "identical", "chosen and rejected have the same token ids"))
        else:
            kept.append(pair)
    return kept, rejected


def fits_prompts(
    prompts: Iterable[Prompt], dialogue_format: DialogueFormat, section: DataSection
) -> tuple[list[Prompt], list[RejectedRow]]:
    """Prompts that fit, and the rest with reasons."""
    kept, rejected = [], []
    for prompt in prompts:
        try:
            ids = dialogue_format.encode_prompt(prompt.turns, section.max_prompt_tokens)
        except DataError as error:
            rejected.append(RejectedRow(prompt.source, "template", str(error)))
            continue
        if ids is None:
            detail = f"the last human turn passes data.max_prompt_tokens = {section.max_prompt_tokens}"
            rejected.append(RejectedRow(prompt.source, "too_long", detail))
        else:
            kept.append(prompt)
    return kept, rejected


def sniff(
    section: DataSection, folder: Path | None, rows: int = SNIFFED_ROWS, *, dialogue: DialogueSection = _PLAIN
) -> list[str]:
    """Problems in the first rows of every local source, for `check`; hub data sets are not fetched."""
    problems = []
    for name in _ACCEPTED:
        for at, source in enumerate(getattr(section, name)):
            if source.path.startswith("hf:"):
                continue
            found: _Found[Any] = _Found()
            try:
                head = islice(read_rows(locate(section, source.path, folder), source.path), rows)
                _read_source(found, source, head, dialogue, name)
                _check_share(source.path, len(found.rows), found.rejected, section.max_bad_rows)
            except (ConfigError, DataError) as error:
                problems.append(f"data.{name}[{at}]: {error}")
    return problems


def write_rejected(path: Path, rows: Iterable[RejectedRow]) -> None:
    """`rejected.jsonl`: one line per row that was not used, with its place and reason."""
    write_jsonl(path, ({"source": row.source, "reason": row.reason, "detail": row.detail} for row in rows))


def _read(
    section: DataSection, name: str, sources: Sequence[DataSource], folder: Path | None, dialogue: DialogueSection
) -> _Found[Any]:
    found: _Found[Any] = _Found()
    for source in sources:
        good, bad = len(found.rows), len(found.rejected)
        rows = read_rows(locate(section, source.path, folder), source.path)
        _read_source(found, source, rows, dialogue, name)
        _check_share(source.path, len(found.rows) - good, found.rejected[bad:], section.max_bad_rows)
    return found


def _read_source(
    found: _Found[Any], source: DataSource, rows: Iterator[RawRow], dialogue: DialogueSection, name: str
) -> None:
    """Adds one source's rows to ``found``; ``name`` is the list of the data section that it stands in."""
    head = list(islice(rows, SNIFFED_ROWS))
    row_format = _format(source, head, name)
    found.formats[source.path] = row_format
    good = 0
    for raw in chain(head, rows):
        row: PreferencePair | Prompt | str | RejectedRow
        if raw.problem is not None or raw.value is None:
            row = RejectedRow(raw.source, *(raw.problem or ("wrong_type", "the row is empty")))
        elif name == "text":
            row = to_text(raw.value, source=raw.source)
        else:
            convert = to_pair if name == "preferences" else to_prompt
            row = convert(raw.value, row_format, dialogue=dialogue, kind=source.kind, source=raw.source)
        if isinstance(row, RejectedRow):
            found.rejected.append(row)
            continue
        found.rows.append((source, row))
        good += 1
        if good == source.limit:
            return


def _format(source: DataSource, head: Sequence[RawRow], name: str) -> RowFormat:
    """The recipe's word, else the format that most of the first rows speak for."""
    if not head:
        raise DataError(f"{source.path}: holds no rows. Check that it is the right file.")
    if source.format == "auto":
        votes = Counter(found for raw in head if raw.value is not None and (found := recognise(raw.value)))
        if not votes:
            raise DataError(_unknown(source.path, head, name))
        row_format = votes.most_common(1)[0][0]
    else:
        row_format = source.format
    if row_format not in _ACCEPTED[name]:
        raise DataError(
            f"{source.path}: {row_format} rows cannot serve as data.{name}. Accepted there are rows with {_KEYS[name]}."
        )
    return row_format


def _unknown(path: str, head: Sequence[RawRow], name: str) -> str:
    first = next((raw.value for raw in head if raw.value is not None), None)
    if first is None:
        reason, detail = head[0].problem or ("wrong_type", "the row is empty")
        return f"{path}: none of the first {len(head)} rows can be read; {head[0].source}: {reason} ({detail})."
    return (
        f"{path}: no known row format; the first row's keys are {', '.join(map(str, first))[:200] or 'none'}. Accepted "
        f"as data.{name} are rows with {_KEYS[name]}. Rename the columns, or set the source's `format`."
    )


def _check_share(path: str, good: int, rejected: Sequence[RejectedRow], limit: float) -> None:
    """Errors: DataError if the share of malformed rows passes ``limit``, or no row is left."""
    bad = [row for row in rejected if row.reason not in SET_ASIDE]
    read = good + len(rejected)
    examples = "; ".join(f"{row.source}: {row.reason} ({row.detail})" for row in (bad or rejected)[:3])
    if len(bad) > limit * read:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(row.reason for row in bad).most_common())
        raise DataError(
            f"{path}: {len(bad)} of {read} rows ({len(bad) / read:.1%}) are malformed, more than data.max_bad_rows = "
            f"{limit:.1%} allows: {reasons}. First: {examples}. Repair them, or raise data.max_bad_rows."
        )
    if not good:
        raise DataError(f"{path}: none of its {read} rows can be used. First: {examples}.")


def _content(row: PreferencePair | Prompt) -> tuple[str, str, str]:
    """A key that orders rows by all they hold but their place in a file."""
    return row.id, row.kind, repr(replace(row, source=""))


def _unique(found: _Found[T], key: Callable[[T], str]) -> list[tuple[DataSource, T]]:
    """Good rows without repetitions, which join the rejected ones."""
    first: dict[str, str] = {}
    kept = []
    for source, row in found.rows:
        place = str(getattr(row, "source", ""))
        if key(row) in first:
            found.rejected.append(RejectedRow(place, "duplicate", f"same as {first[key(row)]}"))
        else:
            first[key(row)] = place
            kept.append((source, row))
    return kept


def _split(
    rows: Sequence[tuple[DataSource, T]], section: DataSection, seed: int, key: Callable[[T], tuple[str, str]]
) -> tuple[list[T], list[T]]:
    """Training rows, as often as their source's weight says, and held-out rows; ``key``: row id and prompt hash."""
    train: list[T] = []
    held_out: list[T] = []
    for source, row in rows:
        row_id, prompt = key(row)
        if _fraction("held_out", prompt) < section.held_out:
            held_out.append(row)
        else:
            train += [row] * _times(source.weight, row_id, seed)
    return train, held_out


def _times(weight: float, row_id: str, seed: int) -> int:
    whole = int(weight)
    return whole + (_fraction("weight", str(seed), row_id) < weight - whole)


def _fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on ``parts`` alone, on every machine and in every process."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:6], "big") / 2**48
