"""What the tests of the merge methods share: experts, and a merge as the executor would ask for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from direct_rlhf.merge.methods import METHODS
from direct_rlhf.merge.types import Block, Grain, Survey

KEYS = tuple("abcdefgh")
NAME = "model.layers.0.mlp.up_proj.weight"
GOLDEN = (
    torch.tensor([0.9, -0.1, 0.4, -0.5, 0.05, 0.3, 0, -0.8], dtype=torch.float64),
    torch.tensor([0.5, 0.2, -0.6, -0.7, 0.1, -0.3, 0.05, 0], dtype=torch.float64),
    torch.tensor([-0.4, 0.6, 0.2, -0.2, 0.8, 0.1, -0.05, 0.3], dtype=torch.float64),
)


def tensors(seed: int, count: int, shape: Sequence[int] = (6, 9), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=draw, dtype=dtype) for _ in range(count)]


def whole(base: Tensor | None, experts: Sequence[Tensor], keys: Sequence[str] = KEYS, name: str = NAME) -> Block:
    """One tensor of every model."""
    return Block(name, base, tuple(experts), tuple(keys[: len(experts)]), tuple(experts[0].shape))


def cut(block: Block, grain: Grain, size: int | None = None) -> list[Block]:
    """The blocks that an executor cuts a tensor into: of ``size`` elements or rows; None: one."""
    if grain is Grain.TENSOR:
        return [block]
    row = 1 if grain is Grain.ELEMENT else (block.shape[-1] if block.shape else 1)
    step = (size or block.experts[0].numel()) * row
    blocks = []
    for start in range(0, block.experts[0].numel(), step):
        parts = [None if x is None else x.reshape(-1)[start : start + step] for x in (block.base, *block.experts)]
        shaped = [x if x is None or grain is Grain.ELEMENT else x.view(-1, row) for x in parts]
        blocks.append(Block(block.name, shaped[0], tuple(shaped[1:]), block.keys, block.shape, start, block.notes))
    return blocks


def merge_block(
    method: str, block: Block, parameters: Any, survey: Survey | None = None, size: int | None = None
) -> Tensor:
    """The merged tensor, as the executor puts it together from its blocks."""
    chosen = METHODS[method]
    parts = [chosen.merge(part, parameters, survey).reshape(-1) for part in cut(block, chosen.grain(parameters), size)]
    return torch.cat(parts).view(block.shape)


def merged(
    method: str, base: Tensor | None, experts: Sequence[Tensor], *, size: int | None = None, **settings: Any
) -> Tensor:
    """A merge of tensors under ``settings``; float64 if the experts are."""
    if experts[0].dtype == torch.float64:
        settings = {"precision": "float64", **settings}
    parameters = METHODS[method].parameters.model_validate(settings)
    parameters.check(len(experts), base=base is not None)
    return merge_block(method, whole(base, experts), parameters, size=size)


def change(method: str, deltas: Sequence[Tensor], **settings: Any) -> Tensor:
    """The merged difference to a base of 0."""
    return merged(method, torch.zeros_like(deltas[0]), deltas, **settings)
