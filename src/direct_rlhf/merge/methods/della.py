"""DELLA: drop at random, small entries sooner, rescale, elect signs and merge.

    p_j = (d - eps) + 2 eps (j - 1) / (n - 1)       the entry of rank j of a row of n (1 the smallest) stays with p_j
    tau~ = m tau / p_j,   m ~ Bernoulli(p_j)
    theta = theta_0 + lambda (elected disjoint merge of the tau~_i, see merge/consensus.py)

A row is the last dimension; a row of one stays with d. Of equal entries the one at the lower index ranks higher.

Defaults:   d .7 (drop .3), eps .07, division by p_j, mean, lambda 1 (the original's 1.1), w 1. `elect: false` is
            mergekit's della_linear.
References: original: + where entries cancel; mergekit: the same, and each tensor's sum of absolute values is restored
            instead of the division. (Both give 0/0 in rows of one; not followed.)
Obeys:      order; experts equal to the base; lambda 0 or weights 0 give the base; adding X everywhere adds X; d 1 drops
            nothing; entries are 0 or tau / p_j, p_j rises with rank and has mean d; the mean over seeds is tau; l1: the
            sum of absolute values stays; eps 0 is DARE, with the same masks; scaled differences scale the change.
Does not:   equal models (each has a mask of its own).
Source:     Deep et al., arXiv 2406.11617.
"""

import torch
from torch import Tensor

from direct_rlhf.merge.consensus import merge_elected
from direct_rlhf.merge.deltas import Reader, computing, deltas, onto_base_summed, row_length
from direct_rlhf.merge.dropping import dropped, dropped_l1, mask_key
from direct_rlhf.merge.laws import HOMOGENEOUS
from direct_rlhf.merge.masks import chances, drop_
from direct_rlhf.merge.selection import by_rank_in_rows
from direct_rlhf.merge.types import Block, Grain, Method, Survey
from direct_rlhf.recipe.merge_methods import DellaParameters


def merge(block: Block, parameters: DellaParameters, survey: Survey | None = None) -> Tensor:
    readers = [
        _reader(read, block, expert, parameters) for expert, read in enumerate(deltas(block, computing(parameters)))
    ]
    if parameters.elect:
        return merge_elected(block, readers, parameters, row=row_length(block))
    return onto_base_summed(block, readers, parameters, mean=parameters.merge == "mean", row=row_length(block))


def keep_probabilities(count: int, density: float, epsilon: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """[n] p_j by rank, the smallest first."""
    if count == 1:
        return torch.full((1,), density, dtype=dtype)
    return torch.linspace(density - epsilon, density + epsilon, count, dtype=torch.float64).to(dtype)


def _reader(read: Reader, block: Block, expert: int, parameters: DellaParameters) -> Reader:
    dtype, row = computing(parameters), row_length(block)
    density, epsilon = (parameters.of(name, len(block.experts))[expert] for name in ("density", "epsilon"))
    if density == 1:
        return read
    key = mask_key(block, expert, parameters.seed)
    probability_C = keep_probabilities(row, density, epsilon, dtype).to(block.experts[expert].device)

    def drop(piece_n: Tensor, start: int) -> Tensor:
        chance: Tensor | int = chances(density)
        share: Tensor | float = density
        if epsilon > 0:
            share = by_rank_in_rows(piece_n.abs().view(-1, row), probability_C).view(-1)
            chance = chances(share)
        drop_(piece_n, block.start + start, chance, *key)
        return piece_n.div_(share) if parameters.rescale == "inverse" else piece_n

    return dropped_l1(read, drop, block.experts[expert], row) if parameters.rescale == "l1" else dropped(read, drop)


def _grain(parameters: DellaParameters) -> Grain:
    whole = parameters.rescale == "l1" or (parameters.elect and parameters.zero_sign == "majority")
    return Grain.TENSOR if whole else Grain.ROW


METHOD = Method(
    name="della",
    title="DELLA",
    source="arXiv 2406.11617",
    parameters=DellaParameters,
    grain=_grain,
    merge=merge,
    obeys=HOMOGENEOUS | {"one", "equal"},
    neutral={"density": 1.0},
    random=True,
)
