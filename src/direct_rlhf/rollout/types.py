"""What a sampler is asked for and what it returns.

Legend: B answers, P prompt slots (left-padded), T response slots (right-padded).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class FinishReason(StrEnum):
    """How an answer ended."""

    EOS = "eos"  # the policy sampled EOS
    STOP = "stop"  # a stop string appeared
    LENGTH = "length"  # the cap cut it


@dataclass(frozen=True)
class SamplingSettings:
    """Generation settings; there is no truncation sampling, so the sampled distribution is the scored one."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 = greedy (evaluation only)
    stop_strings: tuple[str, ...] = ()
    keep_stop: bool = False  # True: stop tokens stay as actions; False: swapped for an EOS that is no action


@dataclass(frozen=True)
class SampleKey:
    """Names one sample's random stream: a sample depends on these four and on nothing beside it in the batch."""

    seed: int
    prompt_id: str
    iteration: int
    index: int


@dataclass(frozen=True)
class Rollout:
    """Sampled answers with all that training needs; padded slots of every tensor are 0 / False.

    ``response_mask_BT`` covers all ids that are kept (a swapped-in EOS too); ``action_mask_BT`` only the tokens that
    the policy sampled and that were kept, so that always ``action_mask <= response_mask``, with >= 1 action a row.
    """

    prompt_ids_BP: Tensor  # int64, left-padded
    prompt_mask_BP: Tensor  # bool
    response_ids_BT: Tensor  # int64, right-padded
    response_mask_BT: Tensor  # bool
    action_mask_BT: Tensor  # bool
    logprob_BT: Tensor  # float32 nats at sampling time, temperature applied; 0 where action_mask is False
    finish: tuple[FinishReason, ...]  # B
    texts: tuple[str, ...]  # B, text before the stop string / EOS, as the reward model reads it (not stripped)
    keys: tuple[SampleKey, ...]  # B
    policy_version: int  # optimiser steps the sampling policy had taken
    # What an engine of other arithmetic said of its own tokens, where ``logprob_BT`` is the trainer's; None: the same.
    sampler_logprob_BT: Tensor | None = None

    def __len__(self) -> int:
        return self.response_ids_BT.shape[0]

    def cpu(self) -> Self:
        """The same with all tensors on the CPU."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        moved: dict[str, Any] = {name: field.cpu() for name, field in fields.items() if isinstance(field, Tensor)}
        return replace(self, **moved)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint; ``from_state`` is the inverse."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.sampler_logprob_BT is None:
            del fields["sampler_logprob_BT"]
        return fields | {"finish": list(map(str, self.finish)), "keys": [asdict(key) for key in self.keys]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        finish = tuple(map(FinishReason, state["finish"]))
        keys = tuple(SampleKey(**key) for key in state["keys"])
        return cls(**{**state, "finish": finish, "keys": keys, "texts": tuple(state["texts"])})


def joined(parts: Sequence[Rollout], rows: Sequence[int]) -> Rollout:
    """Rollouts of one policy as one. ``rows`` are the places of their answers in it, part after part."""
    order = torch.tensor(rows).argsort()

    def tensor(name: str) -> Tensor:
        found = [getattr(part, name) for part in parts]
        gaps = [max(one.shape[1] for one in found) - one.shape[1] for one in found]
        left = name.startswith("prompt")  # prompts are padded on their left, answers on their right
        return torch.cat([F.pad(x, (gap, 0) if left else (0, gap)) for x, gap in zip(found, gaps, strict=True)])[order]

    def column(name: str) -> tuple[Any, ...]:
        found = [value for part in parts for value in getattr(part, name)]
        return tuple(found[place] for place in order.tolist())

    names = [name for name in Rollout.__dataclass_fields__ if isinstance(getattr(parts[0], name), Tensor)]
    tensors: dict[str, Any] = {name: tensor(name) for name in names}
    columns: dict[str, Any] = {name: column(name) for name in ("finish", "texts", "keys")}
    return Rollout(**tensors, **columns, policy_version=parts[0].policy_version)
