"""Sampled answers for the suites, in which one bad answer does not cost the others."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import DivergenceError
from direct_rlhf.evaluate.scoring import score_continuations
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.rollout.native import sample
from direct_rlhf.rollout.types import Rollout, SampleKey, SamplingSettings


@dataclass(frozen=True)
class Ask:
    """One answer to sample. ``id``, ``turn`` and ``index`` name its random stream, equally for every model."""

    prompt_ids: tuple[int, ...]
    id: str
    turn: int = 0
    index: int = 0  # which of several answers to the same prompt


@dataclass(frozen=True)
class Answer:
    """What came back. ``failure`` is a short fixed word, and then there is no text."""

    text: str = ""
    ids: tuple[int, ...] = ()  # response ids, a closing EOS included
    finish: str = ""  # eos, stop or length
    failure: str = ""

    @property
    def finished(self) -> bool:
        return self.finish in ("eos", "stop")


def generate(
    model: Any,
    tokens: Tokens,
    asks: Sequence[Ask],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_strings: Sequence[str],
    batch: ChunkSize,
    seed: int,
    should_stop: Callable[[], bool] | None = None,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """One answer each, in order. A prompt at which the model's numbers are not finite gets a failed answer.

    At most ``batch.size`` answers are sampled at once. ``on_done`` is told how many answers are finished: below 0 where
    a batch that ran out of memory is sampled again.
    Errors: Interrupted when asked to stop; OutOfMemoryError where one answer does not fit.
    """
    settings = SamplingSettings(max_new_tokens, temperature, tuple(stop_strings))

    def draw(waiting: Sequence[int]) -> dict[int, Answer]:
        """Answers to the first batch of the rows that wait."""
        ended = 0

        def on_step(n: int) -> None:
            nonlocal ended
            ended += n
            on_done(n)

        def attempt(size: int) -> dict[int, Answer]:
            if ended:
                on_step(-ended)
            rows = waiting[:size]
            rollout = sample(
                model,
                tokens,
                [asks[row].prompt_ids for row in rows],
                [SampleKey(seed, asks[row].id, asks[row].turn, asks[row].index) for row in rows],
                settings,
                should_stop=should_stop,
                on_step=on_step,
            )
            return dict(zip(rows, _answers(rollout), strict=True))

        return batch.run(attempt)

    waiting = sorted(range(len(asks)), key=lambda row: -len(asks[row].prompt_ids))
    answers: dict[int, Answer] = {}
    while waiting:
        drawn: dict[int, Answer] = {}
        with suppress(DivergenceError):
            drawn = draw(waiting)
        answers |= drawn or _draw_around_the_bad(model, tokens, {row: asks[row] for row in waiting}, batch, draw)
        waiting = [row for row in waiting if row not in answers]
    return [answers[row] for row in range(len(asks))]


def _draw_around_the_bad(
    model: Any,
    tokens: Tokens,
    asks: Mapping[int, Ask],
    batch: ChunkSize,
    draw: Callable[[Sequence[int]], dict[int, Answer]],
) -> dict[int, Answer]:
    """Answers one by one, but only where the model gives numbers at all: a broken model fails fast."""
    scores = score_continuations(
        model, [(ask.prompt_ids, (tokens.eos_id,)) for ask in asks.values()], batch=batch, share=False
    )
    answers = {}
    for row, score in zip(asks, scores, strict=True):
        answers[row] = Answer(failure="non_finite")
        if math.isfinite(score.logprob):
            try:
                answers |= draw([row])
            except DivergenceError:
                continue  # it stays failed
    return answers


def _answers(rollout: Rollout) -> list[Answer]:
    lengths = rollout.response_mask_BT.sum(dim=1).tolist()
    return [
        Answer(text, tuple(ids[:length]), str(finish.value))
        for text, ids, length, finish in zip(
            rollout.texts, rollout.response_ids_BT.tolist(), lengths, rollout.finish, strict=True
        )
    ]
