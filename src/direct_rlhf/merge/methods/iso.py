"""ISO-C and ISO-CTS: the merged difference with a flat spectrum.

    iso_c:    C = sum_i w_i tau_i = U diag(s) V^T,   change = mean(s) U V^T, over the q directions of C's numerical rank
    iso_cts:  the first c = int(common r) directions of C, and of each expert the first d = (r - c) // T directions of
              (I - U_c U_c^T) w_i tau_i; c takes what is over (c = r - T d); joined and made orthogonal as in TSV-M;
              change = mean(all their s) U_o V_o^T
    theta = theta_0 + lambda change

Defaults:   lambda 1, w 1, common .8. Only directions of the numerical rank count and are averaged: a mean over all r
            feeds arbitrary directions of the null space (70 % of the energy at rank 9 in 40 x 30).
References: original, fusion_bench: mean over all r; iso_cts: d = round((r - c) / T), which is 0 at T >= 2 (r - c),
            and the polar factor.
Obeys:      order; experts equal to the base; lambda 0 or weights 0 give the base; adding X everywhere adds X; flat
            spectrum; degree 1 (also negative); iso_c keeps the nuclear norm of C; iso_cts with common 1 is iso_c;
            rotating all differences rotates the change.
Does not:   one model, equal models, or linear in the differences (any difference comes out flat).
Source:     Marczak et al., arXiv 2502.04959.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from direct_rlhf.merge.factorise import Factors, Spectrum, spectrum
from direct_rlhf.merge.laws import HOMOGENEOUS
from direct_rlhf.merge.matrices import Matrix, join, merge_by_matrix
from direct_rlhf.merge.types import Block, Grain, Method, Survey
from direct_rlhf.recipe.merge_methods import IsoCParameters, IsoCtsParameters, MatrixParameters


def merge_common(block: Block, parameters: IsoCParameters, survey: Survey | None = None) -> Tensor:
    def merged(matrices: list[Matrix], part: Block) -> Tensor:
        common = _leading(_spectrum(_total(matrices), parameters), min(part.shape), parameters)
        return common.u_MK * _mean(common.s_K) @ common.v_NK.T

    return merge_by_matrix(block, parameters, merged, floors=parameters.rank_cap)


def merge_common_and_specific(block: Block, parameters: IsoCtsParameters, survey: Survey | None = None) -> Tensor:
    def merged(matrices: list[Matrix], part: Block) -> Tensor:
        common_count, own_count = space_sizes(min(part.shape), len(matrices), parameters)
        common = _leading(_spectrum(_total(matrices), parameters), common_count, parameters)
        parts = [_own(matrix, common, own_count, parameters) for matrix in matrices if own_count]
        s_K = torch.cat([each.s_K for each in [*parts, common]])
        return join([*parts, common], parameters, torch.full_like(s_K, _mean(s_K)))

    return merge_by_matrix(block, parameters, merged, floors=parameters.rank_cap)


def space_sizes(r: int, experts: int, parameters: IsoCtsParameters) -> tuple[int, int]:
    """Directions of the common space, and of each expert's own."""
    rest = r - int(parameters.common * r)
    own = round(rest / experts) if parameters.rounding == "nearest" else rest // experts
    return r - experts * own, own


def _own(matrix: Matrix, common: Factors, count: int, parameters: IsoCtsParameters) -> Factors:
    """The first directions of what the common space leaves of an expert."""
    left = matrix.delta_MN.double()
    left = (left - common.u_MK @ (common.u_MK.T @ left)).to(matrix.delta_MN.dtype)
    return _leading(_spectrum(Matrix(left, matrix.floor), parameters), count, parameters)


def _total(matrices: Sequence[Matrix]) -> Matrix:
    total_MN = matrices[0].delta_MN.clone()
    for matrix in matrices[1:]:
        total_MN += matrix.delta_MN
    return Matrix(total_MN, math.hypot(*(matrix.floor for matrix in matrices)))


def _spectrum(matrix: Matrix, parameters: MatrixParameters) -> Spectrum:
    exact = parameters.svd == "exact"
    return spectrum(matrix.delta_MN, floor=matrix.floor, capped=parameters.rank_cap, exact=exact)


def _leading(found: Spectrum, count: int, parameters: MatrixParameters) -> Factors:
    return found.leading(min(count, found.rank) if parameters.rank_cap else count)


def _mean(s_K: Tensor) -> float:
    return float(s_K.mean()) if len(s_K) else 0.0


COMMON = Method(
    name="iso_c",
    title="ISO-C",
    source="arXiv 2502.04959",
    parameters=IsoCParameters,
    grain=lambda parameters: Grain.TENSOR,
    merge=merge_common,
    obeys=HOMOGENEOUS,
)
COMMON_AND_SPECIFIC = Method(
    name="iso_cts",
    title="ISO-CTS",
    source="arXiv 2502.04959",
    parameters=IsoCtsParameters,
    grain=lambda parameters: Grain.TENSOR,
    merge=merge_common_and_specific,
    obeys=HOMOGENEOUS,
)
