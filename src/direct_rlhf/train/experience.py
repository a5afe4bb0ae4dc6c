"""Two of PPO's four verbs: score a rollout, and estimate advantages from it.

    rollout -> score -> Scored -> estimate -> Experience

Legend: B answers, P prompt slots (left-padded), T response slots (right-padded), L = P + T.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from direct_rlhf.data.types import Prompt
from direct_rlhf.maths import kl
from direct_rlhf.maths.advantages import gae
from direct_rlhf.maths.masked import masked_mean, whiten
from direct_rlhf.maths.rewards import clip_scores, explained_variance, finish_scores, token_rewards
from direct_rlhf.models.roles import Roles
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.recipe.schema import PpoSection
from direct_rlhf.rollout.types import FinishReason, Rollout
from direct_rlhf.train.health import text_statistics
from direct_rlhf.train.reward_sources import Answer, Reward


@dataclass(frozen=True)
class Batch:
    """Some rows of a rollout, trimmed of the padding that none of them needs."""

    ids_BL: Tensor
    mask_BL: Tensor  # bool, attention
    action_BL: Tensor  # bool, tokens the policy sampled and kept
    prompt_slots: int  # P after trimming: response slot t is column P + t
    response_slots: int  # T after trimming


@dataclass(frozen=True)
class Scored:
    """A rollout with its scores and the numbers of the two frozen views: reference log-probs and old values."""

    rollout: Rollout
    raw_score_B: Tensor  # normalised reward before clipping and the rules for length and unfinished answers
    score_clip_hits: int  # scores beyond the clip
    score_B: Tensor  # what the last action is paid
    keep_B: Tensor  # bool; False where the `mask` rule leaves an answer out of both losses
    reference_BT: Tensor  # log-probs, nats; 0 outside the actions
    value_BT: Tensor  # normalised reward units; 0 outside the actions


@dataclass(frozen=True)
class Experience:
    """What the update trains on. ``train_mask_BT`` is the action mask without the answers that are left out."""

    scored: Scored
    train_mask_BT: Tensor
    advantage_BT: Tensor  # whitened over the whole batch, 0 outside train_mask
    return_BT: Tensor  # unwhitened advantage + old value


def batch_of(rollout: Rollout, rows: Sequence[int], device: str) -> Batch:
    """Rows of a rollout as one padded batch."""
    index = torch.as_tensor(rows)
    prompt_mask, response_mask = rollout.prompt_mask_BP[index], rollout.response_mask_BT[index]
    longest_prompt = int(prompt_mask.sum(1).max())
    longest_response = int(response_mask.sum(1).max())
    first = prompt_mask.shape[1] - longest_prompt
    ids = torch.cat([rollout.prompt_ids_BP[index, first:], rollout.response_ids_BT[index, :longest_response]], dim=1)
    mask = torch.cat([prompt_mask[:, first:], response_mask[:, :longest_response]], dim=1)
    no_action = torch.zeros_like(prompt_mask[:, first:])
    action = torch.cat([no_action, rollout.action_mask_BT[index, :longest_response]], dim=1)
    return Batch(ids.to(device), mask.to(device), action.to(device), longest_prompt, longest_response)


def by_length(rollout: Rollout, rows: Sequence[int], size: int) -> Iterator[list[int]]:
    """Chunks of ``rows`` with neighbours of like length, so that little padding is computed."""
    length = (rollout.prompt_mask_BP.sum(1) + rollout.response_mask_BT.sum(1)).tolist()
    ordered = sorted(rows, key=lambda row: length[row])
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def answers_of(rollout: Rollout, prompts: Sequence[Prompt]) -> list[Answer]:
    """The rollout's answers as a reward reads them; ``prompts`` stand in row order."""
    return [
        Answer(prompt.turns, text, finish is not FinishReason.LENGTH, prompt.kind, prompt.id)
        for prompt, text, finish in zip(prompts, rollout.texts, rollout.finish, strict=True)
    ]


def score(
    rollout: Rollout,
    prompts: Sequence[Prompt],
    *,
    roles: Roles,
    reward: Reward,
    section: PpoSection,
    cap: int,
    check_stop: Callable[[], None],
) -> Scored:
    """Rewards, reference log-probs and values of a rollout (section 2.4 rules for unfinished answers)."""
    raw = reward.score(answers_of(rollout, prompts)).float().cpu()
    length = section.length
    clipped, hits = clip_scores(raw, section.score_clip)
    score_B, keep_B = finish_scores(
        clipped,
        rollout.action_mask_BT.sum(1),
        torch.tensor([finish is FinishReason.LENGTH for finish in rollout.finish]),
        rule=length.unfinished,
        low_quantile=reward.low_quantile,
        penalty=length.unfinished_penalty,
        factor=length.unfinished_factor,
        cap=cap,
        overlong_buffer=length.overlong_buffer,
        overlong_penalty=length.overlong_penalty,
        per_token_penalty=length.per_token_penalty,
        min_response_tokens=length.min_response_tokens,
    )
    shape = rollout.action_mask_BT.shape
    reference_BT = torch.zeros(shape)
    for rows in by_length(rollout, range(len(rollout)), section.micro_batch_size):
        check_stop()
        batch = batch_of(rollout, rows, roles.device)
        reference = roles.reference_logprobs(batch.ids_BL, batch.mask_BL, batch.action_BL, section.sampling.temperature)
        reference_BT[rows, : batch.response_slots] = reference[:, batch.prompt_slots :].cpu()
    return Scored(
        rollout, raw, int(hits), score_B, keep_B, reference_BT, old_values(rollout, roles=roles, section=section)
    )


@torch.no_grad()
def old_values(rollout: Rollout, *, roles: Roles, section: PpoSection) -> Tensor:
    """The critic's values of every action, [B, T], normalised reward units, 0 outside the actions."""
    value_BT = torch.zeros(rollout.action_mask_BT.shape)
    with roles.criticising() as critic:
        for rows in by_length(rollout, range(len(rollout)), section.micro_batch_size):
            batch = batch_of(rollout, rows, roles.device)
            value_BT[rows, : batch.response_slots] = action_values(critic, batch).float().cpu()
    return torch.where(rollout.action_mask_BT, value_BT, 0.0)


def action_values(critic: ScalarModel, batch: Batch) -> Tensor:
    """V of the state *before* each response token, [B, T]: the hidden state one slot earlier."""
    return critic.values(batch.ids_BL, batch.mask_BL)[:, batch.prompt_slots - 1 : -1]


def estimate(scored: Scored, *, section: PpoSection, kl_coefficient: float) -> Experience:
    """Token rewards (-beta k1, score on the last action), GAE, returns; advantages whitened over the whole batch."""
    rollout = scored.rollout
    mask = rollout.action_mask_BT
    reward_BT = token_rewards(scored.score_B, kl.k1(rollout.logprob_BT, scored.reference_BT), mask, beta=kl_coefficient)
    advantage_BT = gae(reward_BT, scored.value_BT, mask, gamma=section.gamma, lam=section.lam)
    train_mask = mask & scored.keep_B[:, None]
    return Experience(scored, train_mask, whiten(advantage_BT, train_mask), advantage_BT + scored.value_BT)


def rollout_statistics(experience: Experience, prompts: Sequence[Prompt]) -> dict[str, float]:
    """The rollout's line in metrics.jsonl: reward, KL, length, endings, diversity, explained variance."""
    scored, rollout = experience.scored, experience.scored.rollout
    mask = rollout.action_mask_BT
    k1 = torch.where(mask, kl.k1(rollout.logprob_BT, scored.reference_BT), 0.0)
    k3 = torch.where(mask, kl.k3(rollout.logprob_BT, scored.reference_BT), 0.0)
    length = mask.sum(1).float()
    n = len(rollout)
    kinds: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        kinds.setdefault(prompt.kind, []).append(row)
    return {
        "reward_mean": float(scored.raw_score_B.mean()),
        "reward_std": float(scored.raw_score_B.std(correction=0)),
        "score_mean": float(scored.score_B.mean()),
        **{f"reward_{kind}": float(scored.raw_score_B[rows].mean()) for kind, rows in sorted(kinds.items())},
        "kl_sequence": float(k1.sum(1).mean()),
        "kl_token": float(masked_mean(k1, mask)),
        "kl_k3_sequence": float(k3.sum(1).mean()),
        "kl_k3_token": float(masked_mean(k3, mask)),
        "kl_clamp_hits": float(kl.clamp_hits(rollout.logprob_BT, scored.reference_BT, mask)),
        "score_clip_hits": float(scored.score_clip_hits),
        "length_mean": float(length.mean()),
        "length_median": float(length.median()),
        "length_p95": float(torch.quantile(length, 0.95)),
        "rate_eos": rollout.finish.count(FinishReason.EOS) / n,
        "rate_stop": rollout.finish.count(FinishReason.STOP) / n,
        "rate_length_cut": rollout.finish.count(FinishReason.LENGTH) / n,
        **text_statistics(rollout.texts, [prompt.id for prompt in prompts]),
        "explained_variance": float(explained_variance(scored.value_BT, experience.return_BT, mask)),
        "advantage_kept": float(scored.keep_B.float().mean()),
    }
