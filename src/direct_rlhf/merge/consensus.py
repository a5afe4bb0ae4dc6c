"""Sign election and disjoint merge, which TIES, DARE-TIES, DELLA and Breadcrumbs share.

    x_i    = w_i tau_i                               what is left of each expert's difference
    gamma  = sgn(sum_i x_i)                          elected; where the sum is 0, the sign that most entries elect
    merged = sum of the x_i that agree with gamma    (divided by the sum of their w_i for the mean; by 1 if that is 0)

The sign that most entries elect is that of the sum of gamma over the tensor (or the model), and - if that is 0, as in
the code of TIES; `zero_sign: positive` takes +, as mergekit does.

Legend: T experts, n elements of a piece.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from direct_rlhf.merge.deltas import Reader, added, base_of, computing, onto_base, pieces
from direct_rlhf.merge.scopes import ReadersOf, cuts, model_scope, shared_setting, trimmed
from direct_rlhf.merge.selection import Cut
from direct_rlhf.merge.types import Block, Passes, Survey
from direct_rlhf.recipe.merge_methods import Electing


@dataclass(frozen=True)
class Election:
    """A piece of the merge, with the negative side where the weighted entries cancel exactly."""

    merged_n: Tensor
    lead: float  # entries that elect + less those that elect -
    cancelled: Tensor  # their places
    positive: Tensor  # what the merge is there if + is elected


def elect(parts: Iterable[Tensor], weights: Sequence[float], *, mean: bool) -> Election:
    """Elect signs in a piece and merge what agrees. Overwrites the parts, and holds one at a time.

    Positive and negative entries are summed apart, and the sign of their sum, as a number, selects one of the sums.
    """
    if mean and len(set(weights)) == 1 and weights[0] > 0:
        weights = (1.0,) * len(weights)  # equal weights change no mean
    sums: list[Tensor] = []
    for part_n, weight in zip(parts, weights, strict=True):
        if not sums:
            sums = [torch.zeros_like(part_n) for _ in range(4)]
            side_n = torch.empty_like(part_n)
        positive_n, negative_n, for_n, against_n = sums
        if weight != 1:
            part_n.mul_(weight)
        positive_n.add_(torch.clamp(part_n, min=0, out=side_n))
        negative_n.add_(torch.clamp(part_n, max=0, out=side_n))
        if mean:
            part_n.sign_()
            for_n.add_(torch.clamp(part_n, min=0, out=side_n), alpha=weight)
            against_n.sub_(part_n.clamp_(max=0), alpha=weight)
    sum_n = torch.add(positive_n, negative_n, out=side_n)
    cancelled = _cancelled(sum_n, positive_n)
    plus_n = sum_n.sign_()
    lead = float(plus_n.sum())
    minus_n = 1 - plus_n.clamp_(min=0)
    tied = positive_n[cancelled]
    if mean:
        tied = tied.div_(_divisor(for_n[cancelled]))
    merged_n = negative_n.mul_(minus_n).addcmul_(positive_n, plus_n)
    if mean:
        merged_n.div_(_divisor(against_n.mul_(minus_n).addcmul_(for_n, plus_n)))
    return Election(merged_n, lead, cancelled, tied)


def merge_elected(
    block: Block, readers: Sequence[Reader], parameters: Electing, *, row: int = 1, survey: Survey | None = None
) -> Tensor:
    """theta_0 + scale merged, for a block, in pieces of whole ``row``s; ``survey`` is that of `elected_survey`."""
    if survey:
        readers = trimmed(readers, survey.facts["cuts"][block.name])
    weights, mean = parameters.of("weight", len(readers)), parameters.merge == "mean"
    base_n = base_of(block).reshape(-1)
    lead = 0.0
    open_cases: list[tuple[Tensor, Tensor]] = []  # places where entries cancel, and what is there if + is elected

    def change(start: int, end: int) -> Tensor:
        nonlocal lead
        election = elect((read(start, end) for read in readers), weights, mean=mean)
        lead += election.lead
        if len(election.cancelled):
            places = election.cancelled + start
            open_cases.append((places, added(base_n[places], election.positive, parameters.scale)))
        return election.merged_n

    merged = onto_base(block, change, scale=parameters.scale, dtype=computing(parameters), row=row)
    if parameters.zero_sign == "positive" or (survey.facts["lead"] if survey else lead) > 0:
        for places, values in open_cases:
            merged.view(-1)[places] = values
    return merged


def elected_survey(passes: Passes, readers_of: ReadersOf, share: str) -> Survey | None:
    """Where every expert's largest end in every tensor, and by how much + leads in the model; None if not needed.

    ``share`` names the parameter that says how much is kept. One or two passes an expert, and one of all experts.
    """
    parameters = shared_setting(passes, "scope", share)
    if parameters.scope == "tensor" or getattr(parameters, share) is None:
        return None
    scope, begins = model_scope(passes, readers_of)
    count = len(next(passes())[0].experts)
    found = cuts(scope, parameters.of(share, count), parameters.at_cut)
    in_tensor: dict[str, list[Cut]] = {name: [cut.after(begin) for cut in found] for name, begin in begins.items()}
    lead = 0.0
    if parameters.zero_sign == "majority":
        for block, own in passes():
            readers = trimmed(readers_of(block, own), in_tensor[block.name])
            for start, end in pieces(block.experts[0]):
                parts = (read(start, end) for read in readers)
                lead += elect(parts, own.of("weight", count), mean=False).lead
    return Survey({"cuts": in_tensor, "lead": lead})


def _divisor(count_n: Tensor) -> Tensor:
    """``count_n`` with 1 for 0."""
    return count_n.add_(1 - count_n.sign().abs_())


def _cancelled(sum_n: Tensor, positive_n: Tensor) -> Tensor:
    """Places where there is something to sum, and it sums to 0."""
    if sum_n.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero((sum_n.numpy() == 0) & (positive_n.numpy() > 0)))
    return ((sum_n == 0) & (positive_n > 0)).nonzero().flatten()
