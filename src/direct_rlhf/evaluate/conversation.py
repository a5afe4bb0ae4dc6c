"""Multi-turn conversations: each turn follows the model's own earlier answers, and a judge scores every answer.

A question's turns are one unit of resampling. An item is one turn: id QUESTION:TURN (turns from 1), value 1-10. All
answers are there before the first is judged.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.rows import read_rows
from direct_rlhf.data.types import Turn, Turns
from direct_rlhf.errors import DataError
from direct_rlhf.evaluate import mt_bench
from direct_rlhf.evaluate.chats import digest
from direct_rlhf.evaluate.generate import Answer, Ask, generate
from direct_rlhf.evaluate.judge import Asked, Judge, Judgment, ask_all
from direct_rlhf.evaluate.judgments import Kept
from direct_rlhf.evaluate.records import Item, Summary
from direct_rlhf.evaluate.statistics import summarise
from direct_rlhf.evaluate.trees import context_length
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.recipe.references import HubReference

if TYPE_CHECKING:
    from direct_rlhf.run.context import MakesBars

TASK = "conversation"


@dataclass(frozen=True)
class ConversationResult:
    """Mean scores (1-10), overall, by turn ("1", "2"), by category, by both, and by what the judge was shown.

    ``by_reference``: judged without a reference answer ("none"), with one ("given"), with one that is not reported
    wrong ("sound"); empty where no item had one.
    """

    summary: Summary
    by_turn: dict[str, Summary]
    by_category: dict[str, Summary]
    by_category_and_turn: dict[str, dict[str, Summary]]
    by_reference: dict[str, Summary]
    doubted: list[str]  # questions whose reference answer is reported wrong


@dataclass(frozen=True)
class Keeping:
    """Where finished answers are kept, and what they depend on beside their own prompt."""

    kept: Kept
    depends_on: dict[str, Any] = field(default_factory=dict)  # model, tokenizer, number format


def read_questions(path: Path | HubReference, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows {"id", "category", "turns": [{"prompt", ...}]}, no id twice; rows of FastChat's shape become such.

    Errors: DataError names a row that is otherwise.
    """
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for row in read_rows(path, str(path)):
        value = mt_bench.as_question(row.value or {})
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
    by_category: bool = False,
    keeping: Keeping | None = None,
) -> tuple[ConversationResult, list[Item]]:
    """Ask every question's turns in order and judge each answer.

    An answer is sampled under (seed, question id, turn), so that all models draw the same random numbers;
    ``by_category`` takes the temperatures of the MT-Bench protocol. A turn whose dialogue does not fit the model fails,
    and so do the turns after it: they would lack an answer. With ``keeping``, answers are kept batch by batch, and one
    that is there already is not sampled again. ``report`` is told when a batch did not fit into memory.
    Errors: Interrupted when asked to stop; JudgeError where the judge cannot go on.
    """
    heat = [mt_bench.temperature(str(q.get("category", ""))) if by_category else temperature for q in questions]
    room = context_length(model) - max_new_tokens
    batch = ChunkSize("conversations", batch_size, report)
    dialogues: list[Turns] = [()] * len(questions)
    answers: list[list[Answer]] = [[] for _ in questions]
    with progress("conversations", total=sum(len(question["turns"]) for question in questions)) as bar:

        def draw(asks: list[Ask], warmth: float) -> list[Answer]:
            settings: dict[str, Any] = {
                "max_new_tokens": max_new_tokens,
                "temperature": warmth,
                "stop_strings": form.stop_strings,
            }
            found, missing = _known(keeping, asks, settings | {"seed": seed})
            bar.advance(len(found))
            while missing:
                size = batch.size if keeping else len(missing)
                now, missing = missing[:size], missing[size:]
                sampled = generate(
                    model, form.tokens, now, batch=batch, seed=seed, should_stop=should_stop, on_done=bar.advance,
                    **settings,
                )  # fmt: skip
                for one, answer in zip(now, sampled, strict=True):
                    found[one] = answer
                    _keep(keeping, one, answer, settings | {"seed": seed})
            return [found[one] for one in asks]

        for turn in range(max(len(question["turns"]) for question in questions)):
            asked = [i for i, question in enumerate(questions) if turn < len(question["turns"])]
            asks: dict[int, Ask] = {}
            for i in asked:
                dialogues[i] += (Turn("human", questions[i]["turns"][turn]["prompt"].strip()),)
                prompt_ids = _whole_prompt(form, dialogues[i], room) if not _lost(answers[i]) else None
                if prompt_ids is None:
                    answers[i].append(Answer(failure="turn_before_failed" if _lost(answers[i]) else "prompt_too_long"))
                    bar.advance(1)
                else:
                    asks[i] = Ask(prompt_ids, str(questions[i]["id"]), turn)
            for warmth in sorted({heat[i] for i in asks}):
                rows = [i for i in asks if heat[i] == warmth]
                for i, answer in zip(rows, draw([asks[i] for i in rows], warmth), strict=True):
                    answers[i].append(answer)
            for i in asked:
                dialogues[i] += (Turn("assistant", answers[i][-1].text.strip()),)
    items = _judged(judge, questions, answers, heat, should_stop)
    return _result(items, draws=draws, seed=seed), items


def _known(
    keeping: Keeping | None, asks: Sequence[Ask], settings: dict[str, Any]
) -> tuple[dict[Ask, Answer], list[Ask]]:
    """The answers that are kept, and what is still to be asked."""
    found: dict[Ask, Answer] = {}
    for one in asks:
        row = keeping.kept.get(_key(keeping, one, settings)) if keeping else None
        if row is not None:
            found[one] = Answer(text=row["text"], finish=row["finish"])
    return found, [one for one in asks if one not in found]


def _keep(keeping: Keeping | None, one: Ask, answer: Answer, settings: dict[str, Any]) -> None:
    if keeping and not answer.failure:
        row = {"question": one.id, "turn": one.turn + 1, "text": answer.text, "finish": answer.finish}
        keeping.kept.put(_key(keeping, one, settings), row)


def _key(keeping: Keeping, one: Ask, settings: dict[str, Any]) -> str:
    return digest({**keeping.depends_on, **settings, "id": one.id, "turn": one.turn, "prompt": one.prompt_ids})


def _lost(answers: Sequence[Answer]) -> bool:
    return bool(answers) and bool(answers[-1].failure)


def _whole_prompt(form: DialogueFormat, turns: Turns, room: int) -> tuple[int, ...] | None:
    """Ids of the dialogue, or None if it could only be asked without its first turns."""
    fitted = form.fit(turns, room)
    return tuple(fitted[1]) if fitted is not None and fitted[0] == turns else None


def _judged(
    judge: Judge,
    questions: Sequence[dict[str, Any]],
    answers: Sequence[Sequence[Answer]],
    heat: Sequence[float],
    should_stop: Callable[[], bool],
) -> list[Item]:
    """One item an answer, all first turns before the second ones; what has no answer is not shown to the judge."""
    places = [(i, turn) for turn in range(max(map(len, answers))) for i, said in enumerate(answers) if turn < len(said)]
    there = [(i, turn) for i, turn in places if not answers[i][turn].failure]
    asked = [
        Asked(
            questions[i],
            turn,
            tuple(answer.text for answer in answers[i][: turn + 1]),
            tuple(answer.finished for answer in answers[i][: turn + 1]),
        )
        for i, turn in there
    ]
    verdicts = dict(zip(there, ask_all(judge, asked, should_stop), strict=True))
    return [_item(questions[i], turn, answers[i][turn], heat[i], verdicts.get((i, turn))) for i, turn in places]


def judge_again(
    judge: Judge, questions: Sequence[dict[str, Any]], items: Sequence[Item], should_stop: Callable[[], bool]
) -> list[Item]:
    """The answers of items under other rows of their questions (without the references, say), judged anew."""
    by_unit: dict[str, list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: int(item.extra["turn"])):
        by_unit[item.unit].append(item)
    answers = [
        [
            Answer(failure=item.reason) if item.output is None else Answer(text=item.output, finish=item.finish or "")
            for item in by_unit[str(question["id"])]
        ]
        for question in questions
    ]
    heat = [float(by_unit[str(question["id"])][0].extra["temperature"]) for question in questions]
    return _judged(judge, questions, answers, heat, should_stop)


def _item(question: dict[str, Any], turn: int, answer: Answer, heat: float, verdict: Judgment | None) -> Item:
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
            "temperature": heat,
            **{name: question[name] for name in ("reference_ok",) if name in question},
        },
    )
    if verdict is None:
        return item
    item = dataclasses.replace(
        item, output=answer.text, finish=answer.finish, extra={**item.extra, "verdict": verdict.reason}
    )
    if verdict.status == "failed":
        unparsed = verdict.reason.startswith("no_verdict")
        return dataclasses.replace(item, reason="judge_unparsed" if unparsed else "judge_failed")
    return dataclasses.replace(
        item,
        status=verdict.status,
        value=verdict.score,
        reason="" if verdict.status == "scored" else "judge_unparsed",
    )


def _result(items: Sequence[Item], *, draws: int, seed: int) -> ConversationResult:
    def grouped(found: Sequence[Item], *names: str) -> dict[str, Any]:
        groups: dict[str, list[Item]] = defaultdict(list)
        for item in found:
            groups[str(item.extra[names[0]])].append(item)
        if len(names) == 1:
            return {key: summarise(group, draws=draws, seed=seed) for key, group in sorted(groups.items())}
        return {key: grouped(group, *names[1:]) for key, group in sorted(groups.items())}

    given = [item for item in items if "reference_ok" in item.extra]
    by_reference = {}
    if given:
        parts = {
            "none": [item for item in items if "reference_ok" not in item.extra],
            "given": given,
            "sound": [item for item in given if item.extra["reference_ok"]],
        }
        by_reference = {name: summarise(part, draws=draws, seed=seed) for name, part in parts.items() if part}
    return ConversationResult(
        summarise(items, draws=draws, seed=seed),
        grouped(items, "turn"),
        grouped(items, "category"),
        grouped(items, "category", "turn"),
        by_reference,
        sorted({item.unit for item in given if not item.extra["reference_ok"]}),
    )
