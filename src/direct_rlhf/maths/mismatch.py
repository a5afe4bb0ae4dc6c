"""One policy in two programs: an engine samples, a trainer computes, and their arithmetic differs.

What the trainer says of a sampled token is its old log-probability, so that PPO's own ratio starts at 1. The tokens are
the sampler's all the same, and an importance weight corrects for that.

Legend: B answers, T response slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from direct_rlhf.maths.kl import k3, log_ratio
from direct_rlhf.maths.masked import masked_mean


@dataclass(frozen=True)
class Correction:
    """Importance weights, and how far the two programs are apart; all detached."""

    weight_BT: Tensor  # 1 outside the mask
    kl: Tensor  # scalar, nats per token: KL(sampler || trainer)
    truncated: Tensor  # scalar, share of tokens whose weight was cut to the limit


@torch.no_grad()
def correction(logp_BT: Tensor, sampler_BT: Tensor, mask_BT: Tensor, *, limit: float) -> Correction:
    """Truncated importance weights of sampled tokens, and the estimated KL of the sampler from the trainer.

        w  = min(exp(logp - sampler), limit)
        KL = mean over the True slots of exp(logp - sampler) - 1 - (logp - sampler)

    Cases:   equal log-probabilities: weights of exactly 1, KL 0, none truncated; no True slot: 0 and 0.
    Shapes:  all [B, T].
    Units:   log-probabilities in nats.
    Errors:  ValueError if shapes differ, the mask is not bool, or the limit is below 1.
    Source:  Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025); Ionides,
             "Truncated Importance Sampling" (2008); the KL: `kl.k3`, whose expectation is over the sampler's tokens.
    """
    if not limit >= 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    ratio_BT = log_ratio(logp_BT, sampler_BT, mask_BT).exp()
    return Correction(
        ratio_BT.clamp(max=limit),
        masked_mean(k3(sampler_BT, logp_BT, mask_BT), mask_BT),
        masked_mean((ratio_BT > limit).to(ratio_BT), mask_BT),
    )
