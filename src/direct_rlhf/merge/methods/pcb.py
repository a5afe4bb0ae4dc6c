"""PCB: each entry weighed by how large it is in its expert and how well it agrees with the others.

    a_i = ((|tau_i| - min) / (max - min))^2                 within the expert
    b_i = exp(T a_i) tanh(tau_i sum_j tau_j)                within and between
    s_i = (max(b_i, q_i) - q_i) / (max b_i - q_i)           q_i: the n-th largest b_i, n - int(n (1 - rho)); 0 if equal
    theta = theta_0 + lambda sum_i w_i s_i tau_i / max(sum_i s_i, 1e-12)

Defaults:   per tensor, rho .1, lambda 1.2, w 1. `scope: global` takes min, max and q_i over the whole model.
References: original: whole model, and |tau_i| clamped to its values at .01 % from below and above first (in a_i and in
            the sum; this always reaches the largest).
Obeys:      order; experts equal to the base; lambda 0 or weights 0 give the base; adding X everywhere adds X; at
            lambda 1 the change is within the experts' range, or 0; tau -> -tau negates the change.
Does not:   tau -> c tau scales the change (tanh is not linear); equal models.
Source:     Du et al., arXiv 2410.02396.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from direct_rlhf.merge.deltas import computing, deltas, onto_base
from direct_rlhf.merge.laws import HOMOGENEOUS
from direct_rlhf.merge.scopes import Scope, model_scope, shared_setting, tensor_scope
from direct_rlhf.merge.selection import Ranking
from direct_rlhf.merge.types import Block, Grain, Method, Passes, Survey
from direct_rlhf.recipe.merge_methods import PcbParameters

LEAST = 1e-12  # divisor where no expert counts


@dataclass(frozen=True)
class Range:
    """What an expert's entries are measured by, over the scope."""

    low: float  # of the magnitudes
    high: float
    quantile: float = 0.0  # of the balance
    top: float = 0.0


def merge(block: Block, parameters: PcbParameters, survey: Survey | None = None) -> Tensor:
    readers = deltas(block, computing(parameters))
    ranges: Sequence[Range] = (
        survey.facts["ranges"] if survey else _ranges(tensor_scope(block, readers), len(readers), parameters)
    )
    weights = parameters.of("weight", len(readers))

    def change(start: int, end: int) -> Tensor:
        parts = [read(start, end) for read in readers]
        total_n = _sum(parts)
        merged_n, shares_n = torch.zeros_like(total_n), torch.zeros_like(total_n)
        for part_n, own, weight in zip(parts, ranges, weights, strict=True):
            if own.top <= own.quantile:
                continue
            balance_n = _balance(part_n, total_n, own, len(parts))
            share_n = balance_n.sub_(own.quantile).clamp_(min=0).div_(own.top - own.quantile)
            merged_n.addcmul_(share_n, _clamped(part_n, own), value=weight)
            shares_n.add_(share_n)
        return merged_n.div_(shares_n.clamp_(min=LEAST))

    return onto_base(block, change, scale=parameters.scale, dtype=computing(parameters))


def survey(passes: Passes) -> Survey | None:
    """The ranges of every expert over the whole model."""
    parameters = shared_setting(passes, "scope", "density", "clamp_tails")
    if parameters.scope == "tensor":
        return None
    scope, _ = model_scope(passes, lambda block, own: deltas(block, computing(own)))
    return Survey({"ranges": _ranges(scope, len(next(passes())[0].experts), parameters)})


def _ranges(scope: Scope, count: int, parameters: PcbParameters) -> list[Range]:
    densities = parameters.of("density", count)
    return [_range(scope, expert, count, densities[expert], parameters.clamp_tails) for expert in range(count)]


def _range(scope: Scope, expert: int, count: int, density: float, tails: float) -> Range:
    n = scope.count

    def magnitudes(share: int = 1) -> Iterator[tuple[int, Tensor]]:
        for stretch in scope.stretches(share):
            yield stretch.flat, stretch.readers[expert](stretch.start, stretch.end).abs_()

    if tails:
        order = Ranking(magnitudes, n)
        low, high = order.value(n - int(n * tails)), order.value(min(n, n - int(n * (1 - tails) - 1)))
    else:
        ends = [(float(piece_n.min()), float(piece_n.max())) for _, piece_n in magnitudes()]
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
    own = Range(low, high)
    if not high > low:
        return own

    def balances(share: int = 1) -> Iterator[tuple[int, Tensor]]:
        for stretch in scope.stretches(share):
            parts = [read(stretch.start, stretch.end) for read in stretch.readers]
            yield stretch.flat, _balance(parts[expert], _sum(parts), own, count)

    quantile = Ranking(balances, n, signed=True).value(n - min(int(n * (1 - density)), n - 1))
    return Range(low, high, quantile, max(float(piece_n.max()) for _, piece_n in balances()))


def _balance(part_n: Tensor, total_n: Tensor, own: Range, count: int) -> Tensor:
    """b_i."""
    within_n = part_n.abs().clamp_(own.low, own.high).sub_(own.low).div_(own.high - own.low).square_()
    return within_n.mul_(count).exp_().mul_((part_n * total_n).tanh_())


def _clamped(part_n: Tensor, own: Range) -> Tensor:
    return part_n.abs().clamp_(own.low, own.high).mul_(part_n.sign())


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total_n = torch.zeros_like(parts[0])
    for part_n in parts:
        total_n.add_(part_n)
    return total_n


METHOD = Method(
    name="pcb",
    title="PCB",
    source="arXiv 2410.02396",
    parameters=PcbParameters,
    grain=lambda parameters: Grain.TENSOR,
    merge=merge,
    obeys=HOMOGENEOUS - {"scaling"},
    neutral={"density": 1.0, "scale": 1.0},
    survey=survey,
)
