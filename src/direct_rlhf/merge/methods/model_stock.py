"""Model Stock: the mean of the experts, pulled back to the base by as much as they disagree.

    c = mean over pairs of cos(tau_i, tau_j),   t = T c / (1 + (T-1) c)
    theta = theta_0 + t mean_i tau_i

Defaults:   per tensor, mean of the cosines, t within 0 and 1 (the card reports where that changed it). One expert has
            t 1. A difference of 0 has cosine 0.
References: mergekit: t not clamped (0 where 1 + (T-1) c is 0); fusion_bench: mean of the angles, t not clamped.
Obeys:      order; one model; equal models (t 1); experts equal to the base; orthogonal differences give the base (t 0);
            adding X everywhere adds X; a common factor on the differences scales the change.
Does not:   linear in the differences; no weights (the paper has none).
Source:     Jang et al., arXiv 2403.19522.
"""

import math
from itertools import combinations

import torch
from torch import Tensor

from direct_rlhf.merge.deltas import computing, deltas, onto_base, pieces, weighted_sum
from direct_rlhf.merge.laws import HOMOGENEOUS
from direct_rlhf.merge.types import Block, Grain, Method, Survey
from direct_rlhf.recipe.merge_methods import ModelStockParameters


def merge(block: Block, parameters: ModelStockParameters, survey: Survey | None = None) -> Tensor:
    readers = deltas(block, computing(parameters))
    weights, dtype = (1.0,) * len(readers), computing(parameters)
    products = torch.zeros(len(readers), len(readers), dtype=torch.float64)
    mean = torch.empty(block.experts[0].shape, dtype=dtype, device=block.experts[0].device)
    mean_n = mean.view(-1)
    for start, end in pieces(mean):
        parts = [read(start, end) for read in readers]
        for i, j in _pairs_and_self(len(readers)):
            products[i, j] += float(parts[i] @ parts[j])
        mean_n[start:end] = weighted_sum(parts, weights, mean=True)
    cosine, ratio = interpolation(products, parameters)
    clamped = min(1.0, max(0.0, ratio if cosine > 0 else 0.0)) if parameters.clamp else ratio
    block.notes.update(cosine=cosine, t=clamped, clamped=float(clamped != ratio))
    return onto_base(block, lambda start, end: mean_n[start:end], scale=clamped, dtype=dtype, into=mean)


def interpolation(products_TT: Tensor, parameters: ModelStockParameters) -> tuple[float, float]:
    """The cosine that the pairs agree on and t, not clamped, from the inner products (upper triangle)."""
    count = len(products_TT)
    if count == 1:
        return 1.0, 1.0
    cosines = [_cosine(products_TT, i, j, parameters) for i, j in combinations(range(count), 2)]
    if parameters.average == "angle":
        cosine = math.cos(sum(map(math.acos, cosines)) / len(cosines))
    else:
        cosine = sum(cosines) / len(cosines)
    divisor = 1 + (count - 1) * cosine
    return cosine, count * cosine / divisor if abs(divisor) >= 1e-6 else 0.0


def _cosine(products_TT: Tensor, i: int, j: int, parameters: ModelStockParameters) -> float:
    norms = math.sqrt(products_TT[i, i] * products_TT[j, j])
    if parameters.reference == "mergekit":
        norms = max(norms, 1e-6)
    elif parameters.reference == "fusion_bench":
        norms += 1e-8
    return max(-1.0, min(1.0, float(products_TT[i, j]) / norms)) if norms > 0 else 0.0


def _pairs_and_self(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


METHOD = Method(
    name="model_stock",
    title="Model Stock",
    source="arXiv 2403.19522",
    parameters=ModelStockParameters,
    grain=lambda parameters: Grain.TENSOR,
    merge=merge,
    obeys=(HOMOGENEOUS | {"one", "equal"}) - {"zero"},
)
