"""Differences to the base, read piece by piece, and what is merged put back onto it.

Legend: T experts, n elements of a tensor (flattened). A piece is small enough for a processor's second-level cache, so
a method's steps run in cache and a tensor needs no float32 copy of each expert.

Zeros and signs are computed with, not branched on: on a processor a comparison of floats costs five times, and a choice
between two tensors up to thirty times as much as an addition.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from direct_rlhf.errors import MergeError
from direct_rlhf.merge.types import Block
from direct_rlhf.recipe.merge_methods import MethodParameters, Weighted

PIECE = 1 << 17  # elements
ACCELERATOR_PIECE = 1 << 25  # where starting a step costs more than its memory traffic

# Elements [start, end) of one expert's difference, as a tensor of one's own
Reader = Callable[[int, int], Tensor]


def computing(parameters: MethodParameters) -> torch.dtype:
    """The type that a method computes in."""
    return torch.float64 if parameters.precision == "float64" else torch.float32


def base_of(block: Block) -> Tensor:
    """The base's tensor; MergeError if there is none."""
    if block.base is None:
        raise MergeError(f"{block.name}: this method merges differences to a base, and there is no base_model")
    return block.base


def pieces(tensor: Tensor, row: int = 1, size: int = PIECE) -> Iterator[tuple[int, int]]:
    """(start, end) of pieces of about ``size`` elements (more on an accelerator) in whole rows of ``row`` elements."""
    size = size if tensor.device.type == "cpu" else ACCELERATOR_PIECE
    step = max(1, size // row) * row
    for start in range(0, tensor.numel(), step):
        yield start, min(start + step, tensor.numel())


def row_length(block: Block) -> int:
    """Elements of the last dimension: a vector is one row, a number is a row of one."""
    return block.shape[-1] if block.shape else 1


def deltas(block: Block, dtype: torch.dtype) -> list[Reader]:
    """tau_i = theta_i - theta_0 of every expert, flattened.

    A piece of the base is converted once for all experts that read it one after the other.
    """
    base = _base(block, dtype)
    return [_difference(expert.reshape(-1), base, dtype) for expert in block.experts]


def _difference(expert_n: Tensor, base: Reader, dtype: torch.dtype) -> Reader:
    return lambda start, end: expert_n[start:end].to(dtype, copy=True).sub_(base(start, end))


def _base(block: Block, dtype: torch.dtype) -> Reader:
    """theta_0, flattened; the last piece is kept, and may not be written to."""
    base_n = base_of(block).reshape(-1)
    last: tuple[int, int, Tensor] = (0, 0, base_n[:0])

    def read(start: int, end: int) -> Tensor:
        nonlocal last
        if last[:2] != (start, end):
            last = start, end, base_n[start:end].to(dtype)
        return last[2]

    return read


def added(base_n: Tensor, change_n: Tensor, scale: float) -> Tensor:
    """theta_0 + scale change, in the type of the change, which is overwritten.

    Where the change is 0 the base keeps its bits, also those of -0: it is subtracted as 0 - change, because
    -0 + 0 is 0 but -0 - 0 is -0.
    """
    return base_n.to(change_n.dtype).sub(change_n.mul_(-scale).add_(0.0))


def onto_base(
    block: Block, change: Reader, *, scale: float, dtype: torch.dtype, row: int = 1, into: Tensor | None = None
) -> Tensor:
    """theta_0 + scale change, in pieces of whole ``row``s; ``change`` gives the merged difference of a piece.

    ``into`` is written to and returned; pieces of it may be what ``change`` gives.
    """
    base = base_of(block)
    if scale == 0:
        return base.to(dtype, copy=True)
    merged = torch.empty(base.shape, dtype=dtype, device=base.device) if into is None else into
    base_n, merged_n = base.reshape(-1), merged.view(-1)
    for start, end in pieces(base, row):
        merged_n[start:end] = added(base_n[start:end], change(start, end), scale)
    return merged


def onto_base_summed(
    block: Block, readers: Sequence[Reader], parameters: Weighted, *, mean: bool, row: int = 1
) -> Tensor:
    """theta_0 + scale sum_i w_i x_i, or their weighted mean."""
    weights = parameters.of("weight", len(readers))

    def change(start: int, end: int) -> Tensor:
        return weighted_sum((read(start, end) for read in readers), weights, mean=mean)

    return onto_base(block, change, scale=parameters.scale, dtype=computing(parameters), row=row)


def weighted_sum(parts: Iterable[Tensor], weights: Sequence[float], *, mean: bool) -> Tensor:
    """sum_i w_i x_i, divided by sum_i w_i for the mean (by 1 if that is 0). Overwrites the parts."""
    total: Tensor | None = None
    for part, weight in zip(parts, weights, strict=True):
        if total is None:
            total = part if weight == 1 else part.mul_(weight)
        else:
            total.add_(part, alpha=weight)
    assert total is not None
    divisor = sum(weights)
    return total.div_(divisor) if mean and divisor not in (0, 1) else total
