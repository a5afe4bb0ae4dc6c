"""One worst-case batch before the first step: what would fail at full length fails now, and not hours later."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.data.types import Prompt
from direct_rlhf.errors import BackendError, DirectRLHFError
from direct_rlhf.models.roles import POLICY
from direct_rlhf.models.sharded import gathered
from direct_rlhf.rollout.types import FinishReason, Rollout, SampleKey, SamplingSettings
from direct_rlhf.train.experience import Experience, Judges, Scored, answers_of, batch_of
from direct_rlhf.train.reward_sources import ModelRewardSource
from direct_rlhf.train.update import Learner, critic_gradients, policy_gradients


def rehearse(
    learner: Learner,
    judges: Judges,
    prompts: Sequence[tuple[Prompt, list[int]]],
    tokens: Tokens,
    settings: SamplingSettings,
    check_stop: Callable[[], None],
) -> None:
    """Forward and backward of every role on the longest prompt with a full-length answer; no state changes.

    Rewards of the user's own code are not called. Where memory runs out the micro-batch shrinks, as it would later.
    Errors: BackendError that says at which length a role failed; OutOfMemoryError for one answer that does not fit.
    """
    prompt, prompt_ids = max(prompts, key=lambda pair: len(pair[1]))
    length = settings.max_new_tokens
    total = len(prompt_ids) + length
    rows = min(learner.section.minibatch_size, learner.world.size * max(learner.chunk.size // total, 1))
    rollout = longest_rollout(prompt_ids, prompt, rows, length, tokens)
    experience = blank_experience(rollout, with_cost=judges.cost is not None)
    minibatch, count = list(range(rows)), float(rollout.action_mask_BT.sum())
    key = (learner.seed, 0, 0, 1)  # not an iteration's first minibatch, whose ratio would have to be 1

    def gradients(role: str, budget: int) -> object:
        check_stop()
        learner.optimisers[role].forget()
        if role == POLICY:
            return policy_gradients(experience, minibatch, count, learner, key, budget)
        return critic_gradients(experience, minibatch, count, learner, role, budget)

    def reference(budget: int) -> object:
        batch = batch_of(rollout, minibatch[: max(budget // total, 1)], learner.roles.device)
        return learner.roles.reference_logprobs(batch.ids_BL, batch.mask_BL, batch.action_BL, settings.temperature)

    role = ""
    try:
        for role in learner.roles.trained:
            learner.chunk.run(partial(gradients, role))
            learner.optimisers[role].forget()
        role = "reference"
        with gathered(learner.roles.reference or learner.roles.policy):
            learner.chunk.run(reference)
        role = "reward model"
        for judge in (judges.reward, judges.cost):
            if isinstance(judge, ModelRewardSource):
                judge.score(answers_of(rollout, [prompt] * rows))
    except DirectRLHFError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise BackendError(
            f"the {role} fails on the longest batch, {len(prompt_ids)} prompt and {length} answer tokens ({error}). "
            "Nothing was trained. Lower data.max_prompt_tokens or ppo.sampling.max_new_tokens."
        ) from error


def longest_rollout(prompt_ids: Sequence[int], prompt: Prompt, rows: int, length: int, tokens: Tokens) -> Rollout:
    """``rows`` times the same prompt, with an answer of ``length`` tokens, all of them actions."""
    answer = list(prompt_ids[-1:]) * length
    ones = torch.ones(rows, length, dtype=torch.bool)
    return Rollout(
        prompt_ids_BP=torch.tensor([list(prompt_ids)] * rows),
        prompt_mask_BP=torch.ones(rows, len(prompt_ids), dtype=torch.bool),
        response_ids_BT=torch.tensor([answer] * rows),
        response_mask_BT=ones,
        action_mask_BT=ones,
        logprob_BT=torch.zeros(rows, length),
        finish=(FinishReason.LENGTH,) * rows,
        texts=(tokens.decode(answer),) * rows,
        keys=tuple(SampleKey(0, prompt.id, 0, row) for row in range(rows)),
        policy_version=0,
    )


def blank_experience(rollout: Rollout, *, with_cost: bool) -> Experience:
    """Zeros everywhere: only shapes matter here."""
    zero_BT, zero_B = torch.zeros_like(rollout.logprob_BT), torch.zeros(len(rollout))
    cost = zero_BT if with_cost else None
    keep_B = torch.ones(len(rollout), dtype=torch.bool)
    scored = Scored(rollout, zero_B, 0, zero_B, keep_B, zero_BT, zero_BT, cost_value_BT=cost)
    return Experience(scored, rollout.action_mask_BT, zero_BT, zero_BT, cost)
