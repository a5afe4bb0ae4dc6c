"""WUDI: the difference that disturbs each expert least on the inputs that expert responds to.

    loss(tau_m) = sum_i |(tau_m - tau_i) tau_i^T|^2 / |tau_i|^2           (Frobenius; rows are outputs)
    exact: tau_m = B G^+,   G = sum_i tau_i^T tau_i / |tau_i|^2,   B = sum_i tau_i tau_i^T tau_i / |tau_i|^2
    adam:  ``steps`` steps of Adam at ``learning_rate`` from sum_i tau_i
    theta = theta_0 + lambda tau_m

(With G_i = tau_i^T tau_i / |tau_i|^2 for the inputs' second moments this is RegMean.)

Defaults:   exact, lambda 1, w 1 (on tau_i). Directions of G below 1e-11 of its largest eigenvalue are left out: float64
            knows no more of them. Of the two Gram matrices of the stacked tau_i the smaller one is decomposed.
References: original, fusion_bench: adam, learning rate 1e-5, 300 steps: each entry moves about .004 at most, whatever
            the scale of the weights.
Obeys:      order; experts equal to the base; lambda 0 or weights 0 give the base; adding X everywhere adds X; one
            model; equal models; degree 1 (exact); experts with orthogonal row spaces add up; exact: the
            gradient is 0 and the loss no more than that of the sum.
Does not:   linear in the differences; adam: degree 1.
Source:     Cheng et al., arXiv 2503.08099.
"""

import torch
from torch import Tensor

from direct_rlhf.merge.laws import HOMOGENEOUS
from direct_rlhf.merge.matrices import Matrix, merge_by_matrix
from direct_rlhf.merge.types import Block, Grain, Method, Survey
from direct_rlhf.recipe.merge_methods import WudiParameters

LEAST = 1e-11  # of the largest eigenvalue


def merge(block: Block, parameters: WudiParameters, survey: Survey | None = None) -> Tensor:
    def merged(matrices: list[Matrix], part: Block) -> Tensor:
        changed = [matrix.delta_MN for matrix in matrices if matrix.delta_MN.any()]
        if not changed:
            return torch.zeros_like(matrices[0].delta_MN)
        return exact(changed) if parameters.solver == "exact" else by_adam(changed, parameters)

    return merge_by_matrix(block, parameters, merged)


def exact(deltas: list[Tensor]) -> Tensor:
    """B G^+, or the same as C (A A^T)^+ A: A is all tau_i / |tau_i| stacked, C all tau_i tau_i^T / |tau_i| in a row."""
    units = [delta_MN.double() / delta_MN.norm(dtype=torch.float64) for delta_MN in deltas]
    rows, columns = deltas[0].shape
    if len(deltas) * rows >= columns:
        grams = [unit_MN.T @ unit_MN for unit_MN in units]
        wanted_MN = sum(delta_MN.double() @ gram_NN for delta_MN, gram_NN in zip(deltas, grams, strict=True))
        return wanted_MN @ _pseudo_inverse(sum(grams))
    stacked_SN = torch.cat(units)
    outputs_MS = torch.cat([delta_MN.double() @ unit_MN.T for delta_MN, unit_MN in zip(deltas, units, strict=True)], 1)
    return outputs_MS @ _pseudo_inverse(stacked_SN @ stacked_SN.T) @ stacked_SN


def by_adam(deltas: list[Tensor], parameters: WudiParameters) -> Tensor:
    """The original's descent."""
    shares = [delta_MN.norm().square() for delta_MN in deltas]
    gram_NN = sum(delta_MN.T @ delta_MN / share for delta_MN, share in zip(deltas, shares, strict=True))
    wanted_MN = sum(delta_MN @ (delta_MN.T @ delta_MN) / share for delta_MN, share in zip(deltas, shares, strict=True))
    merged = torch.nn.Parameter(torch.stack(deltas).sum(0))
    optimiser = torch.optim.Adam([merged], lr=parameters.learning_rate)
    for _ in range(parameters.steps):
        merged.grad = 2 * (merged.detach() @ gram_NN - wanted_MN)
        optimiser.step()
    return merged.detach()


def _pseudo_inverse(gram_SS: Tensor) -> Tensor:
    values_S, vectors_SS = torch.linalg.eigh(gram_SS)
    known = values_S > LEAST * values_S[-1]
    return vectors_SS[:, known] / values_S[known] @ vectors_SS[:, known].T


METHOD = Method(
    name="wudi",
    title="WUDI",
    source="arXiv 2503.08099",
    parameters=WudiParameters,
    grain=lambda parameters: Grain.TENSOR,
    merge=merge,
    obeys=HOMOGENEOUS | {"one", "equal"},
)
