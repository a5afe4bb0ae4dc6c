"""Estimates of KL(policy || reference) from sampled tokens, and the controllers of their weight.

k1 goes into the token reward and k3 is only logged: as a reward, k1 gives exactly the gradient of the KL and k3
loses it near the reference. Source: J. Schulman, "Approximating KL divergence" (2020).
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from direct_rlhf.errors import DivergenceError
from direct_rlhf.maths.masked import at_least_float32, check_same_shape, selected

LOG_RATIO_LIMIT = 20.0  # nats; beyond it exp says nothing more and soon overflows
CORRECTION_LIMIT = 0.2  # of the controller's relative error


def log_ratio(logp: Tensor, ref: Tensor, mask: Tensor | None = None) -> Tensor:
    """``logp - ref`` in nats, clamped to +-20; 0 where a mask is given and False. Any equal shapes."""
    if mask is not None:
        logp, ref = selected(mask, logp, ref)
    check_same_shape(logp, ref)
    return (at_least_float32(logp) - at_least_float32(ref)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clamp_hits(logp: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """How many True slots have |logp - ref| above 20 (an int64 scalar): they are clamped, so they must be counted."""
    logp, ref = selected(mask, logp, ref)
    return ((logp - ref).abs() > LOG_RATIO_LIMIT).sum()


def k1(logp: Tensor, ref: Tensor, mask: Tensor | None = None) -> Tensor:
    """logp - ref: unbiased, of either sign, in nats. Shapes as given; ``mask`` zeroes slots and their gradient."""
    return log_ratio(logp, ref, mask)


def k2(logp: Tensor, ref: Tensor, mask: Tensor | None = None) -> Tensor:
    """(logp - ref)^2 / 2: biased, never negative; its gradient as a one-step loss is that of the KL."""
    return log_ratio(logp, ref, mask).square() / 2


def k3(logp: Tensor, ref: Tensor, mask: Tensor | None = None) -> Tensor:
    """exp(ref - logp) - 1 + logp - ref: unbiased and never negative."""
    ratio = log_ratio(logp, ref, mask)
    return torch.expm1(-ratio) + ratio


@dataclass(frozen=True)
class AdaptiveKL:
    """The KL weight beta, steered towards a target.

        beta <- beta * (1 + clip(KL / target - 1, +-0.2) * n / horizon)

    Units:   KL and target: nats per answer (sequence *sum*, mean over answers); n and horizon: episodes.
    Errors:  ValueError if target or horizon is not positive or beta is negative; DivergenceError on a non-finite KL.
    Source:  Ziegler et al., arXiv 1909.08593, section 2.2.
    """

    coefficient: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        _check_coefficient(self.coefficient)
        for name in ("target", "horizon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"AdaptiveKL.{name} must be positive, got {getattr(self, name)}")

    def update(self, mean_sequence_kl: float, n: int) -> "AdaptiveKL":
        """The controller after an update on ``n`` episodes with this mean sequence KL."""
        if not math.isfinite(mean_sequence_kl):
            raise DivergenceError(
                f"the mean sequence KL is {mean_sequence_kl}, so the KL weight cannot be steered: "
                "look for non-finite log-probabilities in this iteration's rollouts"
            )
        error = max(-CORRECTION_LIMIT, min(CORRECTION_LIMIT, mean_sequence_kl / self.target - 1))
        return replace(self, coefficient=self.coefficient * (1 + error * n / self.horizon))

    def state(self) -> dict[str, float]:
        """Plain numbers for a checkpoint; ``AdaptiveKL(**state)`` restores it."""
        return asdict(self)


@dataclass(frozen=True)
class FixedKL:
    """A KL weight that stays what it is; it has the verbs of ``AdaptiveKL``."""

    coefficient: float

    def __post_init__(self) -> None:
        _check_coefficient(self.coefficient)

    def update(self, mean_sequence_kl: float, n: int) -> "FixedKL":
        """Itself."""
        return self

    def state(self) -> dict[str, float]:
        """Plain numbers for a checkpoint; ``FixedKL(**state)`` restores it."""
        return asdict(self)


def _check_coefficient(coefficient: float) -> None:
    if not (coefficient >= 0 and math.isfinite(coefficient)):
        raise ValueError(f"the KL coefficient must be a finite number of at least 0, got {coefficient}")
