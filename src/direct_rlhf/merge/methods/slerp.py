"""Spherical interpolation between two models, tensor by tensor.

    cos phi = <v_0, v_1> / (|v_0| |v_1|)
    v = [sin((1-t) phi) v_0 + sin(t phi) v_1] / sin phi
    |cos phi| > .9995: (1-t) v_0 + t v_1

phi is that of the directions; the vectors themselves are not normalised. ``on: weights`` takes the weights for v,
``on: delta`` their differences to the base, which the result is added to. A vector shorter than 1e-8 has no
direction (cos phi 0). Opposite vectors are interpolated linearly, which passes 0: the card reports the cosine.

Defaults:   t .5, on the weights.
Obeys:      slerp(a, b, t) = slerp(b, a, 1-t); the ends at t 0 and 1; equal models; equal norms stay (beyond .9995); a
            positive factor on both models passes through.
Does not:   adding X to both models adds X (on: weights); order at t other than .5; linear in the models.
Source:     Shoemake, SIGGRAPH 1985; on weights: mergekit's convention.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from direct_rlhf.merge.deltas import Reader, computing, deltas, onto_base, pieces, weighted_sum
from direct_rlhf.merge.types import Block, Grain, Method, Survey
from direct_rlhf.recipe.merge_methods import SlerpParameters

COLLINEAR = 0.9995
SHORT = 1e-8


def merge(block: Block, parameters: SlerpParameters, survey: Survey | None = None) -> Tensor:
    dtype = computing(parameters)
    on_delta = parameters.on == "delta"
    readers = deltas(block, dtype) if on_delta else [_weights(expert, dtype) for expert in block.experts]
    cosine = _cosine(readers, block.experts[0])
    block.notes["cosine"] = cosine

    def interpolated(start: int, end: int) -> Tensor:
        first_n, second_n = (read(start, end) for read in readers)
        if not abs(cosine) <= COLLINEAR:
            return torch.lerp(first_n, second_n, parameters.t)  # exact at both ends and between equal vectors
        return weighted_sum([first_n, second_n], _factors(cosine, parameters.t), mean=False)

    if on_delta:
        return onto_base(block, interpolated, scale=1.0, dtype=dtype)
    merged = torch.empty(block.experts[0].shape, dtype=dtype, device=block.experts[0].device)
    for start, end in pieces(merged):
        merged.view(-1)[start:end] = interpolated(start, end)
    return merged


def _weights(expert: Tensor, dtype: torch.dtype) -> Reader:
    expert_n = expert.reshape(-1)
    return lambda start, end: expert_n[start:end].to(dtype, copy=True)


def _cosine(readers: Sequence[Reader], like: Tensor) -> float:
    product = first = second = 0.0
    for start, end in pieces(like):
        first_n, second_n = (read(start, end) for read in readers)
        product += float(first_n @ second_n)
        first += float(first_n @ first_n)
        second += float(second_n @ second_n)
    norms = [math.sqrt(square) if math.sqrt(square) > SHORT else 1.0 for square in (first, second)]
    return max(-1.0, min(1.0, product / math.prod(norms)))


def _factors(cosine: float, t: float) -> tuple[float, float]:
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


METHOD = Method(
    name="slerp",
    title="SLERP",
    source="Shoemake 1985",
    parameters=SlerpParameters,
    grain=lambda parameters: Grain.TENSOR,
    merge=merge,
    obeys=frozenset({"base", "equal", "scaling", "negation"}),
    needs_base=False,
    experts=(2, 2),
)
