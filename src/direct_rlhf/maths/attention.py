"""Causal attention within each of several rows that stand packed, one after the other.

Legend: N packed tokens, B rows, L slots, Q query heads, K key-value heads, D head size.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows up to this length: plain products beat the fused attention kernel on a CPU, above it not. In bfloat16 the
# backward pass of the fused kernel is several times slower.
EAGER_SLOTS = {torch.float32: 128, torch.bfloat16: 384}
SAME_GROUP = 2.0  # attention pads rows to at most this times their length


def few_sizes(n: int) -> int:
    """``n`` rounded up by at most an eighth, so that many sizes become few.

    A bfloat16 product on a CPU costs half a megabyte and a millisecond for every shape that it meets: its kernel is
    made at run time, and kept.
    """
    step = 1 << max(n.bit_length() - 4, 0)
    return -(-n // step) * step


@dataclass(frozen=True)
class Rows:
    """Lengths of the packed rows, in the order in which they stand (shortest first)."""

    lengths: tuple[int, ...]
    device: torch.device
    few: bool = False  # attention pads to `few_sizes`

    @cached_property
    def position_N(self) -> Tensor:
        """Each token's place in its row."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)

    @cached_property
    def groups(self) -> list["Group"]:
        """Neighbours of like length, attended to together."""
        found: list[Group] = []
        start = first = 0
        for place in range(1, len(self.lengths) + 1):
            if place == len(self.lengths) or self.lengths[place] > SAME_GROUP * self.lengths[first]:
                lengths = self.lengths[first:place]
                found.append(Group(start, start + sum(lengths), lengths, self.device, self.few))
                start, first = start + sum(lengths), place
        return found


@dataclass(frozen=True)
class Group:
    """Tokens ``start`` to ``end`` of the packed ones, which are rows of these lengths."""

    start: int
    end: int
    lengths: tuple[int, ...]
    device: torch.device
    few: bool = False

    @cached_property
    def size(self) -> tuple[int, int]:
        """Rows and slots of the padded group."""
        size = len(self.lengths), max(self.lengths)
        return (few_sizes(size[0]), few_sizes(size[1])) if self.few else size

    @cached_property
    def place_n(self) -> Tensor | None:
        """Each token's slot in the padded rows, flat; None where nothing is padded."""
        rows, slots = self.size
        if rows * slots == sum(self.lengths):
            return None
        return torch.cat([torch.arange(n) + row * slots for row, n in enumerate(self.lengths)]).to(self.device)

    def pad(self, packed: Tensor) -> Tensor:
        """[B, L, heads, D] of this group, from all packed tokens; zeros in the padding."""
        part = packed[self.start : self.end]
        shape = (*self.size, *packed.shape[1:])
        if self.place_n is None:
            return part.view(shape)
        whole = part.new_zeros(shape[0] * shape[1], *packed.shape[1:])
        return whole.index_copy(0, self.place_n, part).view(shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """The inverse: [n, heads, D]."""
        flat = padded.reshape(-1, *padded.shape[2:])
        return flat if self.place_n is None else flat.index_select(0, self.place_n)


def attend(query: Tensor, key: Tensor, value: Tensor, rows: Rows, *, window: int | None, scale: float) -> Tensor:
    """Causal attention within each row: [N, Q, D] from queries [N, Q, D], keys and values [N, K, D]."""
    seen = [
        group.unpad(_attend_padded(group.pad(query), group.pad(key), group.pad(value), window, scale))
        for group in rows.groups
    ]
    return seen[0] if len(seen) == 1 else torch.cat(seen)


def _attend_padded(
    query_BLQD: Tensor, key_BLKD: Tensor, value_BLKD: Tensor, window: int | None, scale: float
) -> Tensor:
    """Padding stands at the right end, where a causal mask hides it from every token."""
    batch, length, heads, size = query_BLQD.shape
    n_keys = key_BLKD.shape[2]
    back = torch.arange(length, device=query_BLQD.device)
    back_LL = back[:, None] - back
    visible_LL = (back_LL >= 0) & (back_LL < (window or length))
    if query_BLQD.device.type != "cpu" or length > EAGER_SLOTS.get(query_BLQD.dtype, 0):
        plain = window is None or window >= length
        seen = F.scaled_dot_product_attention(
            query_BLQD.transpose(1, 2),
            key_BLKD.transpose(1, 2),
            value_BLKD.transpose(1, 2),
            None if plain else visible_LL,
            is_causal=plain,
            scale=scale,
            enable_gqa=heads != n_keys,
        )
        return seen.transpose(1, 2)
    group = heads // n_keys

    def folded(x: Tensor) -> Tensor:  # [B K, G L, D]: the queries that share a key-value head as one longer row
        x = x.view(batch, length, n_keys, -1, size).permute(0, 2, 3, 1, 4)
        return x.reshape(batch * n_keys, -1, size)

    bias = torch.zeros(visible_LL.shape, dtype=query_BLQD.dtype, device=query_BLQD.device)
    bias_1ML = bias.masked_fill_(~visible_LL, float("-inf")).repeat(group, 1)[None]
    score = torch.baddbmm(bias_1ML, folded(query_BLQD), folded(key_BLKD).transpose(1, 2), alpha=scale)
    seen = torch.bmm(score.softmax(-1), folded(value_BLKD))
    return seen.view(batch, n_keys, group, length, size).permute(0, 3, 1, 2, 4).reshape(batch, length, heads, size)
