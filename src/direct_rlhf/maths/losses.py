"""Losses of PPO, reward model, SFT and DPO.

Legend: B answers or pairs, T response slots. Each loss is a mean over the valid tokens (or pairs) of the *whole
optimiser step*: pass that count as ``denominator`` to every micro-batch, and losses, gradients and statistics of the
micro-batches add up to those of the batch. ``denominator=None`` takes the count of the tensors given.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from direct_rlhf.maths.kl import k3, log_ratio
from direct_rlhf.maths.masked import at_least_float32, check_same_shape, masked_mean, selected


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped policy loss and what to log about it; all but ``loss`` are detached scalars."""

    loss: Tensor
    ratio_mean: Tensor  # of exp(logp - old); 1 before the first update
    clip_fraction: Tensor  # share of tokens whose gradient the clip removed
    k3: Tensor  # nats per token, KL(old || new)


def policy_loss(
    logp_BT: Tensor,
    old_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float,
    dual_clip: float | None = None,
    weight_BT: Tensor | None = None,
    denominator: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate loss of PPO.

        ratio = exp(clamp(logp - old, +-20))
        loss  = max(-A ratio, -A clip(ratio, 1-clip, 1+clip));   where A < 0, at most -A dual_clip if that is given
        mean over the True slots of weight loss;   the weight is a constant, 1 if none is given

    Cases:   ratio 1: the policy gradient; clip=inf: no clip; weight 1: as without, bit for bit; no True slot: 0.
    Shapes:  all [B, T].
    Units:   those of the advantage.
    Errors:  ValueError if shapes differ, the mask is not bool, clip is not positive, or dual_clip is not above 1.
    Source:  Schulman et al., arXiv 1707.06347, eq. 7; dual clip: Ye et al., arXiv 1912.09729; weight: `mismatch.py`.
    """
    _check_clip(clip)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    logp_BT, old_BT, advantage_BT = selected(mask_BT, logp_BT, old_BT, advantage_BT)
    ratio_BT = log_ratio(logp_BT, old_BT).exp()
    plain_BT = -advantage_BT * ratio_BT
    clipped_BT = -advantage_BT * ratio_BT.clamp(1 - clip, 1 + clip)
    loss_BT = torch.maximum(plain_BT, clipped_BT)
    if dual_clip is not None:
        bounded_BT = torch.minimum(loss_BT, -advantage_BT * dual_clip)
        loss_BT = torch.where(advantage_BT < 0, bounded_BT, loss_BT)
    if weight_BT is not None:
        (weight_BT,) = selected(mask_BT, weight_BT.detach())
        loss_BT = weight_BT * loss_BT
    with torch.no_grad():
        means = [
            masked_mean(x_BT, mask_BT, denominator)
            for x_BT in (ratio_BT, (clipped_BT > plain_BT).to(ratio_BT), k3(old_BT, logp_BT))
        ]
    return PolicyLoss(masked_mean(loss_BT, mask_BT, denominator), *means)


@dataclass(frozen=True)
class ValueLoss:
    """The clipped value loss; ``clip_fraction`` is a detached scalar."""

    loss: Tensor
    clip_fraction: Tensor


def value_loss(
    value_BT: Tensor,
    old_value_BT: Tensor,
    return_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float,
    denominator: float | None = None,
) -> ValueLoss:
    """Clipped squared error of the critic.

        v_c  = clip(v, old - clip, old + clip)
        loss = 1/2 max((v - R)^2, (v_c - R)^2), mean over the True slots;   R = unwhitened advantage + old

    Cases:   clip=inf: plain squared error; no True slot: 0.
    Shapes:  all [B, T].
    Units:   normalised reward units, squared; ``clip`` in normalised reward units.
    Errors:  ValueError if shapes differ, the mask is not bool, or clip is not positive.
    """
    _check_clip(clip)
    value_BT, old_value_BT, return_BT = selected(mask_BT, value_BT, old_value_BT, return_BT)
    near_BT = value_BT.clamp(old_value_BT - clip, old_value_BT + clip)
    plain_BT = (value_BT - return_BT).square()
    clipped_BT = (near_BT - return_BT).square()
    with torch.no_grad():
        fraction = masked_mean((clipped_BT > plain_BT).to(plain_BT), mask_BT, denominator)
    return ValueLoss(masked_mean(torch.maximum(plain_BT, clipped_BT) / 2, mask_BT, denominator), fraction)


def bradley_terry(
    chosen_B: Tensor,
    rejected_B: Tensor,
    margin_B: Tensor | None = None,
    centring: float = 0.0,
    *,
    denominator: float | None = None,
) -> Tensor:
    """Preference loss of the reward model.

        -log sigmoid(r_chosen - r_rejected - margin) + centring (r_chosen + r_rejected)^2, mean over the pairs

    Cases:   equal scores without margin: log 2; scores of any size stay finite.
    Shapes:  all [B]. Returns a scalar.
    Errors:  ValueError if shapes differ.
    Source:  Bradley and Terry 1952; margin: Llama 2, arXiv 2307.09288; centring: Eisenstein et al., arXiv 2312.09244.
    """
    check_same_shape(chosen_B, rejected_B, *(() if margin_B is None else (margin_B,)))
    chosen_B, rejected_B = at_least_float32(chosen_B), at_least_float32(rejected_B)
    gap_B = chosen_B - rejected_B
    if margin_B is not None:
        gap_B = gap_B - at_least_float32(margin_B)
    loss_B = -logsigmoid(gap_B)
    if centring:
        loss_B = loss_B + centring * (chosen_B + rejected_B).square()
    return loss_B.sum() / _pairs(loss_B, denominator)


@dataclass(frozen=True)
class DpoLoss:
    """The DPO loss and what to log about it; all but ``loss`` are detached scalars."""

    loss: Tensor
    chosen_reward: Tensor  # mean of beta (logp - ref) of chosen answers, nats times beta
    rejected_reward: Tensor
    accuracy: Tensor  # share of pairs whose chosen answer has the larger implicit reward


def dpo(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    beta: float,
    denominator: float | None = None,
) -> DpoLoss:
    """Direct preference optimisation.

        -log sigmoid(beta ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))), mean over the pairs

    Cases:   policy = reference: log 2.
    Shapes:  all [B]: log-probabilities summed over each answer's tokens, nats.
    Errors:  ValueError if shapes differ or beta is not positive.
    Source:  Rafailov et al., arXiv 2305.18290, eq. 7.
    """
    check_same_shape(policy_chosen_B, policy_rejected_B, ref_chosen_B, ref_rejected_B)
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    chosen_B = beta * (at_least_float32(policy_chosen_B) - at_least_float32(ref_chosen_B))
    rejected_B = beta * (at_least_float32(policy_rejected_B) - at_least_float32(ref_rejected_B))
    n = _pairs(chosen_B, denominator)
    loss = -logsigmoid(chosen_B - rejected_B).sum() / n
    with torch.no_grad():
        statistics = [x_B.sum() / n for x_B in (chosen_B, rejected_B, (chosen_B > rejected_B).to(chosen_B))]
    return DpoLoss(loss, *statistics)


def nll(logp_BT: Tensor, mask_BT: Tensor, denominator: float | None = None) -> Tensor:
    """Mean of -logp over the True slots (SFT, ptx), nats per token. Shapes, cases and errors: ``masked_mean``."""
    return -masked_mean(logp_BT, mask_BT, denominator)


def _pairs(x_B: Tensor, denominator: float | None) -> float:
    n = x_B.shape[0] if denominator is None else denominator
    if not n > 0:
        raise ValueError(f"the number of pairs must be positive, got {n}")
    return n


def _check_clip(clip: float) -> None:
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
