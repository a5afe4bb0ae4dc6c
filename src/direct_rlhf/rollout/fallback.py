"""The slow paths of the sampler: any Hugging Face causal language model, through its own forward.

``cached`` where the model works with a dynamic key-value cache; ``uncached``, each step computing everything again,
where it keeps a state of its own.

Legend: A rows, P prompt slots (left-padded), S attended slots (prompt and answer so far), V vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from direct_rlhf.rollout.decoder import unwrapped


class ModelDecoder:
    """The interface of `decoder.Decoder` over a model's own forward; all rows start together."""

    refills = False

    def __init__(self, model: Any, *, pad_id: int, max_new_tokens: int) -> None:
        base = unwrapped(model)  # a PEFT wrapper hides them
        known = inspect.signature(base.forward).parameters
        self.model, self.device = model, model.device
        self.takes_mask, self.takes_positions = "attention_mask" in known, "position_ids" in known
        self.takes_cache_switch = "use_cache" in known
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.pad_id, self.max_new_tokens = pad_id, max_new_tokens
        self.cached = False
        if {"past_key_values", "attention_mask"} <= known.keys() and not getattr(base, "_is_stateful", False):
            # Only of these is it known that rows can be taken out, whatever a subclass keeps beside keys and values.
            layers = DynamicCache(config=model.config).layers
            self.cached = {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start these prompts, of one length each if there is no cache; logits [A, V]. ``rows`` are 0, 1, ..."""
        # A mask that hides nothing is dropped, and PyTorch's CPU attention for grouped queries is 3 times slower in
        # bfloat16 without one: one more padding slot keeps it.
        spare = self.cached and self.device.type == "cpu"
        ids_AP, mask_AP = left_padded(prompts, self.pad_id, max(map(len, prompts)) + spare)
        # One allocation for all steps: a mask that grows is a copy a step.
        more = torch.ones(len(prompts), self.max_new_tokens, dtype=torch.int64)
        self.mask = torch.cat([mask_AP.long(), more], dim=1).to(self.device)
        self.position = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=self.model.config) if self.cached else None
        self.ids = ids_AP.to(self.device)
        self.end = self.ids.shape[1]
        return self._forward()

    def step(self, ids_A: Tensor) -> Tensor:
        """Append a token to each row; logits [A, V] after it."""
        ids_A1 = ids_A[:, None]
        self.ids = ids_A1 if self.cached else torch.cat([self.ids, ids_A1], dim=1)
        self.end += 1
        return self._forward()

    def rest(self, rows: Sequence[int]) -> None:
        """Nothing to do: rows that ended are computed along until `keep` takes them out."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay, in this order."""
        index_A = torch.tensor(rows, device=self.device)
        self.ids, self.mask, self.position = (x[index_A] for x in (self.ids, self.mask, self.position))
        if self.cache is not None:
            self.cache.batch_select_indices(index_A)

    def _forward(self) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": self.ids, **self.last_only}
        if self.takes_mask:
            arguments["attention_mask"] = self.mask[:, : self.end]
        if self.takes_positions:
            arguments["position_ids"] = self.position[:, self.end - self.ids.shape[1] : self.end]
        if self.takes_cache_switch:
            arguments["use_cache"] = self.cached
        if self.cache is not None:
            arguments["past_key_values"] = self.cache
        logits: Tensor = self.model(**arguments).logits
        return logits[:, -1]


def left_padded(sequences: Sequence[Sequence[int]], pad_id: int, width: int) -> tuple[Tensor, Tensor]:
    """Ids (int64) and mask (bool), both [B, width], padded on the left."""
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in sequences])
    lengths = torch.tensor([len(row) for row in sequences])
    return ids, torch.arange(width) >= width - lengths[:, None]
