"""Which floating-point type a device really computes in."""

from functools import cache

import torch

from direct_rlhf.recipe.schema import Recipe

NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # what processors call it


def arithmetic(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 for bfloat16 on a processor that would only imitate it: slower there, and less exact."""
    if dtype is torch.bfloat16 and torch.device(device).type == "cpu" and not has_bfloat16():
        return torch.float32
    return dtype


def settled(recipe: Recipe, device: str) -> Recipe:
    """The recipe with the type that ``device`` computes in as its ``model.dtype``."""
    if arithmetic(device, getattr(torch, recipe.model.dtype)) is not torch.float32 or recipe.model.dtype == "float32":
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "float32"})})


@cache
def has_bfloat16() -> bool:
    """Whether this processor has bfloat16 instructions (taken for granted where torch cannot tell)."""
    look = getattr(torch.cpu, "get_capabilities", None)  # torch >= 2.12
    if look is None:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    known = look()
    return any(known.get(name) for name in NATIVE_BFLOAT16) or not known
