"""Prompts of the toxicity suite, from our own file or from the field's sets as they come.

A prompt belongs to one of three sets, which say what its answers are measured for (`toxicity.RATES`):

    ours              JSONL {"id", "set", "prompt": text or turns}                     set: as the row says
    AdvBench          CSV goal,target                                                  harmful
    XSTest            CSV id,prompt,type,label                                         safe: harmless; unsafe: harmful
    RealToxicity...   JSONL {"prompt": {"text"}}                                       provoking
    HH                JSONL {"chosen"}: a transcript, up to its last human turn        provoking
    prompts alone     JSONL {"prompt"}, CSV with that column, or text with one a line  provoking

Rows without an id of their own are called FILE-NUMBER, rows of XSTest FILE-ID. gzip of all but text is read too.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.formats import to_prompt
from direct_rlhf.data.rows import read_rows
from direct_rlhf.data.types import RejectedRow, Turns
from direct_rlhf.errors import DataError
from direct_rlhf.evaluate.tables import read_csv
from direct_rlhf.recipe.schema import DialogueSection

SETS = ("provoking", "harmful", "harmless")
HH = DialogueSection()  # its markers are Anthropic's
_XSTEST = {"safe": "harmless", "unsafe": "harmful"}


@dataclass(frozen=True)
class ToxicityPrompt:
    """A dialogue that waits for an answer; ``set`` says what it is for."""

    id: str
    set: str
    turns: Turns


@dataclass(frozen=True)
class _Row:
    """One row on its way; ``problem`` says why it is none."""

    source: str
    id: object
    set: object
    prompt: object
    problem: str = ""


def read_prompts(paths: Path | Sequence[Path], form: DialogueFormat, limit: int | None = None) -> list[ToxicityPrompt]:
    """The prompts of all files, of each file the first ``limit`` of each set.

    Errors: DataError that names the row which is no prompt, or the file that holds none.
    """
    prompts: dict[str, ToxicityPrompt] = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        seen: Counter[str] = Counter()
        for row in _rows(path):
            prompt = _prompt(row, form, prompts)
            seen[prompt.set] += 1
            if limit is None or seen[prompt.set] <= limit:
                prompts[prompt.id] = prompt
        if not seen:
            raise DataError(f"{path}: holds no prompts. Give a JSONL file with one prompt a line.")
    return list(prompts.values())


def _prompt(row: _Row, form: DialogueFormat, others: Mapping[str, ToxicityPrompt]) -> ToxicityPrompt:
    found = to_prompt({"prompt": row.prompt}, "prompt", dialogue=form.section, kind="toxicity", source=row.source)
    if row.problem:
        problem = row.problem
    elif not isinstance(row.id, str) or row.id in others:
        problem = "it needs an id, a text that no other row has"
    elif not isinstance(row.set, str) or row.set not in SETS:
        problem = f"its set must be one of {', '.join(SETS)}"
    elif isinstance(found, RejectedRow):
        problem = found.detail
    else:
        return ToxicityPrompt(row.id, row.set, found.turns)
    raise DataError(f"{row.source}: not a toxicity prompt ({problem}). Correct the row.")


def _rows(path: Path) -> Iterator[_Row]:
    name = path.name.removesuffix(".gz")
    stem, _, suffix = name.rpartition(".")
    if suffix == "csv":
        yield from _csv(path, stem)
    elif suffix == "txt":
        yield from _lines(path, stem)
    else:
        for number, row in enumerate(read_rows(path, str(path)), 1):
            value = row.value or {}
            problem = row.problem[1] if row.problem else ""
            if "set" in value or "id" in value or problem:  # ours
                yield _Row(row.source, value.get("id"), value.get("set"), value.get("prompt"), problem)
            else:
                yield _Row(row.source, f"{stem}-{number}", "provoking", _prompt_in(value))


def _prompt_in(row: Mapping[str, Any]) -> object:
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if isinstance(prompt, Mapping):  # RealToxicityPrompts
        return prompt.get("text")
    if prompt is None and isinstance(chosen, str):  # HH
        before, marker, rest = chosen.rpartition(HH.human)
        return before + marker + rest.partition(HH.assistant)[0] + HH.assistant
    return prompt


def _csv(path: Path, stem: str) -> Iterator[_Row]:
    for number, (source, row) in enumerate(read_csv(path), 1):
        name = f"{stem}-{number}"
        if "goal" in row:
            yield _Row(source, name, "harmful", row["goal"])
        elif "prompt" in row and "label" in row:
            problem = "" if row["label"] in _XSTEST else f"its label is {row['label'][:40]!r}, not safe or unsafe"
            found = _XSTEST.get(row["label"])
            yield _Row(source, f"{stem}-{row.get('id', number)}", found, row["prompt"], problem)
        elif "prompt" in row:
            yield _Row(source, name, "provoking", row["prompt"])
        else:
            raise DataError(
                f"{path}: not a known set of prompts. A CSV needs the columns goal (AdvBench), prompt and label "
                f"(XSTest), or prompt; its header is: {', '.join(row)[:200]}."
            )


def _lines(path: Path, stem: str) -> Iterator[_Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _Row(f"{path}:{number}", f"{stem}-{number}", "provoking", line)
