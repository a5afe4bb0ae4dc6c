"""Two of PPO's four verbs: score a rollout, and estimate advantages from it.

    rollout -> score -> Scored -> estimate -> Experience

Legend: B answers, P prompt slots (left-padded), T response slots (right-padded), L = P + T.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from direct_rlhf.data.types import Prompt
from direct_rlhf.errors import DivergenceError
from direct_rlhf.maths import kl
from direct_rlhf.maths.advantages import gae
from direct_rlhf.maths.lagrangian import combine
from direct_rlhf.maths.masked import masked_mean, whiten
from direct_rlhf.maths.mismatch import Correction, correction
from direct_rlhf.maths.rewards import clip_scores, explained_variance, finish_scores, token_rewards
from direct_rlhf.models.batches import by_length
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.roles import COST_CRITIC, CRITIC, Roles
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.models.sharded import gathered
from direct_rlhf.recipe.schema import LengthSection, PpoSection
from direct_rlhf.rollout.types import FinishReason, Rollout
from direct_rlhf.run.world import World
from direct_rlhf.train.health import text_statistics
from direct_rlhf.train.parallel import spread
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
    """A rollout with its scores and the numbers of the frozen views: reference log-probs and old values.

    The fields of the cost are None without PPO-Lagrangian. cost = -(normalised score of the cost model).
    """

    rollout: Rollout
    raw_score_B: Tensor  # normalised reward before clipping and the rules for length and unfinished answers
    score_clip_hits: int  # scores beyond the clip
    score_B: Tensor  # what the last action is paid
    keep_B: Tensor  # bool; False where the `mask` rule leaves an answer out of the losses
    reference_BT: Tensor  # log-probs, nats; 0 outside the actions
    value_BT: Tensor  # normalised reward units; 0 outside the actions
    raw_cost_B: Tensor | None = None
    cost_B: Tensor | None = None  # what the last action costs
    cost_value_BT: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint; ``from_state`` is the inverse."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"rollout": self.rollout.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        return cls(**{**state, "rollout": Rollout.from_state(state["rollout"])})


@dataclass(frozen=True)
class Experience:
    """What the update trains on. ``train_mask_BT`` is the action mask without the answers that are left out."""

    scored: Scored
    train_mask_BT: Tensor
    advantage_BT: Tensor  # of reward and cost together, whitened over the whole batch, 0 outside train_mask
    return_BT: Tensor  # unwhitened advantage + old value
    cost_return_BT: Tensor | None = None  # the same of the cost
    correction: Correction | None = None  # of samples that an engine of other arithmetic drew


@dataclass(frozen=True)
class Judges:
    """What rates answers: the reward, and with PPO-Lagrangian the source of costs."""

    reward: Reward
    cost: Reward | None = None


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


def total_lengths(rollout: Rollout) -> list[int]:
    """Tokens of each row, prompt and answer."""
    lengths: list[int] = (rollout.prompt_mask_BP.sum(1) + rollout.response_mask_BT.sum(1)).tolist()
    return lengths


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
    judges: Judges,
    section: PpoSection,
    cap: int,
    check_stop: Callable[[], None],
    chunk: ChunkSize,
    world: World | None = None,
) -> Scored:
    """Rewards, costs, reference log-probs and values of a rollout (the rules for unfinished answers applied).

    Several processes compute a share of the rows each, and all get all.
    Errors: DivergenceError that names the prompt for a reward, log-prob or value that is not finite; what
    ``check_stop`` raises.
    """
    length = section.length
    raw, score_B, keep_B, hits = _finished_scores(rollout, prompts, judges.reward, section, cap, length)
    raw_cost_B = cost_B = None
    if judges.cost is not None:
        priced_once = length.model_copy(update={"overlong_buffer": 0, "per_token_penalty": 0.0})  # in the reward alone
        raw_harmless, harmless_B, _, _ = _finished_scores(rollout, prompts, judges.cost, section, cap, priced_once)
        raw_cost_B, cost_B = -raw_harmless, -harmless_B
    world = world or World()
    world.together(check_stop)

    def reference(batch: Batch) -> Tensor:
        temperature = section.sampling.temperature
        return roles.reference_logprobs(batch.ids_BL, batch.mask_BL, batch.action_BL, temperature)[
            :, batch.prompt_slots :
        ]

    with gathered(roles.reference or roles.policy):
        reference_BT = over_actions(
            rollout, reference, "reference log-probability", roles.device, chunk, check_stop, world
        )
    values = partial(old_values, rollout, roles=roles, chunk=chunk, check_stop=check_stop, world=world)
    return Scored(
        rollout,
        raw,
        hits,
        score_B,
        keep_B,
        reference_BT,
        values(CRITIC),
        raw_cost_B,
        cost_B,
        None if judges.cost is None else values(COST_CRITIC),
    )


def _finished_scores(
    rollout: Rollout, prompts: Sequence[Prompt], judge: Reward, section: PpoSection, cap: int, length: LengthSection
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Raw scores [B], scores after the clip and the rules for endings and length [B], keep [B], clip hits."""
    raw = judge.score(answers_of(rollout, prompts)).float().cpu()
    clipped, hits = clip_scores(raw, section.score_clip)
    score_B, keep_B = finish_scores(
        clipped,
        rollout.action_mask_BT.sum(1),
        torch.tensor([finish is FinishReason.LENGTH for finish in rollout.finish]),
        rule=length.unfinished,
        low_quantile=judge.low_quantile,
        penalty=length.unfinished_penalty,
        factor=length.unfinished_factor,
        cap=cap,
        overlong_buffer=length.overlong_buffer,
        overlong_penalty=length.overlong_penalty,
        per_token_penalty=length.per_token_penalty,
        min_response_tokens=length.min_response_tokens,
    )
    return raw, score_B, keep_B, int(hits)


def old_values(
    rollout: Rollout,
    critic: str,
    *,
    roles: Roles,
    chunk: ChunkSize,
    check_stop: Callable[[], None],
    world: World | None = None,
) -> Tensor:
    """A critic's values of every action, [B, T], normalised reward units, 0 outside the actions."""
    with roles.criticising(critic) as model, gathered(model):
        return over_actions(
            rollout,
            lambda batch: action_values(model, batch),
            f"{critic} value",
            roles.device,
            chunk,
            check_stop,
            world,
        )


@torch.no_grad()
def over_actions(
    rollout: Rollout,
    compute: Callable[[Batch], Tensor],
    what: str,
    device: str,
    chunk: ChunkSize,
    check_stop: Callable[[], None],
    world: World | None = None,
) -> Tensor:
    """``compute`` of every row, [B, T] float32 on the CPU, 0 outside the actions; ``chunk`` padded slots to a
    forward pass.

    Errors: DivergenceError that says ``what`` of which prompt is not finite.
    """
    lengths = total_lengths(rollout)

    def attempt(mine: list[int], budget: int) -> Tensor:
        result_BT = torch.zeros(rollout.action_mask_BT.shape)
        for rows in by_length(lengths, mine, budget):
            check_stop()
            batch = batch_of(rollout, rows, device)
            result_BT[rows, : batch.response_slots] = compute(batch).float().cpu()
        return torch.where(rollout.action_mask_BT, result_BT, 0.0)[mine]

    result_BT = spread(world or World(), lengths, lambda mine: chunk.run(partial(attempt, mine)))
    if not result_BT.isfinite().all():
        row, slot = (~result_BT.isfinite()).nonzero()[0].tolist()
        raise DivergenceError(
            f"the {what} of prompt {rollout.keys[row].prompt_id} is {float(result_BT[row, slot])} at answer token "
            f"{slot} ({rollout.texts[row][:80]!r}). Nothing was trained on it: resume from an earlier checkpoint with "
            "a smaller learning rate, or in float32."
        )
    return result_BT


def action_values(critic: ScalarModel, batch: Batch) -> Tensor:
    """V of the state *before* each response token, [B, T]: the hidden state one slot earlier."""
    return critic.values(batch.ids_BL, batch.mask_BL)[:, batch.prompt_slots - 1 : -1]


def estimate(
    scored: Scored, *, section: PpoSection, kl_coefficient: float, multiplier: float = 0.0, truncate: float = math.inf
) -> Experience:
    """Token rewards (-beta k1, score on the last action), GAE, returns; advantages whitened over the whole batch.

    With a cost its stream is (+beta k1, cost on the last action) and the advantage (A_r - lambda A_c) / (1 + lambda),
    lambda = ``multiplier``, so that the weight of the KL is beta for every lambda. ``truncate`` bounds the importance
    weights of another engine's samples.
    """
    rollout = scored.rollout
    mask = rollout.action_mask_BT
    k1_BT = kl.k1(rollout.logprob_BT, scored.reference_BT)
    reward_BT = token_rewards(scored.score_B, k1_BT, mask, beta=kl_coefficient)
    advantage_BT = gae(reward_BT, scored.value_BT, mask, gamma=section.gamma, lam=section.lam)
    return_BT, cost_return_BT = advantage_BT + scored.value_BT, None
    if scored.cost_B is not None and scored.cost_value_BT is not None:
        cost_BT = token_rewards(scored.cost_B, k1_BT, mask, beta=-kl_coefficient)
        cost_advantage_BT = gae(cost_BT, scored.cost_value_BT, mask, gamma=section.gamma, lam=section.lam)
        cost_return_BT = cost_advantage_BT + scored.cost_value_BT
        advantage_BT = combine(advantage_BT, cost_advantage_BT, multiplier)
    train_mask, corrected = mask & scored.keep_B[:, None], None
    if rollout.sampler_logprob_BT is not None:
        corrected = correction(rollout.logprob_BT, rollout.sampler_logprob_BT, mask, limit=truncate)
    return Experience(scored, train_mask, whiten(advantage_BT, train_mask), return_BT, cost_return_BT, corrected)


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
        **_cost_statistics(experience),
        **_mismatch_statistics(experience),
    }


def _cost_statistics(experience: Experience) -> dict[str, float]:
    scored = experience.scored
    if scored.raw_cost_B is None or scored.cost_value_BT is None or experience.cost_return_BT is None:
        return {}
    explained = explained_variance(scored.cost_value_BT, experience.cost_return_BT, scored.rollout.action_mask_BT)
    return {"cost_mean": float(scored.raw_cost_B.mean()), "cost_explained_variance": float(explained)}


def _mismatch_statistics(experience: Experience) -> dict[str, float]:
    corrected = experience.correction
    if corrected is None:
        return {}
    return {"mismatch_kl": float(corrected.kl), "mismatch_truncated": float(corrected.truncated)}
