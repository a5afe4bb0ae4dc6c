"""PPO-Lagrangian: reward under a bound on the mean cost. Legend: B answers, T response slots.

The two streams have a critic and advantages each, and both carry the whole KL penalty:

    r_t = -beta k1_t + [t = last] score      token_rewards(score_B, k1_BT, mask_BT, beta=beta)
    c_t = +beta k1_t + [t = last] cost       token_rewards(cost_B, k1_BT, mask_BT, beta=-beta)

so the combined KL weight is (beta + lambda beta) / (1 + lambda) = beta for every lambda. With half of the penalty in
each stream it would be beta / 2.
"""

import math
import sys
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from direct_rlhf.errors import DivergenceError
from direct_rlhf.maths.masked import at_least_float32, check_same_shape


@dataclass(frozen=True)
class Multiplier:
    """The weight lambda of the cost, raised while the mean cost J_c is above its bound d and lowered below it.

        log lambda <- min(log lambda + learning_rate (J_c - d) lambda, log maximum)

    Cases:   learning_rate=0: lambda stays what it is, to the last bit. The step grows with lambda, so a small lambda
             moves slowly; it never reaches 0.
    Units:   cost and bound: normalised cost units; lambda: reward units per cost unit.
    Errors:  ValueError if a value is not finite, lambda is not positive or above the maximum, or the learning rate is
             negative; DivergenceError on a non-finite cost.
    Source:  Dai et al., arXiv 2310.12773, eq. 31; the cap is ours.
    """

    value: float
    learning_rate: float
    bound: float
    maximum: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value):
                raise ValueError(f"Multiplier.{name} must be finite, got {value}")
        if not 0 < self.value <= self.maximum:
            raise ValueError(f"Multiplier.value must be positive and at most maximum={self.maximum}, got {self.value}")
        if self.learning_rate < 0:
            raise ValueError(f"Multiplier.learning_rate must be at least 0, got {self.learning_rate}")

    def update(self, mean_cost: float) -> "Multiplier":
        """The multiplier after episodes with this mean cost."""
        if not math.isfinite(mean_cost):
            raise DivergenceError(
                f"the mean cost is {mean_cost}, so the Lagrange multiplier cannot be updated: "
                "look for non-finite scores of the cost model in this iteration's rollouts"
            )
        step = self.learning_rate * (mean_cost - self.bound) * self.value
        # exp overflows above 709; below -745 it is 0, of which there is no logarithm to go on from
        grown = max(self.value * math.exp(min(step, 700.0)), sys.float_info.min)
        return replace(self, value=min(grown, self.maximum))

    def state(self) -> dict[str, float]:
        """Plain numbers for a checkpoint; ``Multiplier(**state)`` restores it."""
        return asdict(self)


def combine(reward_advantage_BT: Tensor, cost_advantage_BT: Tensor, multiplier: float) -> Tensor:
    """One advantage from those of the reward and of the cost.

        A = (A_r - lambda A_c) / (1 + lambda)

    Cases:   lambda=0: A_r; lambda towards infinity: -A_c.
    Shapes:  both [B, T] and unwhitened: whitening comes after. Returns [B, T], 0 where both are 0 (the padding).
    Units:   those of the advantages; the division keeps their size whatever lambda is.
    Errors:  ValueError if shapes differ or lambda is negative or not finite.
    Source:  Dai et al., arXiv 2310.12773, where the two losses are combined in this way.
    """
    check_same_shape(reward_advantage_BT, cost_advantage_BT)
    if not (multiplier >= 0 and math.isfinite(multiplier)):
        raise ValueError(f"the multiplier must be a finite number of at least 0, got {multiplier}")
    reward_advantage_BT, cost_advantage_BT = at_least_float32(reward_advantage_BT), at_least_float32(cost_advantage_BT)
    return (reward_advantage_BT - multiplier * cost_advantage_BT) / (1 + multiplier)
