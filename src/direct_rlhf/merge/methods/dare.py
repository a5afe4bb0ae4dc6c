"""DARE: drop at random and rescale, then add (`dare_linear`) or elect signs first (`dare_ties`).

    tau~_i = m_i tau_i / d,   m_i ~ Bernoulli(d) for each entry, d = 1 - p
    dare_linear: theta = theta_0 + lambda sum_i w_i tau~_i
    dare_ties:   theta = theta_0 + lambda (elected disjoint merge of the tau~_i, see merge/consensus.py)

Defaults:   d .5, division by d as in the paper, w 1; dare_linear: lambda .3 (that of task arithmetic); dare_ties:
            mean, lambda 1, no second trim (`trim` is the share that it keeps).
References: mergekit: the sum of absolute values of each tensor is restored (`rescale: l1`), and dare_ties sums and
            takes + where entries cancel; fusion_bench: dare_ties trims to .2 over the whole model, then sums.
Obeys:      order; experts equal to the base; lambda 0 or weights 0 give the base; adding X everywhere adds X; d 1 is
            task arithmetic, or TIES without a trim; entries are 0 or tau / d; the mean over seeds is tau; l1: the sum
            of absolute values stays; the mask depends on seed, expert and tensor only, so scaled differences scale the
            change.
Does not:   equal models (each has a mask of its own).
Source:     Yu et al., arXiv 2311.03099.
"""

from torch import Tensor

from direct_rlhf.merge.consensus import elected_survey, merge_elected
from direct_rlhf.merge.deltas import Reader, computing, deltas, onto_base_summed
from direct_rlhf.merge.dropping import dropped, dropped_l1, mask_key
from direct_rlhf.merge.laws import HOMOGENEOUS, LAWS
from direct_rlhf.merge.masks import chances, drop_
from direct_rlhf.merge.scopes import cuts, tensor_scope, trimmed
from direct_rlhf.merge.types import Block, Grain, Method, Passes, Survey
from direct_rlhf.recipe.merge_methods import DareLinearParameters, DareTiesParameters, Dropping


def merge_linear(block: Block, parameters: DareLinearParameters, survey: Survey | None = None) -> Tensor:
    return onto_base_summed(block, _readers(block, parameters), parameters, mean=parameters.merge == "mean")


def merge_ties(block: Block, parameters: DareTiesParameters, survey: Survey | None = None) -> Tensor:
    readers = _readers(block, parameters)
    if parameters.trim and not survey:
        scope = tensor_scope(block, readers)
        readers = trimmed(readers, cuts(scope, parameters.of("trim", len(readers)), parameters.at_cut))
    return merge_elected(block, readers, parameters, survey=survey)


def survey(passes: Passes) -> Survey | None:
    return elected_survey(passes, _readers, "trim")


def _readers(block: Block, parameters: Dropping) -> list[Reader]:
    return [
        _reader(read, block, expert, parameters) for expert, read in enumerate(deltas(block, computing(parameters)))
    ]


def _reader(read: Reader, block: Block, expert: int, parameters: Dropping) -> Reader:
    density = parameters.of("density", len(block.experts))[expert]
    if density == 1:
        return read
    chance, key = chances(density), mask_key(block, expert, parameters.seed)
    factor = 1 / density if parameters.rescale == "inverse" and density > 0 else 1.0

    def drop(piece_n: Tensor, start: int) -> Tensor:
        left_n = drop_(piece_n, block.start + start, chance, *key)
        return left_n if factor == 1 else left_n.mul_(factor)

    return dropped_l1(read, drop, block.experts[expert]) if parameters.rescale == "l1" else dropped(read, drop)


def _linear_grain(parameters: DareLinearParameters) -> Grain:
    return Grain.TENSOR if parameters.rescale == "l1" else Grain.ELEMENT


def _ties_grain(parameters: DareTiesParameters) -> Grain:
    whole = parameters.rescale == "l1" or parameters.trim or parameters.zero_sign == "majority"
    return Grain.TENSOR if whole else Grain.ELEMENT


LINEAR = Method(
    name="dare_linear",
    title="DARE",
    source="arXiv 2311.03099",
    parameters=DareLinearParameters,
    grain=_linear_grain,
    merge=merge_linear,
    obeys=frozenset(LAWS),
    neutral={"density": 1.0, "scale": 1.0, "merge": "mean"},
    random=True,
)
TIES = Method(
    name="dare_ties",
    title="DARE-TIES",
    source="arXiv 2311.03099",
    parameters=DareTiesParameters,
    grain=_ties_grain,
    merge=merge_ties,
    obeys=HOMOGENEOUS | {"one", "equal"},
    neutral={"density": 1.0},
    random=True,
    survey=survey,
)
