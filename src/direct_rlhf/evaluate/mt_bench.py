"""MT-Bench and other prompt sets of its shape (Vicuna's 80 questions): questions, reference answers, judge prompts.

The files are FastChat's, or what follows their shape:

    questions    {"question_id", "category", "turns": [text, ...]}
    references   {"question_id", "model_id", "choices": [{"turns": [text, ...]}]}
    prompts      {"name", "type": "single" | "pairwise", "system_prompt", "prompt_template"}

The `reference` field that 39 of MT-Bench's questions carry is not used: references are the 30 answers of GPT-4, of
which 13 are reported wrong in at least one turn (FastChat PR #3158); items that are judged by one of these say so.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from direct_rlhf.data.rows import read_rows
from direct_rlhf.errors import DataError
from direct_rlhf.evaluate.verdicts import delimiters
from direct_rlhf.recipe.references import HubReference

Row = dict[str, Any]
TEMPERATURE: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "stem": 0.1,
    "humanities": 0.1,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
}
OTHER_TEMPERATURE = 0.7  # FastChat's for every other category
WITH_REFERENCE = ("math", "reasoning", "coding")  # categories that are judged against a reference answer
BAD_REFERENCES = frozenset(map(str, (104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130)))
TURNS = 2  # what the judge prompts have fields for

_FIELD = re.compile(r"\{(\w+)\}")
_FIELDS: Mapping[tuple[str, bool], frozenset[str]] = {  # (type, two turns) -> fields that a prompt must have
    ("single", False): frozenset({"question", "answer"}),
    ("single", True): frozenset({"question_1", "question_2", "answer_1", "answer_2"}),
    ("pairwise", False): frozenset({"question", "answer_a", "answer_b"}),
    ("pairwise", True): frozenset({"question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"}),
}


def temperature(category: str) -> float:
    """The sampling temperature that the protocol gives a category."""
    return TEMPERATURE.get(category, OTHER_TEMPERATURE)


def as_question(row: Mapping[str, Any]) -> Row:
    """A question in this project's shape, {"id", "category", "turns": [{"prompt"}]}; others come back as they are."""
    number = row.get("question_id", row.get("prompt_id"))
    turns = row.get("turns", row.get("prompt"))  # the second names: the copy on the Hugging Face hub
    if "id" in row or isinstance(number, bool) or not isinstance(number, int | str) or not isinstance(turns, list):
        return dict(row)
    prompts = [{"prompt": turn} if isinstance(turn, str) else turn for turn in turns]
    return {"id": str(number), "category": str(row.get("category", "")), "turns": prompts}


def with_references(questions: Sequence[Row], place: Path | HubReference) -> list[Row]:
    """The questions, those of WITH_REFERENCE with `reference` (one text a turn) and `reference_ok`.

    Errors: DataError for a file that holds no references, or lacks one that is needed.
    """
    found: dict[str, tuple[list[str], bool]] = {}
    for source, row in _good_rows(place):
        number, choices = row.get("question_id"), row.get("choices")
        turns = (
            choices[0].get("turns") if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        )
        if number is None or not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise DataError(
                f'{source}: no reference answer. A row looks like {{"question_id": 101, "choices": [{{"turns": '
                '["...", "..."]}]}. Correct the row.'
            )
        bad = row.get("model_id") == "gpt-4" and str(number) in BAD_REFERENCES
        found[str(number)] = (turns, not bad)
    complete = []
    for question in questions:
        if question.get("category") not in WITH_REFERENCE:
            complete.append(question)
            continue
        turns, ok = found.get(question["id"], ([], False))
        if len(turns) < len(question["turns"]):
            raise DataError(
                f"{place}: question {question['id']} ({question['category']}) has {len(question['turns'])} turns, and "
                f"there are {len(turns)} reference answers for it. Add them, or leave "
                "evaluation.conversation.references out to judge without."
            )
        complete.append({**question, "reference": turns, "reference_ok": ok})
    return complete


@dataclass(frozen=True)
class JudgePrompt:
    """One prompt for a judge; ``{field}`` stands for a text."""

    name: str
    system: str
    template: str

    @property
    def marks(self) -> tuple[str, ...]:
        return delimiters(self.template)

    def fill(self, texts: Mapping[str, str]) -> str:
        """The user message. Fields are filled in one pass: what an answer holds in braces stays as it is."""
        return _FIELD.sub(lambda found: texts[found[1]], self.template)


@dataclass(frozen=True)
class JudgePrompts:
    """The prompts of a file by what they are for: (type, with reference, two turns)."""

    by_use: Mapping[tuple[str, bool, bool], JudgePrompt]
    source: str

    def choose(self, kind: Literal["single", "pairwise"], *, reference: bool, turn: int) -> JudgePrompt:
        """The prompt for the answer to ``turn`` (0 is the first). DataError if the file has none for this."""
        prompt = self.by_use.get((kind, reference, turn > 0))
        if prompt is None:
            raise DataError(
                f"{self.source}: no {kind} prompt {'with' if reference else 'without'} a reference answer for "
                f"{'two turns' if turn else 'one turn'}. Add one, or take FastChat's judge_prompts.jsonl."
            )
        return prompt

    def check(self, questions: Sequence[Row], kinds: Sequence[Literal["single", "pairwise"]]) -> None:
        """Errors: DataError if a question has too many turns or a prompt for it is missing."""
        for question in questions:
            if len(question["turns"]) > TURNS:
                raise DataError(
                    f"question {question['id']} has {len(question['turns'])} turns; judge prompts know {TURNS}. "
                    "Shorten it, or use a judge that needs no prompt."
                )
            for kind in kinds:
                for turn in range(len(question["turns"])):
                    self.choose(kind, reference="reference" in question, turn=turn)


def read_judge_prompts(place: Path | HubReference) -> JudgePrompts:
    """Judge prompts by their fields, not by their labels (`pair-math-v1-multi-turn` is labelled `general`).

    Errors: DataError for a row that is no prompt, or two of one kind.
    """
    found: dict[tuple[str, bool, bool], list[JudgePrompt]] = defaultdict(list)
    for source, row in _good_rows(place):
        kind, template, system = (row.get(key) for key in ("type", "prompt_template", "system_prompt"))
        if kind not in ("single", "pairwise") or not isinstance(template, str) or not isinstance(system, str):
            raise DataError(
                f"{source}: no judge prompt. It needs type (single or pairwise), system_prompt and prompt_template."
            )
        fields = frozenset(_FIELD.findall(template))
        two_turns = "question_2" in fields
        references = {field for field in fields if field.startswith("ref_answer_")}
        needed = _FIELDS[kind, two_turns]
        allowed = {"ref_answer_1", "ref_answer_2"} if two_turns else {"ref_answer_1"}
        if fields - references != needed or not references <= allowed:
            raise DataError(
                f"{source}: its fields are {', '.join(sorted(fields)) or 'none'}; a {kind} prompt for "
                f"{'two turns' if two_turns else 'one turn'} has {', '.join(sorted(needed))}, and "
                f"{', '.join(sorted(allowed))} if it shows references."
            )
        name = str(row.get("name") or source)
        found[kind, bool(references), two_turns].append(JudgePrompt(name, system, template))
    for prompts in found.values():
        if len(prompts) > 1:
            raise DataError(
                f"{place}: {' and '.join(prompt.name for prompt in prompts)} are for the same use. Keep one of them."
            )
    return JudgePrompts({use: prompts[0] for use, prompts in found.items()}, str(place))


def _good_rows(place: Path | HubReference) -> list[tuple[str, Mapping[str, Any]]]:
    rows = []
    for row in read_rows(place, str(place)):
        if row.value is None:
            raise DataError(
                f"{row.source}: cannot be read ({row.problem[1] if row.problem else 'empty'}). Correct the row."
            )
        rows.append((row.source, row.value))
    if not rows:
        raise DataError(f"{place}: holds no rows. Give a JSONL file.")
    return rows
