"""What many contexts begin with, computed once: a block of worked examples, and the questions that grow from it.

Legend: P tokens of the trunk, N slots that grow from it (of several trees in one row), H hidden size.

The trunk's keys and values are kept; the trees that follow it stand side by side in one row, and an attention mask lets
each token see the trunk, its own ancestors and itself. Positions are absolute, so the numbers are those of separate
sequences.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from direct_rlhf.evaluate.trees import TokenTree, hidden_at, logit_chunks, vocabulary
from direct_rlhf.models.forward import backbone
from direct_rlhf.models.memory import ChunkSize

T = TypeVar("T")
Ids = NDArray[np.int32]
SHORTEST = 16  # tokens of a trunk
SAVED = 1024  # tokens that it must save: it costs a forward of its own, and its trees come in batches of their own
ROW_SLOTS = {"cpu": 512}  # N: attention costs N x (P + N), and the trees of a row do not see each other
ROW_SLOTS_ELSEWHERE = 4096


@dataclass(frozen=True)
class Trunk:
    """The first ``length`` tokens of these contexts."""

    length: int
    members: tuple[int, ...]  # places of the contexts


def find_trunks(contexts: Sequence[Ids]) -> tuple[list[Trunk], list[int]]:
    """Contexts that share enough of their beginning, and those that do not. Each keeps a token of its own.

    Neighbours in dictionary order are taken together for as long as the tokens saved, length x (members - 1), grow.
    """
    order = sorted(range(len(contexts)), key=lambda i: contexts[i].astype(">i4").tobytes())
    trunks: list[Trunk] = []
    alone: list[int] = []
    start = 0
    while start < len(order):
        length, end = len(contexts[order[start]]) - 1, start + 1
        saved = 0
        while end < len(order):
            shared = min(length, _shared(contexts[order[end - 1]], contexts[order[end]]))
            if shared < SHORTEST or shared * (end - start) < saved:
                break
            length, saved, end = shared, shared * (end - start), end + 1
        members = order[start:end]
        if saved >= SAVED:
            trunks.append(Trunk(length, tuple(members)))
        else:
            alone += members
        start = end
    return trunks, sorted(alone)


def _shared(a: Ids, b: Ids) -> int:
    """Tokens that both begin with, at most all but the last of the shorter one."""
    size = min(len(a), len(b)) - 1
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


class GrownTrunk:
    """A trunk's keys and values, and forwards of trees that follow it."""

    @torch.inference_mode()
    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self._model, self._length = model, len(ids)
        self._device, self._dtype = next(model.parameters()).device, next(model.parameters()).dtype
        cache = DynamicCache()
        ids_1P = torch.tensor([list(ids)], device=self._device)
        backbone(model)(input_ids=ids_1P, past_key_values=cache, use_cache=True)
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]

    @torch.inference_mode()
    def hidden_at(self, trees: Sequence[TokenTree], slots: Sequence[Sequence[int]]) -> Tensor:
        """Last hidden states [N, H] at the slots of each tree, tree by tree."""
        offsets = np.cumsum([0, *(len(tree.ids) for tree in trees)])
        size, before = int(offsets[-1]), self._length
        seen = np.zeros((size, before + size), dtype=bool)
        seen[:, :before] = True
        for tree, at in zip(trees, offsets[:-1], strict=True):
            seen[at : at + len(tree.ids), before + at : before + at + len(tree.ids)] = tree.seen()
        mask = torch.zeros((1, 1, *seen.shape), dtype=self._dtype)
        mask.masked_fill_(torch.from_numpy(~seen), torch.finfo(self._dtype).min)
        position = torch.tensor([[before + depth for tree in trees for depth in tree.depths()]])
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, index)
        hidden_1NH = backbone(self._model)(
            input_ids=torch.tensor([[token for tree in trees for token in tree.ids]], device=self._device),
            attention_mask=mask.to(self._device),
            position_ids=position.to(self._device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        asked = [int(at) + slot for at, wanted in zip(offsets, slots, strict=False) for slot in wanted]
        picked_NH: Tensor = hidden_1NH[0, torch.tensor(asked, device=self._device)]
        return picked_NH


def in_rows(
    trees: Sequence[TokenTree], device: torch.device, batch: ChunkSize, work: Callable[[list[int]], T]
) -> Iterator[tuple[list[int], T]]:
    """``work(indices)`` on as many trees as one row may hold, in their order; yields the indices with what came of it.

    Where memory runs out, only the row at hand is computed again.
    """
    limit = ROW_SLOTS.get(device.type, ROW_SLOTS_ELSEWHERE)
    start = 0

    def attempt(size: int) -> tuple[list[int], T]:
        end, slots = start, 0
        while end < len(trees) and end - start < size and (end == start or slots + len(trees[end].ids) <= limit):
            slots += len(trees[end].ids)
            end += 1
        indices = list(range(start, end))
        return indices, work(indices)

    while start < len(trees):
        indices, result = batch.run(attempt)
        yield indices, result
        start += len(indices)


@torch.inference_mode()
def takes_trunks(model: Any) -> bool:
    """Whether trees that follow kept keys and values give this model's own numbers: tried on small ones."""
    ids = [(7 * i + 3) % vocabulary(model) for i in range(12)]
    whole = TokenTree.chain(ids[:8])
    slots = [[7, whole.grow(6, ids[8:10])[-1]]]
    expected = torch.cat(list(logit_chunks(model, hidden_at(model, [whole], slots, packed=False))))
    tree = TokenTree.chain(ids[5:8])
    own = [[2, tree.grow(1, ids[8:10])[-1]]]
    try:
        # the same tree twice: the second one must not see the first
        hidden = GrownTrunk(model, ids[:5]).hidden_at([tree, tree], [*own, *own])
        found = torch.cat(list(logit_chunks(model, hidden)))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # another kind of cache, or no masks
        return False
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.1
    return bool(torch.isclose(found, expected.repeat(2, 1), rtol=tolerance, atol=tolerance, equal_nan=True).all())
