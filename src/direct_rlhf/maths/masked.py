"""Sums, means and variances over the True slots of a mask; what lies under the mask cannot reach a value or a gradient.

Legend: B answers, T response slots. ``0 * NaN`` is NaN, so slots are chosen with ``where`` and never multiplied out,
and chosen *before* any ``exp`` or ``log``, whose backward would make NaN from a masked slot.
"""

import torch
from torch import Tensor


def check_same_shape(*tensors: Tensor) -> None:
    """Raise ValueError unless all shapes are equal: broadcasting hides swapped axes."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"tensors of equal shape expected, got {', '.join(map(str, shapes))}")


def selected(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Each tensor in float32 (float64 stays), 0 where the mask is False.

    Cases:   the gradient of a masked slot is exactly 0, whatever the slot holds.
    Errors:  ValueError if shapes differ or the mask is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask of dtype bool expected, got {mask.dtype}; compare it with 0 first")
    check_same_shape(mask, *tensors)
    return [torch.where(mask, at_least_float32(tensor), 0.0) for tensor in tensors]


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def masked_mean(x: Tensor, mask: Tensor, denominator: float | None = None) -> Tensor:
    """Mean over the True slots.

        sum_m x / N           N = ``denominator`` if given, else the number of True slots

    Cases:   pass the N of the whole optimiser step to every micro-batch and the parts add up to the global mean;
             no True slot: 0.
    Shapes:  any, both equal. Returns a scalar.
    Errors:  ValueError if shapes differ, the mask is not bool, or the denominator is not positive.
    """
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be positive, got {denominator}")
    (chosen,) = selected(mask, x)
    return chosen.sum() / (mask.sum().clamp(min=1) if denominator is None else denominator)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divides by N) over the True slots; no True slot: 0. Shapes and errors: ``masked_mean``."""
    (chosen,) = selected(mask, x)
    return masked_mean((chosen - masked_mean(chosen, mask)).square(), mask)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` with mean 0 and variance 1 over the True slots of the whole batch.

        (x - mean) / sqrt(var + 1e-8)          population variance; the mean is removed, not added back

    Cases:   one True slot, or all equal: 0. Call it once on all answers of a rollout batch, before minibatches.
    Shapes:  any, both equal. Returns the same shape, 0 under the mask.
    Source:  rules 6 to 8 of the project's conventions.
    """
    (chosen,) = selected(mask, x)
    centred = chosen - masked_mean(chosen, mask)
    return torch.where(mask, centred * torch.rsqrt(masked_var(chosen, mask) + 1e-8), 0.0)
