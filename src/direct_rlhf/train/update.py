"""PPO's fourth verb: update the policy and the critics on one experience.

    for epoch: for minibatch: micro-batches accumulate, then one optimiser step for each of them

Every loss is a mean over the valid tokens of the whole minibatch, however it is cut into micro-batches. On the first
minibatch of an iteration the ratio must be 1: what the sampler said is compared with what the trainer computes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from direct_rlhf.errors import DivergenceError
from direct_rlhf.maths.losses import nll, policy_loss, value_loss
from direct_rlhf.maths.masked import masked_mean
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.roles import COST_CRITIC, POLICY, Roles
from direct_rlhf.randomness import generator, permutation
from direct_rlhf.recipe.schema import PpoSection
from direct_rlhf.rollout.types import Rollout
from direct_rlhf.run.points import point
from direct_rlhf.run.world import World
from direct_rlhf.train.experience import Batch, Experience, action_values, batch_of, total_lengths
from direct_rlhf.train.parallel import to_train
from direct_rlhf.train.step import Optimiser, Step

RATIO_TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (float("inf"), 0.02)}  # largest and mean |logp - old|, nats
SHOWN_IDS = 4  # prompts that a message names of a minibatch; the alert names all


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


@dataclass(frozen=True)
class Learner:
    """What an update changes, and by which settings."""

    roles: Roles
    section: PpoSection
    optimisers: Mapping[str, Optimiser]  # of each trained role
    text: TextWindows | None
    seed: int
    chunk: ChunkSize  # padded slots of a micro-batch
    report: Callable[[Step, list[str]], None] = lambda step, batch: None  # a step with a fault, and its prompts' ids
    world: World = field(default_factory=World)

    @property
    def policy_version(self) -> int:
        return self.optimisers[POLICY].steps


@dataclass
class Position:
    """Where an update stands between two minibatches; a checkpoint can hold it."""

    epoch: int = 0
    start: int = 0  # first place of the next minibatch in the epoch's order
    totals: dict[str, list[float]] = field(default_factory=dict)  # each step's metrics
    answer_tokens: float = 0.0  # that the policy was trained on
    left_early: bool = False  # the policy had moved too far from the sampler


def update(
    experience: Experience,
    learner: Learner,
    *,
    iteration: int,
    position: Position,
    check_stop: Callable[[], None],
    critic_only_steps: int = 0,
) -> dict[str, float]:
    """Clipped PPO epochs over the experience, from ``position`` (which moves along) to the end.

    ``critic_only_steps`` > 0 trains the critics alone for so many steps. ``check_stop`` is asked between minibatches.
    Returns means over the optimiser steps. Raises DivergenceError if the rollout is of another policy version, if
    sampler and trainer disagree on the first minibatch, or if a loss or a gradient is not finite (the weights are then
    untouched by that step).
    """
    rows = len(experience.scored.rollout)
    if position.epoch == position.start == 0 and not critic_only_steps:
        check_version(experience.scored.rollout, learner.policy_version)
    for epoch, start in _remaining(position, learner.section, rows):
        if critic_only_steps and len(position.totals.get("value_loss", ())) >= critic_only_steps:
            break
        check_stop()
        order = permutation(rows, learner.seed, "minibatches", iteration, epoch)
        values = _minibatch(
            experience,
            order[start : start + learner.section.minibatch_size],
            learner,
            key=(learner.seed, iteration, epoch, start),
            with_policy=not critic_only_steps,
        )
        position.answer_tokens += values.pop("answer_tokens", 0.0)
        for name, value in values.items():
            position.totals.setdefault(name, []).append(value)
        position.left_early = values.get("k3_old_new", 0.0) > learner.section.kl.inner_limit
        position.epoch, position.start = epoch, start + learner.section.minibatch_size
        point("ppo.minibatch")
    means = {name: sum(values) / len(values) for name, values in position.totals.items()}
    steps = max((len(values) for values in position.totals.values()), default=0)
    return {
        **means,
        "left_epoch_early": float(position.left_early),
        "steps": float(steps),
        "answer_tokens": position.answer_tokens,
    }


def _remaining(position: Position, section: PpoSection, rows: int) -> Iterator[tuple[int, int]]:
    """(epoch, first place) of each minibatch that is still to come."""
    for epoch in range(position.epoch, section.epochs):
        first = position.start if epoch == position.epoch else 0
        for start in range(first, rows, section.minibatch_size):
            if position.left_early:
                return
            yield epoch, start


def _minibatch(
    experience: Experience, minibatch: list[int], learner: Learner, *, key: tuple[int, ...], with_policy: bool
) -> dict[str, float]:
    """One optimiser step for each critic and the policy; no metrics if the `mask` rule leaves every answer out."""
    tokens = float(experience.train_mask_BT[minibatch].sum())
    if tokens == 0:
        return {}
    _, iteration, epoch, start = key
    ids = [experience.scored.rollout.keys[row].prompt_id for row in minibatch]
    shown = ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(ids) > SHOWN_IDS else "")
    values: dict[str, float] = {}
    skipped = 0.0

    def step(role: str, gradients: Callable[[int], dict[str, float]]) -> dict[str, float]:
        optimiser = learner.optimisers[role]

        def attempt(slots: int) -> dict[str, float]:
            optimiser.forget()  # the gradients of an attempt that ran out of memory
            return gradients(slots)

        found = learner.chunk.run(attempt)
        where = f"{role}, iteration {iteration}, epoch {epoch}, minibatch at {start}, prompts {shown}"
        try:
            taken = optimiser.step(found.pop("loss"), where=where)
        except DivergenceError as error:
            learner.report(Step(float("nan"), False, "diverged", str(error)), ids)
            raise
        if taken.fault:
            learner.report(taken, ids)
        nonlocal skipped
        skipped += not taken.taken
        return found | {f"grad_norm_{role}": taken.norm} if taken.fault != "nonfinite_step" else {}

    if with_policy:  # first: where it disagrees with the sampler, no critic has been trained either
        values |= step(POLICY, partial(policy_gradients, experience, minibatch, tokens, learner, key))
        values["answer_tokens"] = tokens
    for role in learner.roles.trained[1:]:
        values |= step(role, partial(critic_gradients, experience, minibatch, tokens, learner, role))
    return values | {"steps_skipped": skipped}


def _micro_batches(
    experience: Experience, minibatch: Sequence[int], budget: int, learner: Learner
) -> Iterator[tuple[list[int], Batch, Tensor]]:
    """(rows, batch, train mask [b, T] trimmed as the batch is) of each of this process's micro-batches.

    One that keeps step with the other processes alone has an empty mask.
    """
    rollout, device = experience.scored.rollout, learner.roles.device
    for rows, counts in to_train(learner.world)(total_lengths(rollout), minibatch, budget):
        batch = batch_of(rollout, rows, device)
        mask = experience.train_mask_BT[rows, : batch.response_slots].to(device)
        yield rows, batch, mask if counts else torch.zeros_like(mask)


def critic_gradients(
    experience: Experience, minibatch: Sequence[int], tokens: float, learner: Learner, role: str, budget: int
) -> dict[str, float]:
    """Adds the gradient of a critic's loss, ``budget`` padded slots at once; its metrics and "loss"."""
    scored, roles = experience.scored, learner.roles
    old_BT, return_BT, name = scored.value_BT, experience.return_BT, "value"
    if role == COST_CRITIC:
        assert scored.cost_value_BT is not None
        assert experience.cost_return_BT is not None
        old_BT, return_BT, name = scored.cost_value_BT, experience.cost_return_BT, "cost_value"
    loss_sum = clipped = 0.0
    with roles.criticising(role) as critic:
        for rows, batch, mask in _micro_batches(experience, minibatch, budget, learner):
            slots = slice(None, batch.response_slots)
            term = value_loss(
                action_values(critic, batch).float(),
                old_BT[rows, slots].to(roles.device),
                return_BT[rows, slots].to(roles.device),
                mask,
                clip=learner.section.value_clip,
                denominator=tokens,
            )
            term.loss.backward()
            loss_sum += float(term.loss.detach())
            clipped += float(term.clip_fraction)
    return learner.world.sum({"loss": loss_sum, f"{name}_loss": loss_sum, f"{name}_clip_fraction": clipped})


def policy_gradients(
    experience: Experience,
    minibatch: Sequence[int],
    tokens: float,
    learner: Learner,
    key: tuple[int, ...],
    budget: int,
) -> dict[str, float]:
    """Adds the gradient of the policy's loss (and of the ptx loss), ``budget`` padded slots at once.

    Returns its metrics and "loss".
    """
    section, roles, text = learner.section, learner.roles, learner.text
    _, iteration, epoch, start = key
    sums = dict.fromkeys(("policy_loss", "clip_fraction", "k3_old_new", "entropy", "ratio_mean"), 0.0)
    new_and_old: list[tuple[Tensor, Tensor]] = []  # log-probabilities of all tokens of an iteration's first minibatch
    with roles.acting() as policy:
        for rows, batch, mask in _micro_batches(experience, minibatch, budget, learner):
            target = torch.zeros_like(batch.action_BL)
            target[:, batch.prompt_slots :] = mask
            new = token_logprobs(
                policy,
                batch.ids_BL,
                batch.mask_BL,
                target,
                temperature=section.sampling.temperature,
                entropy_gradient=section.entropy > 0,
            )
            logprob_BT = new.logprob_BL[:, batch.prompt_slots :]
            entropy_BT = new.entropy_BL[:, batch.prompt_slots :]
            slots = slice(None, batch.response_slots)
            old_BT = experience.scored.rollout.logprob_BT[rows, slots].to(roles.device)
            if epoch == start == 0:
                new_and_old.append((logprob_BT.detach()[mask], old_BT[mask]))
            corrected = experience.correction
            term = policy_loss(
                logprob_BT,
                old_BT,
                experience.advantage_BT[rows, slots].to(roles.device),
                mask,
                clip=section.clip,
                dual_clip=section.dual_clip,
                weight_BT=None if corrected is None else corrected.weight_BT[rows, slots].to(roles.device),
                denominator=tokens,
            )
            entropy = torch.where(mask, entropy_BT, 0.0).sum() / tokens
            loss = term.loss - section.entropy * entropy if section.entropy else term.loss
            loss.backward()
            sums["policy_loss"] += float(term.loss.detach())
            sums["entropy"] += float(entropy.detach())
            sums["clip_fraction"] += float(term.clip_fraction)
            sums["k3_old_new"] += float(term.k3)
            sums["ratio_mean"] += float(term.ratio_mean)
        if new_and_old:
            shares = learner.world.gather([torch.cat(part) for part in zip(*new_and_old, strict=True)])
            new_N, old_N = map(torch.cat, zip(*shares, strict=True))
            check_ratio(new_N, old_N, torch.ones_like(new_N).bool(), dtype=roles.dtype, where=f"iteration {iteration}")
        if text is not None and text.weight > 0:
            sums["ptx_nll"] = _ptx_backward(policy, text, key, budget, learner)
    sums = learner.world.sum(sums)
    total = sums["policy_loss"] + (text.weight * sums["ptx_nll"] if "ptx_nll" in sums and text else 0.0)
    return {"loss": total, **sums}


def _ptx_backward(policy: Any, text: TextWindows, key: tuple[int, ...], budget: int, learner: Learner) -> float:
    """Adds the gradient of weight * NLL (token mean) on pretraining text.

    Returns this process's share of the NLL, nats per token.
    """
    ids_BL, mask_BL = (tensor.to(learner.roles.device) for tensor in text.batch(*key))
    target_BL = mask_BL.clone()
    target_BL[:, 0] = False
    tokens, total = float(target_BL.sum()), 0.0
    for rows, counts in to_train(learner.world)(mask_BL.sum(1).tolist(), range(len(ids_BL)), budget):
        target_bL = target_BL[rows] if counts else torch.zeros_like(target_BL[rows])
        logprob_bL = token_logprobs(policy, ids_BL[rows], mask_BL[rows], target_bL).logprob_BL
        loss = nll(logprob_bL, target_bL, denominator=tokens)
        (text.weight * loss).backward()
        total += float(loss.detach())
    return total


def check_version(rollout: Rollout, version: int) -> None:
    """DivergenceError unless the rollout was sampled by the policy that is about to be trained."""
    if rollout.policy_version != version:
        raise DivergenceError(
            f"the rollout is of policy version {rollout.policy_version}, but the policy has taken {version} optimiser "
            "steps: the sampler's weights are stale. Sync its weights before every rollout; nothing was trained."
        )


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
