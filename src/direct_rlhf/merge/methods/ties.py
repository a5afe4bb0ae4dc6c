"""TIES: trim, elect signs, merge what agrees.

    tau^_i = tau_i where it is among the max(1, int(d n)) largest magnitudes (ties to the lower index), else 0
    gamma  = sgn(sum_i w_i tau^_i)
    theta  = theta_0 + lambda mean of the tau^_i that agree with gamma      (see merge/consensus.py)

Defaults:   per tensor, mean, d .2, lambda 1, w 1. `scope: global` trims over the whole model; `merge: sum`.
References: original: whole model, mean, one entry more and all ties; fusion_bench: the same with sum; mergekit: per
            tensor, weighted mean, + where entries cancel.
Obeys:      order; equal models (d 1, lambda 1, mean); experts equal to the base; lambda 0 or weights 0 give the base;
            adding X everywhere adds X; tau -> c tau scales (c > 0) and tau -> -tau negates the change (unless as many
            entries elect + as -); d 1, one expert, lambda 1 is the expert; sum = mean times count.
Does not:   linear in the differences; equal models at d < 1 (what is trimmed is lost); negation with
            `zero_sign: positive`.
Source:     Yadav et al., arXiv 2306.01708.
"""

from torch import Tensor

from direct_rlhf.merge.consensus import elected_survey, merge_elected
from direct_rlhf.merge.deltas import Reader, computing, deltas
from direct_rlhf.merge.laws import HOMOGENEOUS
from direct_rlhf.merge.scopes import cuts, tensor_scope, trimmed
from direct_rlhf.merge.types import Block, Grain, Method, Passes, Survey
from direct_rlhf.recipe.merge_methods import TiesParameters


def merge(block: Block, parameters: TiesParameters, survey: Survey | None = None) -> Tensor:
    readers = _readers(block, parameters)
    if survey:
        return merge_elected(block, readers, parameters, survey=survey)
    densities = parameters.of("density", len(readers))
    found = cuts(tensor_scope(block, readers), densities, parameters.at_cut)
    return merge_elected(block, trimmed(readers, found), parameters)


def survey(passes: Passes) -> Survey | None:
    return elected_survey(passes, _readers, "density")


def _readers(block: Block, parameters: TiesParameters) -> list[Reader]:
    return deltas(block, computing(parameters))


METHOD = Method(
    name="ties",
    title="TIES",
    source="arXiv 2306.01708",
    parameters=TiesParameters,
    grain=lambda parameters: Grain.TENSOR,
    merge=merge,
    obeys=HOMOGENEOUS | {"one", "equal"},
    neutral={"density": 1.0},
    survey=survey,
)
