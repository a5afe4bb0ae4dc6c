"""Multi-turn conversations: each turn follows the model's own earlier answers, and a judge scores every answer.

A question's turns are one unit of resampling. An item is one turn: id QUESTION:TURN (turns from 1), value 1-10.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.rows import read_rows
from direct_rlhf.data.types import Turn, Turns
from direct_rlhf.errors import DataError, Interrupted
from direct_rlhf.evaluate.generate import Answer, Ask, generate
from direct_rlhf.evaluate.judge import Judge, ask
from direct_rlhf.evaluate.records import Item, Summary
from direct_rlhf.evaluate.statistics import summarise
from direct_rlhf.evaluate.trees import context_length
from direct_rlhf.models.memory import ChunkSize

if TYPE_CHECKING:
    from direct_rlhf.run.context import MakesBars

TASK = "conversation"


@dataclass(frozen=True)
class ConversationResult:
    """Mean scores (1-10), overall, by turn ("1", "2") and by category."""

    summary: Summary
    by_turn: dict[str, Summary]
    by_category: dict[str, Summary]


def read_questions(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows {"id", "category", "turns": [{"prompt", ...}]}, no id twice. DataError names a row that is otherwise."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for row in read_rows(path, str(path)):
        value = row.value or {}
        turns = value.get("turns")
        if row.problem:
            problem = row.problem[1]
        elif not isinstance(value.get("id"), str) or value["id"] in seen:
            problem = "it needs an id, a text that no other row has"
        elif not isinstance(turns, list) or not turns:
            problem = "it needs turns, a list of {prompt}"
        elif not all(isinstance(turn, dict) and str(turn.get("prompt", "")).strip() for turn in turns):
            problem = "each of its turns needs a prompt, a text"
        else:
            seen.add(value["id"])
            rows.append(dict(value))
            continue
        raise DataError(f"{row.source}: not a question ({problem}). Correct the row.")
    if not rows:
        raise DataError(f"{path}: holds no questions. Give a JSONL file with one question a line.")
    return rows[:limit]


def evaluate_conversation(
    model: Any,
    form: DialogueFormat,
    questions: Sequence[dict[str, Any]],
    judge: Judge,
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    draws: int,
    should_stop: Callable[[], bool],
    progress: "MakesBars",
    report: Callable[[str], None],
) -> tuple[ConversationResult, list[Item]]:
    """Ask every question's turns in order and judge each answer.

    An answer is sampled under (seed, question id, turn), so that all models draw the same random numbers. A turn
    whose dialogue does not fit the model fails, and so do the turns after it: they would lack an answer. ``report`` is
    told when a batch did not fit into memory.
    Errors: Interrupted when asked to stop.
    """
    room = context_length(model) - max_new_tokens
    batch = ChunkSize("conversations", batch_size, report)
    dialogues: list[Turns] = [()] * len(questions)
    answers: list[list[Answer]] = [[] for _ in questions]
    items: list[Item] = []
    with progress("conversations", total=sum(len(question["turns"]) for question in questions)) as bar:
        for turn in range(max(len(question["turns"]) for question in questions)):
            asked = [i for i, question in enumerate(questions) if turn < len(question["turns"])]
            asks: list[tuple[int, Ask]] = []
            for i in asked:
                dialogues[i] += (Turn("human", questions[i]["turns"][turn]["prompt"].strip()),)
                prompt_ids = _whole_prompt(form, dialogues[i], room) if not _lost(answers[i]) else None
                if prompt_ids is None:
                    answers[i].append(Answer(failure="turn_before_failed" if _lost(answers[i]) else "prompt_too_long"))
                    bar.advance(1)
                else:
                    asks.append((i, Ask(prompt_ids, str(questions[i]["id"]), turn)))
            generated = generate(
                model,
                form.tokens,
                [one for _, one in asks],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_strings=form.stop_strings,
                batch=batch,
                seed=seed,
                should_stop=should_stop,
                on_done=bar.advance,
            )
            for (i, _), answer in zip(asks, generated, strict=True):
                answers[i].append(answer)
            for i in asked:
                dialogues[i] += (Turn("assistant", answers[i][-1].text.strip()),)
                items.append(_judged(judge, questions[i], turn, answers[i]))
                if should_stop():
                    raise Interrupted("the conversations were stopped on request; they start again on resume")
    return _result(items, draws=draws, seed=seed), items


def _lost(answers: Sequence[Answer]) -> bool:
    return bool(answers) and bool(answers[-1].failure)


def _whole_prompt(form: DialogueFormat, turns: Turns, room: int) -> tuple[int, ...] | None:
    """Ids of the dialogue, or None if it could only be asked without its first turns."""
    fitted = form.fit(turns, room)
    return tuple(fitted[1]) if fitted is not None and fitted[0] == turns else None


def _judged(judge: Judge, question: dict[str, Any], turn: int, answers: Sequence[Answer]) -> Item:
    answer = answers[-1]
    item = Item(
        task=TASK,
        id=f"{question['id']}:{turn + 1}",
        status="failed",
        value=None,
        reason=answer.failure or "not_judged",
        cluster=str(question["id"]),
        extra={
            "turn": turn + 1,
            "category": str(question.get("category", "")),
            "prompt": question["turns"][turn]["prompt"],
        },
    )
    if answer.failure:
        return item
    item = dataclasses.replace(item, output=answer.text, finish=answer.finish)
    verdict = ask(judge, question, turn, [a.text for a in answers], [a.finished for a in answers])
    if verdict.status == "failed":
        return dataclasses.replace(item, reason="judge_failed", extra={**item.extra, "verdict": verdict.reason})
    return dataclasses.replace(
        item,
        status=verdict.status,
        value=verdict.score,
        reason="" if verdict.status == "scored" else "judge_unparsed",
        extra={**item.extra, "verdict": verdict.reason},
    )


def _result(items: Sequence[Item], *, draws: int, seed: int) -> ConversationResult:
    groups: dict[str, dict[str, list[Item]]] = {"turn": defaultdict(list), "category": defaultdict(list)}
    for item in items:
        for name, group in groups.items():
            group[str(item.extra[name])].append(item)
    by_turn, by_category = (
        {key: summarise(found, draws=draws, seed=seed) for key, found in sorted(group.items())}
        for group in groups.values()
    )
    return ConversationResult(summarise(items, draws=draws, seed=seed), by_turn, by_category)
