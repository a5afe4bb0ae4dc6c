"""Task arithmetic.

    theta = theta_0 + lambda sum_i w_i tau_i

Defaults:   lambda .3 (as fusion_bench; mergekit and MergeLM take 1), w 1.
Obeys:      order; experts equal to the base; lambda 0 or weights 0 give the base; adding X everywhere adds X; linear in
            the differences; one expert at lambda 1 is that expert.
Does not:   equal models give that model only if lambda sum_i w_i is 1 (`merge: mean` and lambda 1).
Source:     Ilharco et al., arXiv 2212.04089.
"""

from torch import Tensor

from direct_rlhf.merge.deltas import computing, deltas, onto_base_summed
from direct_rlhf.merge.laws import LAWS
from direct_rlhf.merge.types import Block, Grain, Method, Survey
from direct_rlhf.recipe.merge_methods import TaskArithmeticParameters


def merge(block: Block, parameters: TaskArithmeticParameters, survey: Survey | None = None) -> Tensor:
    readers = deltas(block, computing(parameters))
    return onto_base_summed(block, readers, parameters, mean=parameters.merge == "mean")


METHOD = Method(
    name="task_arithmetic",
    title="Task arithmetic",
    source="arXiv 2212.04089",
    parameters=TaskArithmeticParameters,
    grain=lambda parameters: Grain.ELEMENT,
    merge=merge,
    obeys=frozenset(LAWS),
    neutral={"scale": 1.0, "merge": "mean"},
)
