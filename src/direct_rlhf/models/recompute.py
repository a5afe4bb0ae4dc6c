"""Activation checkpointing: a layer keeps its input alone, and computes itself again in the backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MARK = "recomputes"


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformer, whatever its family calls them: its longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def recompute_layers(model: nn.Module) -> None:
    """From now on every layer of the model computes itself again in the backward pass; no result changes."""
    for layer in layers_of(model):
        if getattr(layer, MARK, False):  # of a trunk that several roles share
            continue
        forward = layer.forward
        setattr(layer, MARK, True)
        layer.forward = partial(_forward, forward)


def recomputed(layer: nn.Module, step: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``step``, a way to compute the layer; once more in the backward pass, where the layer is so marked."""
    return partial(_forward, step) if getattr(layer, MARK, False) else step


def _forward(step: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return step(*arguments, **options)
    return checkpoint(step, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
