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


def makes_kernels(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether a product of this type costs memory and time for every new shape (see `maths.attention.few_sizes`)."""
    return torch.device(device).type == "cpu" and dtype is torch.bfloat16


def prefers_onednn(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether products with a laid-out weight are left to oneDNN rather than to MKL.

    MKL has no bfloat16 layout, and keeps its best float32 kernels for Intel's processors: on an AMD EPYC the sampler is
    1.3 times as fast with oneDNN.
    """
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.bfloat16 or (dtype is torch.float32 and "AMD" in processor())


@cache
def processor() -> str:
    """The processor's name, empty where torch cannot tell."""
    look = getattr(torch.cpu, "get_capabilities", None)  # torch >= 2.12
    return str(look().get("cpu_name", "")) if look else ""


@cache
def has_bfloat16() -> bool:
    """Whether this processor has bfloat16 instructions (taken for granted where torch cannot tell)."""
    look = getattr(torch.cpu, "get_capabilities", None)  # torch >= 2.12
    if look is None:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    known = look()
    return any(known.get(name) for name in NATIVE_BFLOAT16) or not known
