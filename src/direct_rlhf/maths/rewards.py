"""From the score of an answer to the reward of its tokens. Legend: B answers, T response slots."""

from typing import Literal

import torch
from torch import Tensor

from direct_rlhf.maths.masked import at_least_float32, check_same_shape, masked_var, selected

Unfinished = Literal["replace", "subtract", "scale", "mask"]


def token_rewards(score_B: Tensor, k1_BT: Tensor, mask_BT: Tensor, *, beta: float) -> Tensor:
    """Reward of each action: the KL penalty everywhere, the score on the last one.

        r_t = -beta k1_t + [t = last] score          last = last True slot of the row

    Cases:   beta=0: the raw score; a row's rewards sum to score - beta KL_sequence; a row without a True slot
             (padding of the batch): zeros.
    Shapes:  score [B]; k1 and mask [B, T]. Returns [B, T], 0 under the mask.
    Units:   normalised reward units; k1 in nats, of the log-probabilities at rollout time.
    Errors:  ValueError if shapes do not fit or the mask is not bool.
    """
    check_same_shape(score_B, k1_BT[:, 0])
    (k1_BT,) = selected(mask_BT, k1_BT)
    # after the last action the reversed count of actions is 0, on it 1
    is_last_BT = mask_BT & (mask_BT.flip(1).cumsum(1).flip(1) == 1)
    return -beta * k1_BT + torch.where(is_last_BT, at_least_float32(score_B)[:, None], 0.0)


def clip_scores(score_B: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Scores clamped to +-``limit`` (normalised units) and how many were beyond it; NaN stays NaN, to be caught."""
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    score_B = at_least_float32(score_B)
    return score_B.clamp(-limit, limit), (score_B.abs() > limit).sum()


def finish_scores(
    score_B: Tensor,
    length_B: Tensor,
    unfinished_B: Tensor,
    *,
    rule: Unfinished,
    low_quantile: float,
    penalty: float,
    factor: float,
    cap: int,
    overlong_buffer: int,
    overlong_penalty: float,
    per_token_penalty: float,
    min_response_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Final scores: what becomes of unfinished answers, and the price of length.

        unfinished or shorter than min_response_tokens:
            replace    q                    q = low_quantile, of the base's finished samples
            subtract   s - penalty
            scale      q + factor (s - q)   (a plain factor * s would raise negative scores)
            mask       s, and keep = False: out of both losses and the whitening, not out of the KL statistics
        then for all: s -= overlong_penalty clip((L - (cap - buffer)) / buffer, 0, 1) + per_token_penalty L

    Cases:   overlong_buffer=0, per_token_penalty=0, min_response_tokens=0: each is off.
    Shapes:  all [B]; length counts actions, unfinished is bool. Returns (score, keep), both [B].
    Units:   normalised reward units; lengths in tokens.
    Errors:  ValueError if shapes differ or the rule is none of the four.
    """
    check_same_shape(score_B, length_B, unfinished_B)
    score_B = at_least_float32(score_B)
    unfinished_B = unfinished_B | (length_B < min_response_tokens)
    keep_B = torch.ones_like(unfinished_B)
    match rule:
        case "replace":
            score_B = score_B.masked_fill(unfinished_B, low_quantile)
        case "subtract":
            score_B = torch.where(unfinished_B, score_B - penalty, score_B)
        case "scale":
            score_B = torch.where(unfinished_B, low_quantile + factor * (score_B - low_quantile), score_B)
        case "mask":
            keep_B = ~unfinished_B
        case _:
            raise ValueError(f"rule must be replace, subtract, scale or mask, got {rule!r}")
    if overlong_buffer > 0:
        score_B = score_B - overlong_penalty * ((length_B - (cap - overlong_buffer)) / overlong_buffer).clamp(0, 1)
    return score_B - per_token_penalty * length_B, keep_B


def explained_variance(value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the True slots, population variance, a scalar.

    Cases:   perfect critic: 1; constant critic: 0; worse than a constant: negative; constant returns: 0.
    Errors:  ValueError if shapes differ or the mask is not bool.
    """
    value_BT, return_BT = selected(mask_BT, value_BT, return_BT)
    variance = masked_var(return_BT, mask_BT)
    residual = masked_var(return_BT - value_BT, mask_BT)
    return torch.where(variance > 0, 1 - residual / variance.clamp(min=torch.finfo(variance.dtype).tiny), 0.0)
