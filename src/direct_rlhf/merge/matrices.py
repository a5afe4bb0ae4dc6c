"""What matrix methods share: which tensors they treat as matrices, and joining the directions of several experts.

Biases, norms, embeddings and the head take the mean of the differences; stacks of matrices (the experts of a
mixture-of-experts layer) are merged matrix by matrix.

Legend: T experts, M x N a matrix, K directions of all experts together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from direct_rlhf.errors import MergeError
from direct_rlhf.merge.deltas import added, base_of, computing, deltas, onto_base, weighted_sum
from direct_rlhf.merge.factorise import Factors, inverse_root, polar, rounding_floor
from direct_rlhf.merge.types import Block
from direct_rlhf.recipe.merge_methods import SingularParameters, Weighted


@dataclass(frozen=True)
class Matrix:
    """An expert's weighted difference, and what its stored weights' rounding may have put into it."""

    delta_MN: Tensor
    floor: float  # singular values up to this may be rounding


# What a method makes of the experts' matrices: the merged difference, before the scale
MergeMatrices = Callable[[list[Matrix], Block], Tensor]


def merge_by_matrix(block: Block, parameters: Weighted, merge: MergeMatrices, *, floors: bool = False) -> Tensor:
    """theta_0 + scale times ``merge`` of the differences, or times their mean where there is no matrix."""
    if parameters.scale == 0 or not (block.is_matrix or block.is_stack):
        return _mean(block, parameters)
    if block.is_matrix:
        return _merge_one(block, parameters, merge, floors)
    slices = [_slice(block, index) for index in range(block.shape[0])]
    merged = torch.stack([_merge_one(part, parameters, merge, floors) for part in slices])
    for name in slices[0].notes:
        block.notes[name] = sum(part.notes[name] for part in slices) / len(slices)
    return merged


def join(parts: Sequence[Factors], parameters: SingularParameters, s_K: Tensor | None = None) -> Tensor:
    """U_o S V_o^T in float64's digits, from the experts' directions side by side.

        U = [U_1 .. U_T], V likewise, S = diag(s_1 .. s_T) or ``s_K``
        U_o = U (U^T U)^(-1/2) on the directions that U really has (`pinv`), or its polar factor (`polar`)

    Does not depend on which bases the parts' dominant spaces are given in. Shapes: [M, N], float64.
    """
    u_MK, v_NK = (torch.cat([getattr(part, side) for part in parts], dim=1) for side in ("u_MK", "v_NK"))
    s_K = torch.cat([part.s_K for part in parts]) if s_K is None else s_K
    if not len(s_K):
        return u_MK.new_zeros(len(u_MK), len(v_NK))
    if parameters.orthogonalise == "polar":
        return polar(u_MK) * s_K @ polar(v_NK).T
    core_KK = inverse_root(u_MK, parameters.rcond) * s_K @ inverse_root(v_NK, parameters.rcond)
    left_MK, right_NK = (u_MK @ core_KK, v_NK) if len(u_MK) <= len(v_NK) else (u_MK, v_NK @ core_KK.T)
    if parameters.precision == "float32":  # the root's large entries have cancelled by now
        left_MK, right_NK = left_MK.float(), right_NK.float()
    return left_MK @ right_NK.T


def mean_of(matrices: Sequence[Matrix]) -> Tensor:
    """The mean of the weighted differences."""
    return torch.stack([matrix.delta_MN for matrix in matrices]).mean(0)


def _mean(block: Block, parameters: Weighted) -> Tensor:
    readers = deltas(block, computing(parameters))
    weights = parameters.of("weight", len(readers))

    def change(start: int, end: int) -> Tensor:
        return weighted_sum((read(start, end) for read in readers), weights, mean=False).div_(len(readers))

    return onto_base(block, change, scale=parameters.scale, dtype=computing(parameters))


def _merge_one(block: Block, parameters: Weighted, merge: MergeMatrices, floors: bool) -> Tensor:
    base, dtype = base_of(block), computing(parameters)
    matrices = [
        Matrix(
            (expert.to(dtype) - base.to(dtype)).mul_(weight), abs(weight) * rounding_floor(expert) if floors else 0.0
        )
        for expert, weight in zip(block.experts, parameters.of("weight", len(block.experts)), strict=True)
    ]
    if not all(matrix.delta_MN.isfinite().all() for matrix in matrices):
        raise MergeError(f"{block.name}: a model holds values that are not finite, which have no decomposition")
    return added(base, merge(matrices, block).to(dtype), parameters.scale)


def _slice(block: Block, index: int) -> Block:
    """Matrix ``index`` of a stack."""
    return replace(
        block,
        name=f"{block.name}[{index}]",
        base=base_of(block)[index],
        experts=tuple(expert[index] for expert in block.experts),
        shape=block.shape[1:],
        notes={},
    )
