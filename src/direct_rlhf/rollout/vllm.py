"""Samples from vLLM that end as the native engine's do: token ids in, token ids and log-probabilities out.

The engine is only asked to go on from some tokens. Where an answer ends, what is kept of it and what of that is an
action decide the same `Answers` that decide it for the native engine; the engine stops at EOS and stop strings to save
tokens. Where it stopped too early (its text may break off where ours does not) it is asked to go on.

vLLM draws from its own random stream, seeded by the sample's key, so a sample is not the native engine's. It depends on
its key alone only as far as vLLM's arithmetic does not depend on what runs beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import BackendError
from direct_rlhf.randomness import generator
from direct_rlhf.rollout.answers import Answers
from direct_rlhf.rollout.types import Rollout, SampleKey, SamplingSettings

LOWEST = "0.16"  # the vLLM in which weights can be loaded from a folder while it runs


@dataclass(frozen=True)
class Ask:
    """Go on from ``ids``, the prompt and what there is of the answer."""

    ids: Sequence[int]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Said:
    """What came: at least one token, each with its log-probability (nats, temperature applied)."""

    ids: Sequence[int]
    logprobs: Sequence[float]


class Engine(Protocol):
    """One vLLM, wherever it runs.

    Errors of all methods: BackendError that says what to do; Interrupted once ``should_stop`` says so.
    """

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def load(self, folder: Path, version: str, should_stop: Callable[[], bool]) -> None:
        """When this returns, all its weights are those in ``folder``, and nothing is cached of others."""
        ...

    def replies(
        self, asks: Sequence[Ask], sampling: Mapping[str, Any], vocabulary: int, should_stop: Callable[[], bool]
    ) -> list[Said]:
        """One each, in order. ``sampling`` are vLLM's own parameters, the same for all."""
        ...

    def confirm(self, version: str, should_stop: Callable[[], bool]) -> None:
        """Its weights still are the ones it was given as ``version``, as far as it can tell."""
        ...

    def rest(self) -> bool:
        """Nothing is asked for a while. Whether it keeps its weights."""
        ...

    def close(self) -> None:
        """It is not needed any more."""
        ...


def sample(
    engine: Engine,
    tokens: Tokens,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[SampleKey],
    settings: SamplingSettings,
    *,
    version: str,
    vocabulary: int,
    policy_version: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Rollout:
    """One answer to each prompt, in the order of the prompts; endings as in `native.sample`.

    Args:    ``version`` is what the engine's weights were loaded as; ``vocabulary`` the number of ids it may say.
    Returns: a Rollout on the CPU; its log-probabilities are the engine's.
    Errors:  those of `Engine`; BackendError for a reply that is none.
    """
    answers = Answers(tokens, prompts, keys, settings)
    sampling, cap = parameters(tokens, settings), settings.max_new_tokens
    drawn: dict[int, list[int]] = {row: [] for row in range(len(prompts))}  # of the answers that have not ended
    while drawn:
        rows = list(drawn)
        asks = [
            Ask([*prompts[row], *drawn[row]], cap - len(drawn[row]), seed_of(keys[row], len(drawn[row])))
            for row in rows
        ]
        said = engine.replies(asks, sampling, vocabulary, should_stop)
        drawn = _open_after(answers, dict(zip(rows, said, strict=True)), drawn)
    engine.confirm(version, should_stop)
    return answers.rollout(policy_version, torch.device("cpu"))


def _open_after(answers: Answers, said: dict[int, Said], drawn: dict[int, list[int]]) -> dict[int, list[int]]:
    """Hand the tokens over, one of each answer at a time; what there is of the answers that are still open."""
    still: dict[int, list[int]] = {}
    step = 0
    while said:
        rows = list(said)
        ended = answers.add(
            rows, [said[row].ids[step] for row in rows], torch.tensor([said[row].logprobs[step] for row in rows])
        )
        for place in ended:  # whatever the engine said beyond the end does not count
            del said[rows[place]]
        step += 1
        for row in [row for row, one in said.items() if len(one.ids) == step]:
            still[row] = [*drawn[row], *said.pop(row).ids]
    return still


def parameters(tokens: Tokens, settings: SamplingSettings) -> dict[str, Any]:
    """vLLM's sampling parameters, all of them said: a server takes what is left open from the model's own files."""
    return {
        "n": 1,
        "temperature": settings.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop": list(settings.stop_strings),
        "stop_token_ids": sorted(tokens.eos_ids),
        "include_stop_str_in_output": True,
        "logprobs": 0,  # of the sampled token alone
    }


def seed_of(key: SampleKey, drawn: int) -> int:
    """The seed of a request, below 2^63; each time an answer is gone on with it is another."""
    return int(generator("vllm", *astuple(key), drawn).integers(2**63))


def checked(said: Said, vocabulary: int, name: str) -> Said:
    """A reply that holds what it must. BackendError, with what to do, otherwise."""
    if not said.ids or len(said.ids) != len(said.logprobs):
        raise BackendError(
            f"{name}: {len(said.ids)} tokens came with {len(said.logprobs)} log-probabilities; at least one was asked "
            f"for, and as many of the other. Use vLLM {LOWEST} or newer. Nothing was trained on them."
        )
    if not all(0 <= i < vocabulary for i in said.ids):
        odd = next(i for i in said.ids if not 0 <= i < vocabulary)
        raise BackendError(
            f"{name}: it said token {odd}, and the policy's vocabulary has {vocabulary}: it serves another model. "
            "Serve the recipe's model.base. Nothing was trained on it."
        )
    return said
