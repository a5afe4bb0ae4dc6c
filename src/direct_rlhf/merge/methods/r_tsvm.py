"""R-TSVM, **this project's own reading**: TSV-M with outlier-aware weighting and sparsity-adaptive rank selection.

The abstract of arXiv 2502.06876 names the two ingredients and no equation. What follows is ours, and is not the paper's
method (which its later version calls by another name).

(a) `weighting`, per matrix and expert, before the decomposition (D_i = w_i tau_i):
    sigma_i = lower median{|x| : x in D_i, x not 0} / .6745
    D'_i    = clamp(D_i, +-c sigma_i)                              (`clamp: false`: D_i)
    e_i     = sum_{|x| > c sigma_i} x^2 / sum x^2,   g_i = (1 - e_i)^p
    f_i     = min(|D_i| / |D'_i|, G),   kappa = min(sqrt(sum_j |D_j|^2 / sum_j |g_j f_j D'_j|^2), G)
    D''_i   = kappa g_i f_i D'_i                                   (below the cap sum |D''|^2 = sum |D|^2)
(b) `rank`, on D''_i: the r directions are shared in proportion to
    rho_i = exp(-sum_j p_j ln p_j), p_j = s_ij^2 / sum s^2   (`entropy`),   or |D''|^2 / s_1^2   (`stable`)
    over the directions of the numerical rank q_i; no more than q_i each (what is over is shared again), by the largest
    remainder, ties to the first, and at least one where q_i is. `equal`: as TSV-M.
Then as TSV-M.

Defaults:   both; c 4.5, p 1, G 1.5, entropy, and TSV-M's own. With both off it is TSV-M's code on untouched
            differences, equal to the last bit. The card reports clamped energy, factors, binding caps and directions.
Obeys:      TSV-M's laws of order, base, alpha, X and degree 1 (also negative); off = TSV-M; c -> infinity = unweighted;
            sum k_i <= r, k_i <= q_i; the norm is kept below the cap.
Does not:   one model and equal models where something is clamped; rotations with (a), which looks at entries; linear.
Source:     this project; named after the abstract of Yang et al., arXiv 2502.06876.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from direct_rlhf.merge.deltas import pieces
from direct_rlhf.merge.factorise import Spectrum
from direct_rlhf.merge.laws import HOMOGENEOUS
from direct_rlhf.merge.matrices import Matrix, mean_of, merge_by_matrix
from direct_rlhf.merge.methods.tsv_m import decompose, equal_counts, join_leading, too_small
from direct_rlhf.merge.selection import SCAN, Ranking, first_of
from direct_rlhf.merge.types import Block, Grain, Method, Survey
from direct_rlhf.recipe.merge_methods import RTsvmParameters

NORMAL_MEDIAN = 0.6745  # of |x|, in standard deviations


@dataclass(frozen=True)
class Weighing:
    """What the weighting makes of one expert's difference."""

    clamped_MN: Tensor  # D'
    outlier_share: float  # e
    expert_weight: float  # g
    norm: float  # |D|
    norm_factor: float  # |D| / |D'|, f before its cap


def merge(block: Block, parameters: RTsvmParameters, survey: Survey | None = None) -> Tensor:
    def merged(matrices: list[Matrix], part: Block) -> Tensor:
        if too_small(matrices, parameters):
            return mean_of(matrices)
        r = min(part.shape)
        spectra = decompose(weighted(matrices, part, parameters) if parameters.weighting else matrices, parameters)
        if parameters.rank == "equal":
            counts = equal_counts(spectra, r, parameters)
        else:
            measure = effective_rank if parameters.rank == "entropy" else stable_rank
            counts = shares(r, [measure(each) for each in spectra], [each.rank for each in spectra])
        return join_leading(spectra, counts, part, parameters)

    return merge_by_matrix(block, parameters, merged, floors=parameters.rank_cap)


def weighted(matrices: Sequence[Matrix], block: Block, parameters: RTsvmParameters) -> list[Matrix]:
    """D''_i of every expert."""
    weighings = [weigh(matrix.delta_MN, parameters) for matrix in matrices]
    factors, common = factors_of(weighings, parameters)
    for key, each, factor in zip(block.keys, weighings, factors, strict=True):
        block.notes[f"outlier energy of {key}"] = each.outlier_share
        block.notes[f"factor of {key}"] = factor
    cap = _cap(parameters)
    block.notes["norm caps that bind"] = float(sum(each.norm_factor > cap for each in weighings) + (common > cap))
    return [
        Matrix(each.clamped_MN * factor, matrix.floor * factor)
        for matrix, each, factor in zip(matrices, weighings, factors, strict=True)
    ]


def weigh(delta_MN: Tensor, parameters: RTsvmParameters) -> Weighing:
    """One expert's outliers, and its difference without them."""
    limit = parameters.threshold * robust_scale(delta_MN)
    norm, beyond = _norm(delta_MN), _norm(hardshrink(delta_MN, limit))
    clamped_MN = delta_MN.clamp(-limit, limit) if parameters.clamp else delta_MN
    share = (beyond / norm) ** 2 if norm else 0.0
    left = _norm(clamped_MN)
    return Weighing(clamped_MN, share, (1 - share) ** parameters.power, norm, norm / left if left else 1.0)


def factors_of(weighings: Sequence[Weighing], parameters: RTsvmParameters) -> tuple[list[float], float]:
    """kappa g_i f_i of every expert, and kappa before its cap."""
    cap = _cap(parameters)
    factors = [each.expert_weight * min(each.norm_factor, cap) for each in weighings]
    before = math.hypot(*(each.norm for each in weighings))
    after = math.hypot(*(factor * _norm(each.clamped_MN) for factor, each in zip(factors, weighings, strict=True)))
    common = before / after if after else 1.0
    return [min(common, cap) * factor for factor in factors], common


def robust_scale(delta_MN: Tensor) -> float:
    """sigma: the lower median of the non-zero magnitudes over that of a normal distribution; 0 if all are 0."""
    changed = int(torch.count_nonzero(delta_MN))
    if changed == 0:
        return 0.0
    delta_n = delta_MN.reshape(-1)

    def magnitudes(share: int = 1) -> list[tuple[int, Tensor]]:
        return [(start, delta_n[start : first_of(start, end, share)]) for start, end in pieces(delta_n, size=SCAN)]

    return Ranking(magnitudes, len(delta_n)).value(changed - (changed - 1) // 2) / NORMAL_MEDIAN


def effective_rank(each: Spectrum) -> float:
    """exp of the entropy of the energies; 0 without any."""
    energy_K = each.s_K[: each.rank].square()
    share_K = energy_K / energy_K.sum()
    return float((-share_K * share_K.log()).sum().exp()) if each.rank else 0.0


def stable_rank(each: Spectrum) -> float:
    """|D|^2 / s_1^2; 0 without any energy."""
    return float(each.s_K[: each.rank].square().sum() / each.s_K[0].square()) if each.rank else 0.0


def shares(r: int, wanted: Sequence[float], caps: Sequence[int]) -> list[int]:
    """``r`` directions in proportion to ``wanted``, at most ``caps``, by the largest remainder; at least one where a
    cap allows it and r is enough.

    Cases:  30 for 5, 10, 15: these; with caps 2, 30, 30: 2, 11, 17; 31 for three equal: 11, 10, 10.
    """
    fixed: dict[int, int] = {i: 0 for i, cap in enumerate(caps) if cap == 0}
    while True:
        free = [i for i in range(len(caps)) if i not in fixed]
        left, total = r - sum(fixed.values()), sum(wanted[i] for i in free)
        quotas = {i: left * wanted[i] / total for i in free}
        full = {i: caps[i] for i in free if quotas[i] >= caps[i]}
        if not full:
            break
        fixed |= full
    counts = fixed | {i: math.floor(quota) for i, quota in quotas.items()}
    for i in sorted(free, key=lambda i: (counts[i] - quotas[i], i))[: r - sum(counts.values())]:
        counts[i] += 1
    for i in free:
        largest = max(range(len(caps)), key=lambda j: (counts[j], -j))
        if counts[i] == 0 and counts[largest] > 1:
            counts[largest] -= 1
            counts[i] = 1
    return [counts[i] for i in range(len(caps))]


def _cap(parameters: RTsvmParameters) -> float:
    return math.inf if parameters.norm_cap is None else parameters.norm_cap


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


METHOD = Method(
    name="r_tsvm",
    title="R-TSVM (own reading)",
    source="this project, after the abstract of arXiv 2502.06876",
    parameters=RTsvmParameters,
    grain=lambda parameters: Grain.TENSOR,
    merge=merge,
    obeys=HOMOGENEOUS | {"one"},
    neutral={"weighting": False},
)
