"""A judge that is asked in words: cases become requests, replies become verdicts, each paid for once.

A reply without a verdict (also one that the judge's own cap cut) is followed by one request for the verdict alone; if
that brings none either, the case has failed and is counted, never scored.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from direct_rlhf.evaluate.chats import Chat, Reply, Request, digest
from direct_rlhf.evaluate.judge import Asked, Judgment
from direct_rlhf.evaluate.judgments import Kept
from direct_rlhf.evaluate.mt_bench import JudgePrompt, JudgePrompts
from direct_rlhf.evaluate.verdicts import neutralise, parse_score

if TYPE_CHECKING:
    from direct_rlhf.run.context import MakesBars

V = TypeVar("V")
NO_VERDICT = "no_verdict"
SCORE_ALONE = "Now give your final rating alone, as [[rating]] with a number from 1 to 10, and nothing else."
CHOICE_ALONE = "Now give your final verdict alone, as [[A]], [[B]] or [[C]], and nothing else."


@dataclass(frozen=True)
class Case:
    """One thing to be judged. ``key`` names all that the judgment depends on beside the judge."""

    request: Request
    key: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)  # for people: question, turn, order


@dataclass(frozen=True)
class Opinion(Generic[V]):
    """What a judge said of a case. ``failure`` is a short fixed word, and then there is no value."""

    value: V | None
    reply: str
    failure: str = ""


@dataclass(frozen=True)
class Panel:
    """Somebody to ask, where replies are kept, and how progress is shown."""

    chat: Chat
    kept: Kept
    progress: "MakesBars"

    def ask(self, cases: Sequence[Case], parse: Callable[[str], V | None], alone: str, title: str) -> list[Opinion[V]]:
        """One opinion a case, in order. ``alone`` asks for the verdict without its reasons.

        Errors: JudgeError and Interrupted of the one who is asked; replies that were there are kept.
        """
        with self.progress(title, total=len(cases)) as bar:
            first = self._replies([case.request for case in cases], cases, 0, bar.advance)
            again = [i for i, reply in enumerate(first) if not reply.failure and _verdict(reply, parse) is None]
            second = dict(
                zip(
                    again,
                    self._replies(
                        [cases[i].request.then(first[i].text, alone) for i in again], [cases[i] for i in again], 1
                    ),
                    strict=True,
                )
            )
        return [_opinion(reply, second.get(i), parse) for i, reply in enumerate(first)]

    def _replies(
        self,
        requests: Sequence[Request],
        cases: Sequence[Case],
        step: int,
        on_done: Callable[[int], object] = lambda n: None,
    ) -> list[Reply]:
        """Replies that are kept, and those that are asked for now. A failed request is not kept: it may do later."""
        keys = [digest({"judge": self.chat.identity, "step": step, **case.key}) for case in cases]
        found: dict[int, Reply] = {}
        for i, key in enumerate(keys):
            row = self.kept.get(key)
            if row is not None:
                found[i] = Reply(row["reply"], row["finish"], cost=row["cost"])
        on_done(len(found))
        missing = [i for i in range(len(cases)) if i not in found]
        lock = threading.Lock()

        def keep(index: int, reply: Reply) -> None:
            i = missing[index]
            if not reply.failure:
                row = {"request": requests[i].sha256, **cases[i].about, "step": step, "judge": self.chat.name}
                self.kept.put(keys[i], {**row, "reply": reply.text, "finish": reply.finish, "cost": reply.cost})
            with lock:
                on_done(1)

        if missing:
            found |= dict(zip(missing, self.chat.replies([requests[i] for i in missing], keep), strict=True))
        return [found[i] for i in range(len(cases))]


def _verdict(reply: Reply, parse: Callable[[str], V | None]) -> V | None:
    """None for a reply that was cut: its last bracket need not be its verdict."""
    return parse(reply.text) if reply.finish == "stop" else None


def _opinion(first: Reply, second: Reply | None, parse: Callable[[str], V | None]) -> Opinion[V]:
    last = second or first
    if last.failure:
        return Opinion(None, first.text, f"{last.failure}: {last.detail}".rstrip(": "))
    value = _verdict(last, parse)
    text = first.text if second is None else f"{first.text}\n\n{second.text}"
    return Opinion(value, text, "" if value is not None else NO_VERDICT)


def conversation_texts(
    question: Mapping[str, Any], turn: int, answers: Mapping[str, Sequence[str]], prompt: JudgePrompt
) -> dict[str, str]:
    """The fields of a judge prompt. ``answers`` by what follows `answer` in a field's name: "" or "_a" and "_b"."""
    texts = {"question": question["turns"][turn]["prompt"]}
    for number in range(turn + 1):
        texts[f"question_{number + 1}"] = question["turns"][number]["prompt"]
    for suffix, said in answers.items():
        shown = [neutralise(answer, prompt.marks) for answer in said]
        texts[f"answer{suffix}"] = shown[turn]
        texts |= {f"answer{suffix}_{number + 1}": answer for number, answer in enumerate(shown[: turn + 1])}
    for number, reference in enumerate(question.get("reference", ())):
        texts[f"ref_answer_{number + 1}"] = reference
    return texts


def make_case(
    prompts: JudgePrompts,
    kind: Literal["single", "pairwise"],
    question: Mapping[str, Any],
    turn: int,
    answers: Mapping[str, Sequence[str]],
    *,
    models: Sequence[str],
    about: Mapping[str, Any],
) -> Case:
    """The request on the answers to ``turn``, keyed by all that goes into it; ``models`` wrote the answers."""
    prompt = prompts.choose(kind, reference="reference" in question, turn=turn)
    user = prompt.fill(conversation_texts(question, turn, answers, prompt))
    system: tuple[tuple[Literal["system"], str], ...] = (("system", prompt.system),) if prompt.system.strip() else ()
    return Case(
        Request((*system, ("user", user))),
        {
            "question": question["id"],
            "asked": [each["prompt"] for each in question["turns"][: turn + 1]],
            "turn": turn,
            "models": list(models),
            "answers": {
                suffix: list(said[: turn + 1]) for suffix, said in answers.items()
            },  # which is where: the order
            "reference": list(question.get("reference", ())),
            "prompt": [prompt.name, prompt.system, prompt.template],
        },
        {"question": question["id"], "turn": turn + 1, "prompt": prompt.name, **about},
    )


class PromptedJudge:
    """Scores answers from 1 to 10 by the `single` prompts."""

    def __init__(self, panel: Panel, prompts: JudgePrompts, model: str) -> None:
        """``model`` names who wrote the answers, in the key of each judgment."""
        self.name = panel.chat.name
        self._panel, self._prompts, self._model = panel, prompts, model

    def judge_all(self, asked: Sequence[Asked]) -> list[Judgment]:
        cases = [
            make_case(
                self._prompts, "single", one.question, one.turn, {"": one.answers}, models=[self._model], about={}
            )
            for one in asked
        ]
        opinions = self._panel.ask(cases, parse_score, SCORE_ALONE, "judgments")
        return [
            Judgment(opinion.value, "scored", opinion.reply)
            if opinion.value is not None
            else Judgment(None, "failed", f"{opinion.failure} {opinion.reply}".strip())
            for opinion in opinions
        ]

    def judge(self, item: dict[str, Any], turn: int, answers: Sequence[str], finished: Sequence[bool]) -> Judgment:
        return self.judge_all([Asked(item, turn, tuple(answers), tuple(finished))])[0]
