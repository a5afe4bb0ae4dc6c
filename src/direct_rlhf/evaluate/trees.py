"""Hidden states of token trees: continuations that share what comes before them are computed in one sequence.

Legend: B trees, L slots (padded on the right), N slots asked about, H hidden size, V vocabulary.

An attention mask lets each token see its ancestors and itself only, and its position is its depth, so the numbers are
those of separate sequences. Where that cannot be (an architecture that takes no such mask, an attention window shorter
than a branch), the branches run as sequences of their own.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from direct_rlhf.models.forward import CHUNK_ELEMENTS, backbone, causal_lm, final_logits
from direct_rlhf.models.memory import ChunkSize

T = TypeVar("T")
Pick = Callable[[Tensor], Tensor]  # states of every slot [B, L, H] -> of the slots asked about [N, H]
Read = Callable[[Any, Mapping[str, Tensor], Pick], Tensor]  # model, its inputs, pick -> states [N, ..., H]
SLOTS = {"cpu": 2048}  # B * L of a batch: beyond it a processor's caches no longer hold the states
SLOTS_ELSEWHERE = 2**15
MASK_ELEMENTS = 2**23  # B * L * L of a batch: 32 MiB in float32


@dataclass
class TokenTree:
    """Tokens in slots. ``parents[i] < i`` is the slot of the token before token i; the first has -1."""

    ids: list[int]
    parents: list[int]

    @classmethod
    def chain(cls, ids: Sequence[int]) -> "TokenTree":
        return cls(list(ids), list(range(-1, len(ids) - 1)))

    def grow(self, parent: int, ids: Sequence[int]) -> list[int]:
        """Adds a branch after slot ``parent``; the slots of its tokens."""
        slots = list(range(len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.parents += [parent, *slots][: len(ids)]
        return slots

    def pruned(self, slots: Sequence[int]) -> tuple["TokenTree", list[int]]:
        """The tree with only these slots and their ancestors, and where the slots are in it."""
        kept: set[int] = set()
        for slot in slots:
            while slot >= 0 and slot not in kept:
                kept.add(slot)
                slot = self.parents[slot]
        place = {slot: at for at, slot in enumerate(sorted(kept))} | {-1: -1}
        tree = TokenTree(
            [self.ids[slot] for slot in sorted(kept)], [place[self.parents[slot]] for slot in sorted(kept)]
        )
        return tree, [place[slot] for slot in slots]

    @property
    def is_chain(self) -> bool:
        return all(parent == slot - 1 for slot, parent in enumerate(self.parents))

    def depths(self) -> list[int]:
        depth: list[int] = []
        for parent in self.parents:
            depth.append(depth[parent] + 1 if parent >= 0 else 0)
        return depth

    def seen(self) -> NDArray[np.bool_]:
        """[L, L]: which slots each token sees, its ancestors and itself."""
        seen_LL = np.zeros((len(self.ids), len(self.ids)), dtype=bool)
        for slot, parent in enumerate(self.parents):
            if parent >= 0:
                seen_LL[slot] = seen_LL[parent]
            seen_LL[slot, slot] = True
        return seen_LL

    def branches(self) -> Iterator[list[int]]:
        """The slots from the first token to each leaf."""
        inner = set(self.parents)
        for leaf in range(len(self.ids)):
            if leaf not in inner:
                slots = [leaf]
                while self.parents[slots[-1]] >= 0:
                    slots.append(self.parents[slots[-1]])
                yield slots[::-1]


def last_hidden(model: Any, inputs: Mapping[str, Tensor], pick: Pick) -> Tensor:
    """The last hidden states [N, H], after the final norm."""
    return pick(backbone(model)(use_cache=False, **inputs).last_hidden_state)


@torch.inference_mode()
def hidden_at(
    model: Any,
    trees: Sequence[TokenTree],
    slots: Sequence[Sequence[int]],
    *,
    packed: bool,
    read: Read = last_hidden,
) -> Tensor:
    """What ``read`` takes from the model at the slots of each tree, tree by tree: its last hidden states [N, H].

    ``packed``: one row a tree (see ``takes_trees``); otherwise one row a branch, as any causal model reads it.
    """
    if not packed:
        return _branch_states(model, trees, slots, read)
    device = next(model.parameters()).device
    width = max(len(tree.ids) for tree in trees)
    ids_BL = torch.tensor([tree.ids + [tree.ids[0]] * (width - len(tree.ids)) for tree in trees], device=device)
    extra: dict[str, Tensor] = {}
    # chains padded on the right need neither mask nor positions: no token looks at what comes after it
    if not all(tree.is_chain for tree in trees):
        seen_BLL = np.zeros((len(trees), width, width), dtype=bool)
        position_BL = np.zeros((len(trees), width), dtype=np.int64)
        for b, tree in enumerate(trees):
            size = len(tree.ids)
            position_BL[b, :size] = tree.depths()
            seen_BLL[b, :size, :size] = tree.seen()
            seen_BLL[b, size:, 0] = True  # padding looks somewhere, so that its softmax is defined
        dtype = next(model.parameters()).dtype
        mask_B1LL = torch.zeros((len(trees), 1, width, width), dtype=dtype)
        mask_B1LL.masked_fill_(torch.from_numpy(~seen_BLL).unsqueeze(1), torch.finfo(dtype).min)
        extra = {"attention_mask": mask_B1LL.to(device), "position_ids": torch.from_numpy(position_BL).to(device)}
    tree_N = torch.tensor([b for b, asked in enumerate(slots) for _ in asked], device=device)
    slot_N = torch.tensor([slot for asked in slots for slot in asked], device=device)
    return read(model, {"input_ids": ids_BL, **extra}, lambda hidden_BLH: hidden_BLH[tree_N, slot_N])


def in_batches(
    model: Any, trees: Sequence[TokenTree], batch: ChunkSize, work: Callable[[list[int]], T]
) -> Iterator[tuple[list[int], T]]:
    """``work(indices)`` on trees of similar size, the largest first; yields the indices with what came of them.

    A batch holds at most ``batch.size`` trees, and as many as its mask and the model's device may. Where memory runs
    out, only the batch at hand is computed again.
    """
    most = SLOTS.get(next(model.parameters()).device.type, SLOTS_ELSEWHERE)
    order = sorted(range(len(trees)), key=lambda i: -len(trees[i].ids))
    start = 0

    def attempt(size: int) -> tuple[list[int], T]:
        longest = len(trees[order[start]].ids)
        room = max(1, min(MASK_ELEMENTS // longest**2, most // longest))
        indices = order[start : start + min(size, room)]
        return indices, work(indices)

    while start < len(order):
        indices, result = batch.run(attempt)
        yield indices, result
        start += len(indices)


def logit_chunks(model: Any, hidden_NH: Tensor) -> Iterator[Tensor]:
    """Next-token logits of the rows ([N, H] or [N, ..., H]) in float32, as many rows at a time as may be held."""
    wide = vocabulary(model) * math.prod(hidden_NH.shape[1:-1])
    for hidden_nH in hidden_NH.split(max(1, CHUNK_ELEMENTS // wide)):
        yield final_logits(model, hidden_nH)


def vocabulary(model: Any) -> int:
    """Rows of the head."""
    inner: Any = causal_lm(model)
    return int(inner.get_output_embeddings().weight.shape[0])


def attention_reach(model: Any) -> int | None:
    """How many tokens back every layer can look, if that is limited (sliding windows, chunks, local attention)."""
    inner: Any = causal_lm(model)
    config = inner.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def context_length(model: Any) -> int:
    """Positions that the model has, from its config; 2048 where that does not say."""
    inner: Any = causal_lm(model)
    config = inner.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return 2048


@torch.inference_mode()
def takes_trees(model: Any) -> bool:
    """Whether packed trees give this model's own numbers: tried on a small one against its branches."""
    ids = [(7 * i + 3) % vocabulary(model) for i in range(9)]
    tree = TokenTree.chain(ids[:6])
    slots = [[5, tree.grow(2, ids[6:])[-1]]]
    expected = torch.cat(list(logit_chunks(model, hidden_at(model, [tree], slots, packed=False))))
    try:
        found = torch.cat(list(logit_chunks(model, hidden_at(model, [tree], slots, packed=True))))
    except torch.OutOfMemoryError:  # a RuntimeError, which says nothing of what the model takes
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # it takes no 4-D mask or no positions
        return False
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.1
    close = torch.isclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    return bool(close.all())


def _branch_states(model: Any, trees: Sequence[TokenTree], slots: Sequence[Sequence[int]], read: Read) -> Tensor:
    chains: list[TokenTree] = []
    places: list[dict[int, tuple[int, int]]] = []  # of each tree: slot -> (chain, slot in it)
    for tree in trees:
        place: dict[int, tuple[int, int]] = {}
        for branch in tree.branches():
            place |= {slot: (len(chains), at) for at, slot in enumerate(branch)}
            chains.append(TokenTree.chain([tree.ids[slot] for slot in branch]))
        places.append(place)
    wanted = [place[slot] for place, asked in zip(places, slots, strict=True) for slot in asked]
    by_chain = [sorted({at for chain, at in wanted if chain == c}) for c in range(len(chains))]
    offset = np.cumsum([0, *map(len, by_chain)])
    hidden_NH = hidden_at(model, chains, by_chain, packed=True, read=read)  # chains, which need no mask
    return hidden_NH[[int(offset[chain]) + by_chain[chain].index(at) for chain, at in wanted]]
