"""Judges: who scores an answer of a conversation, and what an error of theirs is worth (never a score)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from direct_rlhf.errors import Interrupted
from direct_rlhf.evaluate.records import Status
from direct_rlhf.evaluate.verdicts import HIGHEST, LOWEST
from direct_rlhf.recipe.schema import ConversationSection


@dataclass(frozen=True)
class Judgment:
    """One verdict. ``score`` is 1-10, and None unless the status is `scored`; ``reason`` is in words."""

    score: float | None
    status: Status
    reason: str

    def __post_init__(self) -> None:
        if (self.status == "scored") != (self.score is not None):
            raise ValueError(f"a judgment has a score if and only if its status is scored: {self}")


class Judge(Protocol):
    """Scores one answer of a conversation."""

    @property
    def name(self) -> str: ...

    def judge(self, item: dict[str, Any], turn: int, answers: Sequence[str], finished: Sequence[bool]) -> Any:
        """The verdict on ``answers[turn]`` (turn 0 is the first), given the question's row and the answers so far.

        Returns a Judgment or a mapping with its three fields. ``finished`` is False for an answer that the cap cut.
        """


@dataclass(frozen=True)
class Asked:
    """The answer to one turn (0 is the first), with the question's row and the answers up to it."""

    question: dict[str, Any]
    turn: int
    answers: tuple[str, ...]
    finished: tuple[bool, ...]


@runtime_checkable
class JudgesMany(Protocol):
    """A judge that is quicker with many answers at once (a server, a model)."""

    def judge_all(self, asked: Sequence[Asked]) -> list[Judgment]:
        """One checked verdict each, in order. Errors: JudgeError and Interrupted; what was judged is kept."""


def ask_all(judge: Judge, asked: Sequence[Asked], should_stop: Callable[[], bool]) -> list[Judgment]:
    """A checked verdict on each answer. Errors: Interrupted when asked to stop."""
    if isinstance(judge, JudgesMany):
        return judge.judge_all(asked)
    verdicts = []
    for one in asked:
        verdicts.append(ask(judge, one.question, one.turn, one.answers, one.finished))
        if should_stop():
            raise Interrupted("the judging was stopped on request; it starts again on resume")
    return verdicts


def ask(judge: Judge, item: dict[str, Any], turn: int, answers: Sequence[str], finished: Sequence[bool]) -> Judgment:
    """The judge's verdict, checked. A judge that raises, or whose score is outside 1-10, gives a failed judgment."""
    try:
        verdict = judge.judge(item, turn, answers, finished)
        if isinstance(verdict, Mapping):
            verdict = Judgment(verdict["score"], verdict["status"], str(verdict["reason"]))
    except Exception as error:  # whatever a judge does, its error must not become a score or end the evaluation
        return Judgment(None, "failed", f"judge_error: {type(error).__name__}: {error}"[:300])
    if not isinstance(verdict, Judgment) or verdict.status not in ("scored", "failed", "unparsed"):
        return Judgment(None, "failed", f"judge_error: no verdict but {str(verdict)[:200]}")
    if verdict.status != "scored":
        return Judgment(None, verdict.status, verdict.reason or "no_reason_given")
    score = verdict.score
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        return Judgment(None, "unparsed", f"score_is_no_number: {str(score)[:100]}")
    if not LOWEST <= score <= HIGHEST:
        return Judgment(None, "unparsed", f"score_out_of_range: {score}")
    return Judgment(float(score), "scored", verdict.reason)


def load_judge(section: ConversationSection) -> Judge:
    """The judge that the recipe names, if it needs nothing but its rules; `judging.py` makes those that are asked."""
    from direct_rlhf.world.judge import ScriptedJudge

    judges = {"scripted": ScriptedJudge}
    return judges[section.judge]()
