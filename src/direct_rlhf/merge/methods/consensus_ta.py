"""Consensus task arithmetic (TALL masks): what only few experts need is left out of the sum.

    x_i = w_i tau_i
    m_i = [|x_i| > lambda_m |sum_j x_j - x_i|]              expert i claims the entry
    theta = theta_0 + alpha [sum_i m_i >= k] sum_j x_j

Defaults:   lambda_m .6 (one for each expert, if given so), k 2, alpha .3, w 1. (fusion_bench adds theta_0 where the
            mask is 0, which is a mistake; not followed.)
Obeys:      order; experts equal to the base; alpha 0 or weights 0 give the base; adding X everywhere adds X; k 0 is
            task arithmetic; what is kept shrinks as k and lambda_m grow; one expert at k 1 is task arithmetic;
            tau -> c tau scales the change, tau -> -tau negates it.
Does not:   linear in the differences; equal models (the sum counts each); at k above the number of experts all is lost.
Source:     Wang et al., arXiv 2405.07813.
"""

import torch
from torch import Tensor

from direct_rlhf.merge.deltas import computing, deltas, onto_base
from direct_rlhf.merge.laws import HOMOGENEOUS
from direct_rlhf.merge.types import Block, Grain, Method, Survey
from direct_rlhf.recipe.merge_methods import ConsensusParameters


def merge(block: Block, parameters: ConsensusParameters, survey: Survey | None = None) -> Tensor:
    readers = deltas(block, computing(parameters))
    weights, mask_scales = (parameters.of(name, len(readers)) for name in ("weight", "mask_scale"))

    def change(start: int, end: int) -> Tensor:
        parts = [read(start, end).mul_(weight) for read, weight in zip(readers, weights, strict=True)]
        total_n = torch.zeros_like(parts[0])
        for part_n in parts:
            total_n.add_(part_n)
        claims_n = torch.zeros_like(total_n)
        for part_n, mask_scale in zip(parts, mask_scales, strict=True):
            margin_n = part_n.abs().sub_((total_n - part_n).abs_().mul_(mask_scale))
            claims_n.add_(margin_n.sign_().clamp_(min=0))
        return total_n.mul_(claims_n.sub_(parameters.agree - 0.5).sign_().clamp_(min=0))

    return onto_base(block, change, scale=parameters.scale, dtype=computing(parameters))


METHOD = Method(
    name="consensus_ta",
    title="Consensus TA",
    source="arXiv 2405.07813",
    parameters=ConsensusParameters,
    grain=lambda parameters: Grain.ELEMENT,
    merge=merge,
    obeys=HOMOGENEOUS | {"one"},
    neutral={"agree": 1, "scale": 1.0},
)
