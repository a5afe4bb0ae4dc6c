"""Weight average; a rewarded soup is one with an expert per reward and weights on the simplex.

    theta = sum_i w_i theta_i / sum_i w_i           (without the division if normalize is false)

Computed as theta_1 + sum_i w_i (theta_i - theta_1) / sum_i w_i, so that equal models give that model to the last bit.

Defaults:   w 1 for every model; all tensors, embeddings and head included.
Obeys:      order; equal models; adding X to every model adds X; linear; within the entrywise smallest and largest
            (weights not negative).
Does not:   weights that are all 0 (there is no base to return; refused when normalized).
Source:     Wortsman et al., arXiv 2203.05482; Rame et al. (rewarded soups), arXiv 2306.04488.
"""

import torch
from torch import Tensor

from direct_rlhf.merge.deltas import added, computing, pieces
from direct_rlhf.merge.laws import LAWS
from direct_rlhf.merge.types import Block, Grain, Method, Survey
from direct_rlhf.recipe.merge_methods import LinearParameters


def merge(block: Block, parameters: LinearParameters, survey: Survey | None = None) -> Tensor:
    dtype = computing(parameters)
    weights = parameters.of("weight", len(block.experts))
    models = [expert.reshape(-1) for expert in block.experts]
    merged = torch.empty(block.experts[0].shape, dtype=dtype, device=models[0].device)
    merged_n = merged.view(-1)
    for start, end in pieces(merged_n):
        parts = [model[start:end] for model in models]
        merged_n[start:end] = (_mean if parameters.normalize else _sum)(parts, weights, dtype)
    return merged


def _mean(parts: list[Tensor], weights: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    first_n = parts[0].to(dtype)
    change_n = torch.zeros_like(first_n)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        change_n.add_(part.to(dtype) - first_n, alpha=weight)
    return added(first_n, change_n.div_(sum(weights)), 1.0)


def _sum(parts: list[Tensor], weights: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    total_n = parts[0].to(dtype) * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total_n.add_(part.to(dtype), alpha=weight)
    return total_n


METHOD = Method(
    name="linear",
    title="Weight average",
    source="arXiv 2203.05482; soups: arXiv 2306.04488",
    parameters=LinearParameters,
    grain=lambda parameters: Grain.ELEMENT,
    merge=merge,
    obeys=frozenset(LAWS) - {"zero"},
    needs_base=False,
)
