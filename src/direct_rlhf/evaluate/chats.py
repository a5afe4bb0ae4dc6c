"""Who can be asked for a judgment: what is sent, what comes back, and two of the three that answer.

endpoint.py    a server that speaks the OpenAI protocol
RecordedChat   replies of an earlier run, found by the request
LocalChat      a model on this machine
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from direct_rlhf.data.types import Turn, Turns
from direct_rlhf.errors import DataError
from direct_rlhf.recipe.schema import DialogueSection, JudgeSection
from direct_rlhf.run.atomic import read_jsonl

if TYPE_CHECKING:
    from direct_rlhf.data.dialogue import DialogueFormat

Role = Literal["system", "user", "assistant"]
_ROLES: Mapping[str, Literal["system", "human", "assistant"]] = {
    "system": "system",
    "user": "human",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Request:
    """The messages that a judge is sent."""

    messages: tuple[tuple[Role, str], ...]

    @cached_property
    def sha256(self) -> str:
        return digest(self.messages)

    def then(self, reply: str, user: str) -> "Request":
        """The same, the judge's reply and one more message; where the reply is empty, one longer message."""
        if reply.strip():
            return Request((*self.messages, ("assistant", reply), ("user", user)))
        role, text = self.messages[-1]
        return Request((*self.messages[:-1], (role, f"{text}\n\n{user}")))


@dataclass(frozen=True)
class Reply:
    """What came back. ``failure`` is a short fixed word, and then there is no text; ``detail`` says more."""

    text: str = ""
    finish: str = ""  # stop; length where the judge's own cap cut it; content_filter
    failure: str = ""
    detail: str = ""
    cost: float = 0.0  # money, in the unit of the recipe's prices


Keep = Callable[[int, Reply], None]  # is told each reply, with the index of its request; from any thread


class Chat(Protocol):
    """Answers requests."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a reply depends on beside the request: model and decoding."""

    def replies(self, requests: Sequence[Request], keep: Keep) -> list[Reply]:
        """The replies, in the order of the requests; each goes to ``keep`` as soon as it is there.

        Errors: JudgeError where going on is of no use or not allowed, Interrupted when asked to stop.
        """


def digest(value: Any) -> str:
    """SHA-256 of ``value`` as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class RecordedChat:
    """Replies from judgment files of earlier runs; a request that no line answers fails."""

    def __init__(self, path: Path) -> None:
        """Errors: DataError for a file without replies."""
        self.name = f"recorded ({path.name})"
        self._replies: dict[str, Reply] = {}
        for number, row in enumerate(read_jsonl(path), 1):
            if (
                not isinstance(row, dict)
                or not isinstance(row.get("request"), str)
                or not isinstance(row.get("reply"), str)
            ):
                raise DataError(
                    f"{path}: line {number} is no recorded reply. A line has request (SHA-256 of the messages) and "
                    "reply; take a judgments.jsonl that a run has written."
                )
            self._replies[row["request"]] = Reply(row["reply"], str(row.get("finish", "stop")))
        if not self._replies:
            raise DataError(f"{path}: holds no replies. Take a judgments.jsonl that a run has written.")
        self.identity = {"recorded": hashlib.sha256(path.read_bytes()).hexdigest()}

    def replies(self, requests: Sequence[Request], keep: Keep) -> list[Reply]:
        found = [self._replies.get(request.sha256, Reply(failure="not_recorded")) for request in requests]
        for index, reply in enumerate(found):
            keep(index, reply)
        return found


class LocalChat:
    """A model of this machine, asked through its chat template where it has one, else as plain dialogue."""

    def __init__(
        self,
        section: JudgeSection,
        *,
        dtype: str,
        device: str,
        seed: int,
        folder: Path | None,
        should_stop: Callable[[], bool],
        report: Callable[[str], None],
    ) -> None:
        self.name = f"local ({section.model})"
        self._section, self._dtype, self._device, self._seed, self._folder = section, dtype, device, seed, folder
        self._should_stop, self._report = should_stop, report

    @cached_property
    def _loaded(self) -> tuple[Any, "DialogueFormat"]:
        """Model and dialogue format; loaded when they are first needed."""
        from direct_rlhf.data.dialogue import DialogueFormat
        from direct_rlhf.data.tokens import load_tokens
        from direct_rlhf.models.loading import load_causal_lm

        ref = str(self._section.model)
        tokens = load_tokens(ref, folder=self._folder)
        form = DialogueFormat(DialogueSection(format="chat_template" if tokens.chat_template else "plain"), tokens)
        return load_causal_lm(ref, dtype=self._dtype, device=self._device), form

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        from direct_rlhf.models.loading import parameters_sha256

        model, form = self._loaded
        return {
            "local": parameters_sha256(model),
            "tokenizer": form.tokens.sha256,
            "template": form.section.format,
            "temperature": self._section.temperature or 0.0,
            "max_tokens": self._section.max_tokens,
            "seed": self._seed,
        }

    @cached_property
    def _takes_system(self) -> bool:
        """Some chat templates refuse a system turn."""
        try:
            self._loaded[1].prompt_text((Turn("system", "s"), Turn("human", "h")))
        except DataError:
            return False
        return True

    def _turns(self, request: Request) -> Turns:
        turns = tuple(Turn(_ROLES[role], text.strip()) for role, text in request.messages)
        if turns[0].role != "system" or self._takes_system:
            return turns
        return (Turn("human", f"{turns[0].text}\n\n{turns[1].text}"), *turns[2:])

    def replies(self, requests: Sequence[Request], keep: Keep) -> list[Reply]:
        from direct_rlhf.evaluate.generate import Ask, generate
        from direct_rlhf.evaluate.trees import context_length
        from direct_rlhf.models.memory import ChunkSize

        model, form = self._loaded
        room = context_length(model) - self._section.max_tokens
        batch = ChunkSize("judge", self._section.batch_size, self._report)
        asks: list[tuple[int, Ask]] = []
        found: dict[int, Reply] = {}

        def take(index: int, reply: Reply) -> None:
            found[index] = reply
            keep(index, reply)

        for index, request in enumerate(requests):
            turns = self._turns(request)
            fitted = form.fit(turns, room)
            if fitted is None or fitted[0] != turns:
                take(index, Reply(failure="prompt_too_long"))
            else:
                asks.append((index, Ask(tuple(fitted[1]), request.sha256)))
        while asks:
            now, asks = asks[: batch.size], asks[batch.size :]
            answers = generate(
                model,
                form.tokens,
                [ask for _, ask in now],
                max_new_tokens=self._section.max_tokens,
                temperature=self._section.temperature or 0.0,
                stop_strings=form.stop_strings,
                batch=batch,
                seed=self._seed,
                should_stop=self._should_stop,
            )
            for (index, _), answer in zip(now, answers, strict=True):
                finish = "length" if answer.finish == "length" else "stop"
                take(index, Reply(failure=answer.failure) if answer.failure else Reply(answer.text, finish))
        return [found[index] for index in range(len(requests))]
