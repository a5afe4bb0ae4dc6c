"""Random masks that depend on (seed, expert, tensor, place) and on nothing else.

An integer hash of the place, so blocks, threads, shards, devices and the order of the experts change nothing.
"""

from functools import lru_cache

import torch
from torch import Tensor

from direct_rlhf.randomness import generator

SURE = 1 << 31  # the chance 1 over the chance 0, in the units of `chances`
HALF = SURE // 2


def chances(share: Tensor | float) -> Tensor | int:
    """A probability in units of 2^-31, from -2^30 for 0 to 2^30 for 1."""
    if isinstance(share, Tensor):
        return (share * SURE).clamp_(max=SURE - 128).int().sub_(HALF)  # the next float32 below 2^31
    return round(share * SURE) - HALF


def drop_(piece_n: Tensor, start: int, chance: Tensor | int, *key: int | str) -> Tensor:
    """``piece_n``, from flat index ``start`` of a tensor, with 0 (+0) for what is dropped; in place.

    An entry stays if its random number is below its ``chance`` (see ``chances``). The entry's bits are combined with
    all ones or all zeros, which is a quarter of the cost of a comparison and a product.
    """
    keep_n = random_numbers(start, len(piece_n), piece_n.device, *key).sub_(chance).bitwise_right_shift_(31)
    wide = piece_n.dtype == torch.float64
    piece_n.view(torch.int64 if wide else torch.int32).bitwise_and_(keep_n.long() if wide else keep_n)
    return piece_n


def random_numbers(start: int, count: int, device: torch.device, *key: int | str) -> Tensor:
    """int32 [count], each uniform in -2^30 .. 2^30 - 1: those of the flat indices from ``start`` on, under ``key``.

    Two multiply-and-shift rounds of the index (with the constants of C. Wellons' lowbias32), with 32 bits drawn for
    the key before and 32 between them, of which the upper 31 bits are taken; indices beyond 2^32 change the key. One
    nanosecond a number on one core; tests bound its mean, its distribution, and its correlations between neighbours,
    rows of a matrix and keys.
    """
    ending = (start // (1 << 32) + 1) * (1 << 32)
    if start + count > ending:
        parts = (start, ending - start), (ending, start + count - ending)
        return torch.cat([random_numbers(*part, device, *key) for part in parts])
    before, between = _words(start >> 32, *key)
    x_n = (_indices(count, device) + _signed(start)).bitwise_xor_(before)
    _fold(x_n, 16).mul_(0x7FEB352D).bitwise_xor_(between)
    return _fold(x_n, 15).mul_(_signed(0x846CA68B)).bitwise_right_shift_(1)


@lru_cache(maxsize=4)
def _indices(count: int, device: torch.device) -> Tensor:
    """0 .. count - 1, not to be changed: counting up costs a fifth of all."""
    return torch.arange(count, dtype=torch.int32, device=device)


def _fold(x_n: Tensor, shift: int) -> Tensor:
    """x ^ (x >> shift) with zeros coming in from the left, in place."""
    return x_n.bitwise_xor_((x_n >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def _signed(word: int) -> int:
    """The int32 that has the lowest 32 bits of ``word``."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


@lru_cache(maxsize=4096)
def _words(*key: int | str) -> tuple[int, int]:
    """Two 32-bit numbers of the key, as int32."""
    before, between = generator("merge", *key).integers(-(1 << 31), 1 << 31, 2)
    return int(before), int(between)
