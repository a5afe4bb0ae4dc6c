"""PPO's fourth verb: update the policy and the critic on one experience.

    for epoch: for minibatch: micro-batches accumulate, then one optimiser step for each of the two

Every loss is a mean over the valid tokens of the whole minibatch, however it is cut into micro-batches. On the first
minibatch of an iteration the ratio must be 1: what the sampler said is compared with what the trainer computes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from direct_rlhf.errors import DivergenceError
from direct_rlhf.maths.losses import nll, policy_loss, value_loss
from direct_rlhf.maths.masked import masked_mean
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.roles import Roles
from direct_rlhf.randomness import generator, permutation
from direct_rlhf.recipe.schema import PpoSection
from direct_rlhf.train.experience import Batch, Experience, action_values, batch_of, by_length
from direct_rlhf.train.step import Optimiser

RATIO_TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (float("inf"), 0.02)}  # largest and mean |logp - old|, nats


@dataclass(frozen=True)
class TextWindows:
    """Pretraining text for the ptx loss: token windows, each starting at a document's beginning."""

    windows: Sequence[Sequence[int]]
    weight: float
    batch_size: int

    def batch(self, *key: int | str) -> tuple[Tensor, Tensor]:
        """ids [b, L] right-padded and their mask, drawn by ``key``."""
        picked = generator(*key, "ptx").choice(len(self.windows), size=self.batch_size, replace=False)
        rows = [self.windows[int(i)] for i in picked]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows])
        return ids, torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])


def update(
    experience: Experience,
    *,
    roles: Roles,
    policy_optimiser: Optimiser,
    critic_optimiser: Optimiser,
    section: PpoSection,
    text: TextWindows | None,
    seed: int,
    iteration: int,
    critic_only_steps: int = 0,
) -> dict[str, float]:
    """Clipped PPO epochs over the experience; ``critic_only_steps`` > 0 trains the critic alone for so many steps.

    Returns means over the optimiser steps. Raises DivergenceError if sampler and trainer disagree on the first
    minibatch, or if a loss or a gradient is not finite (the weights are then untouched by that step).
    """
    totals: dict[str, list[float]] = {}
    rows = len(experience.scored.rollout)
    left_epoch = trained = 0.0
    for epoch in range(section.epochs):
        order = permutation(rows, seed, "minibatches", iteration, epoch)
        for start in range(0, rows, section.minibatch_size):
            minibatch = order[start : start + section.minibatch_size]
            tokens = float(experience.train_mask_BT[minibatch].sum())
            if tokens == 0:
                continue  # every answer of it is left out by the `mask` rule
            where = f"iteration {iteration}, epoch {epoch}, answers {minibatch[:4]}..."
            values = _critic_step(experience, minibatch, tokens, roles, critic_optimiser, section, where)
            if not critic_only_steps:
                trained += tokens
                key = (seed, iteration, epoch, start)
                first = epoch == 0 and start == 0
                values |= _policy_step(
                    experience, minibatch, tokens, roles, policy_optimiser, section, text, key, where, first
                )
            for name, value in values.items():
                totals.setdefault(name, []).append(value)
            if values.get("k3_old_new", 0.0) > section.kl.inner_limit:
                left_epoch = 1.0
                break
            if len(totals["value_loss"]) == critic_only_steps:
                break
        if left_epoch or len(totals["value_loss"]) == critic_only_steps:
            break
    means = {name: sum(values) / len(values) for name, values in totals.items()}
    steps = float(len(totals.get("value_loss", [])))
    return {**means, "left_epoch_early": left_epoch, "steps": steps, "answer_tokens": trained}


def _micro_batches(
    experience: Experience, minibatch: Sequence[int], section: PpoSection, device: str
) -> Iterator[tuple[list[int], Batch, Tensor]]:
    """(rows, batch, train mask [b, T] trimmed as the batch is) of each micro-batch."""
    rollout = experience.scored.rollout
    for rows in by_length(rollout, minibatch, section.micro_batch_size):
        batch = batch_of(rollout, rows, device)
        yield rows, batch, experience.train_mask_BT[rows, : batch.response_slots].to(device)


def _critic_step(
    experience: Experience,
    minibatch: Sequence[int],
    tokens: float,
    roles: Roles,
    optimiser: Optimiser,
    section: PpoSection,
    where: str,
) -> dict[str, float]:
    loss_sum = clipped = 0.0
    with roles.criticising() as critic:
        for rows, batch, mask in _micro_batches(experience, minibatch, section, roles.device):
            slots = slice(None, batch.response_slots)
            term = value_loss(
                action_values(critic, batch).float(),
                experience.scored.value_BT[rows, slots].to(roles.device),
                experience.return_BT[rows, slots].to(roles.device),
                mask,
                clip=section.value_clip,
                denominator=tokens,
            )
            term.loss.backward()
            loss_sum += float(term.loss.detach())
            clipped += float(term.clip_fraction) * float(mask.sum()) / tokens
    norm = optimiser.step(loss_sum, where=f"critic, {where}")
    return {"value_loss": loss_sum, "value_clip_fraction": clipped, "grad_norm_critic": norm}


def _policy_step(
    experience: Experience,
    minibatch: Sequence[int],
    tokens: float,
    roles: Roles,
    optimiser: Optimiser,
    section: PpoSection,
    text: TextWindows | None,
    key: tuple[int, ...],
    where: str,
    first: bool,
) -> dict[str, float]:
    temperature = section.sampling.temperature
    sums = dict.fromkeys(("policy_loss", "clip_fraction", "k3_old_new", "entropy", "ratio_mean"), 0.0)
    with roles.acting() as policy:
        for rows, batch, mask in _micro_batches(experience, minibatch, section, roles.device):
            target = torch.zeros_like(batch.action_BL)
            target[:, batch.prompt_slots :] = mask
            new = token_logprobs(policy, batch.ids_BL, batch.mask_BL, target, temperature=temperature, entropy=True)
            assert new.entropy_BL is not None
            logprob_BT = new.logprob_BL[:, batch.prompt_slots :]
            entropy_BT = new.entropy_BL[:, batch.prompt_slots :]
            slots = slice(None, batch.response_slots)
            old_BT = experience.scored.rollout.logprob_BT[rows, slots].to(roles.device)
            if first:
                check_ratio(logprob_BT.detach(), old_BT, mask, dtype=roles.dtype, where=where)
            term = policy_loss(
                logprob_BT,
                old_BT,
                experience.advantage_BT[rows, slots].to(roles.device),
                mask,
                clip=section.clip,
                dual_clip=section.dual_clip,
                denominator=tokens,
            )
            entropy = torch.where(mask, entropy_BT, 0.0).sum() / tokens
            loss = term.loss - section.entropy * entropy if section.entropy else term.loss
            loss.backward()
            share = float(mask.sum()) / tokens
            sums["policy_loss"] += float(term.loss.detach())
            sums["entropy"] += float(entropy.detach())
            sums["clip_fraction"] += float(term.clip_fraction) * share
            sums["k3_old_new"] += float(term.k3) * share
            sums["ratio_mean"] += float(term.ratio_mean) * share
        if text is not None and text.weight > 0:
            sums["ptx_nll"] = _ptx_backward(policy, text, key, roles.device)
    total = sums["policy_loss"] + (text.weight * sums["ptx_nll"] if "ptx_nll" in sums and text else 0.0)
    sums["grad_norm_policy"] = optimiser.step(total, where=f"policy, {where}")
    return sums


def _ptx_backward(policy: Any, text: TextWindows, key: tuple[int, ...], device: str) -> float:
    """Adds the gradient of weight * NLL (token mean) on pretraining text; returns the NLL, nats per token."""
    ids_BL, mask_BL = (tensor.to(device) for tensor in text.batch(*key))
    target_BL = mask_BL.clone()
    target_BL[:, 0] = False
    loss = nll(token_logprobs(policy, ids_BL, mask_BL, target_BL).logprob_BL, target_BL)
    (text.weight * loss).backward()
    return float(loss.detach())


def check_ratio(logprob_BT: Tensor, old_BT: Tensor, mask_BT: Tensor, *, dtype: str, where: str) -> None:
    """The importance ratio before any update is 1, or sampler and trainer disagree (rlhf section 2.8)."""
    gap = torch.where(mask_BT, (logprob_BT - old_BT).abs(), 0.0)
    largest, mean = float(gap.max()), float(masked_mean(gap, mask_BT))
    limit_largest, limit_mean = RATIO_TOLERANCE[dtype]
    if not (largest <= limit_largest and mean <= limit_mean):
        raise DivergenceError(
            f"sampler and trainer disagree before any update ({where}): |log-prob difference| is {largest:.2e} at most "
            f"and {mean:.2e} on average, allowed {limit_largest:g} and {limit_mean:g} ({dtype}). Stale weights, "
            "another temperature, dropout or padding are the usual causes; nothing was trained."
        )
