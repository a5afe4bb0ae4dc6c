"""Random dropping with rescaling, which DARE and DELLA share."""

from collections.abc import Callable

import torch
from torch import Tensor

from direct_rlhf.merge.deltas import Reader, pieces
from direct_rlhf.merge.types import Block

FAINT = 1e-7  # sums below this are not rescaled, as mergekit's are not

# A piece and its start within the block -> the piece with 0 for what is dropped; may overwrite the piece
Drop = Callable[[Tensor, int], Tensor]


def mask_key(block: Block, expert: int, seed: int) -> tuple[int | str, ...]:
    """What the random mask of an expert's tensor depends on."""
    return "drop", seed, block.keys[expert], block.name


def dropped(read: Reader, drop: Drop) -> Reader:
    """What ``drop`` leaves."""
    return lambda start, end: drop(read(start, end), start)


def dropped_l1(read: Reader, drop: Drop, like: Tensor, row: int = 1) -> Reader:
    """What ``drop`` leaves, times the factor that restores the tensor's sum of absolute values.

    The factor takes a pass of its own, which keeps a byte for each entry: reading it is cheaper than drawing again.
    """
    signs_n = torch.empty(like.numel(), dtype=torch.int8, device=like.device)  # 0: dropped
    before = after = 0.0
    for start, end in pieces(like, row):
        piece_n = read(start, end)
        before += float(piece_n.abs().sum())
        left_n = drop(piece_n, start)
        signs_n[start:end] = left_n.sign()
        after += float(left_n.abs_().sum())
    factor = before / after if min(before, after) >= FAINT else 1.0

    def kept(start: int, end: int) -> Tensor:
        piece_n = read(start, end)
        return piece_n.mul_(signs_n[start:end].to(piece_n.dtype).abs_().mul_(factor))

    return kept
