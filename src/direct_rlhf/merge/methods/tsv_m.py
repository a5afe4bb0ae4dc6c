"""TSV-M: the leading singular directions of every expert, made orthogonal to each other.

    tau_i = U_i diag(s_i) V_i^T,   the first k_i directions of each,   sum_i k_i <= r = min(m, n)
    U = [U_1 .. U_T], S = diag(s_1 .. s_T), V = [V_1 .. V_T]
    theta = theta_0 + alpha U_o S V_o^T,   U_o = U (U^T U)^(-1/2), V_o likewise

Defaults:   alpha 1, w 1 (on tau_i, before its decomposition), and what keeps out of three traps:
            `remainder: distribute`: k = r // T, and one direction more for each of the r mod T experts with the largest
            next singular value (of equal ones the first);
            `orthogonalise: pinv`: directions that experts share (singular values of U up to rcond 1e-3 times the
            largest) count once, so identical experts give the truncated difference and opposite ones 0;
            `rank_cap`: no expert gives directions below its numerical rank (see merge/factorise.py), so what low rank
            or bfloat16 leaves in the null space does not bend the rest.
            Matrices with fewer directions than experts take the mean.
References: original, fusion_bench: without the three.
Obeys:      order; experts equal to the base; alpha 0 or weights 0 give the base; adding X everywhere adds X; degree 1
            (also negative); the singular values of the change are those that were kept, if U and V have full rank;
            rotating all differences (L tau_i R, L and R orthogonal) rotates the change; differences with orthogonal row
            and column spaces add up, each truncated; one expert is that expert; copies give the truncated difference.
Does not:   linear in the differences; equal models (each is truncated to its share) unless their rank is within it.
            `polar` does not obey the law of copies.
Source:     Gargiulo et al., arXiv 2412.00081.
"""

from collections.abc import Sequence

from torch import Tensor

from direct_rlhf.merge.factorise import Spectrum, spectrum
from direct_rlhf.merge.laws import HOMOGENEOUS
from direct_rlhf.merge.matrices import Matrix, join, mean_of, merge_by_matrix
from direct_rlhf.merge.types import Block, Grain, Method, Survey
from direct_rlhf.recipe.merge_methods import MatrixParameters, TsvParameters


def merge(block: Block, parameters: TsvParameters, survey: Survey | None = None) -> Tensor:
    def merged(matrices: list[Matrix], part: Block) -> Tensor:
        if too_small(matrices, parameters):
            return mean_of(matrices)
        spectra = decompose(matrices, parameters)
        return join_leading(spectra, equal_counts(spectra, min(part.shape), parameters), part, parameters)

    return merge_by_matrix(block, parameters, merged, floors=parameters.rank_cap)


def too_small(matrices: Sequence[Matrix], parameters: TsvParameters) -> bool:
    """Whether some expert would have no direction at all."""
    return parameters.remainder == "distribute" and min(matrices[0].delta_MN.shape) < len(matrices)


def decompose(matrices: Sequence[Matrix], parameters: MatrixParameters) -> list[Spectrum]:
    """The spectrum of every expert's difference."""
    return [
        spectrum(matrix.delta_MN, floor=matrix.floor, capped=parameters.rank_cap, exact=parameters.svd == "exact")
        for matrix in matrices
    ]


def equal_counts(spectra: Sequence[Spectrum], r: int, parameters: TsvParameters) -> list[int]:
    """k_i: r // T for each and the remainder, no more than the rank."""
    count = len(spectra)
    counts = [int(r * (1 / count))] * count  # in the original's arithmetic: 49 experts lose one direction of 49
    if parameters.remainder == "distribute":
        counts = [r // count] * count
        following = [_value(each, counts[0], parameters) for each in spectra]
        for i in sorted(range(count), key=lambda i: -following[i])[: r % count]:
            counts[i] += 1
    return [min(k, each.rank) for k, each in zip(counts, spectra, strict=True)] if parameters.rank_cap else counts


def join_leading(spectra: Sequence[Spectrum], counts: Sequence[int], block: Block, parameters: TsvParameters) -> Tensor:
    """U_o S V_o^T of the first ``counts`` directions."""
    for key, k in zip(block.keys, counts, strict=True):
        block.notes[f"directions of {key}"] = k
    return join([each.leading(k) for each, k in zip(spectra, counts, strict=True)], parameters)


def _value(each: Spectrum, place: int, parameters: TsvParameters) -> float:
    """The singular value at ``place``, 0 where there is no direction to take."""
    known = each.rank if parameters.rank_cap else len(each.s_K)
    return float(each.s_K[place]) if place < known else 0.0


METHOD = Method(
    name="tsv_m",
    title="TSV-M",
    source="arXiv 2412.00081",
    parameters=TsvParameters,
    grain=lambda parameters: Grain.TENSOR,
    merge=merge,
    obeys=HOMOGENEOUS | {"one"},
)
