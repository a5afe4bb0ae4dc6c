"""Advantages from token rewards and values. Legend: B answers, T response slots."""

import torch
from torch import Tensor

from direct_rlhf.maths.masked import selected


def gae(reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates over response tokens.

        delta_t = r_t + gamma V_{t+1} - V_t          V is 0 after the last response token, also where the cap cut
        A_t     = delta_t + gamma lam A_{t+1}

    Cases:   lam=1: reward-to-go minus value; lam=0: TD error; empty row: zeros.
    Shapes:  all [B, T]; the mask is True on one unbroken run of slots a row. Returns [B, T], 0 under the padding.
    Units:   those of the reward; whitening is a step of its own. The value target is A + V with unwhitened A.
    Errors:  ValueError if shapes differ or the mask is not bool.
    Source:  Schulman et al., arXiv 1506.02438, eq. 16.
    """
    reward_BT, value_BT = selected(mask_BT, reward_BT, value_BT)
    advantages = []
    next_value_B = next_advantage_B = torch.zeros_like(value_BT[:, 0])
    for t in reversed(range(value_BT.shape[1])):
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        next_advantage_B = delta_B + gamma * lam * next_advantage_B
        next_value_B = value_BT[:, t]
        advantages.append(next_advantage_B)
    advantage_BT = torch.stack(advantages[::-1], dim=1)
    return torch.where(mask_BT, advantage_BT, 0.0)  # left padding sits before the first delta and would see V_1
