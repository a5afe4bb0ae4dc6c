"""PPO made of our maths alone reaches optima that are known in closed form.

The maximiser of E[r] - beta KL(policy || reference) is reference * exp(r / beta), normalised. Legend: B episodes,
T slots, S states, A tokens. The tree's tokens are a, b and E (the end); its states are start, after a, after b.
"""

from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from direct_rlhf.maths.advantages import gae
from direct_rlhf.maths.kl import AdaptiveKL, FixedKL, k1
from direct_rlhf.maths.losses import policy_loss, value_loss
from direct_rlhf.maths.rewards import token_rewards

EPISODES = 512


@dataclass(frozen=True)
class Problem:
    """A tabular task: in state s, token a leads to ``following[s][a]``, or ends with ``reward[s][a]`` if that is -1."""

    reference_SA: torch.Tensor
    reward_SA: torch.Tensor
    following_SA: torch.Tensor
    n_slots: int

    def optimum(self, beta):
        """Soft values V*(s) and the optimal policy, by backward induction (later states come later)."""
        value_S, policy_SA = torch.zeros(len(self.reference_SA)), torch.zeros_like(self.reference_SA)
        for s in reversed(range(len(value_S))):
            ends = self.following_SA[s] < 0
            target_A = torch.where(ends, self.reward_SA[s], value_S[self.following_SA[s].clamp(min=0)])
            value_S[s] = beta * (self.reference_SA[s] * (target_A / beta).exp()).sum().log()
            policy_SA[s] = self.reference_SA[s] * ((target_A - value_S[s]) / beta).exp()
        return policy_SA, value_S


BANDIT = Problem(
    reference_SA=torch.tensor([[0.4, 0.3, 0.2, 0.1]]),
    reward_SA=torch.tensor([[0.0, 1.0, 2.0, -1.0]]),
    following_SA=torch.tensor([[-1, -1, -1, -1]]),
    n_slots=1,
)
TREE = Problem(
    reference_SA=torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.6, 0.1, 0.3]]),
    reward_SA=torch.tensor([[0.0, 0.0, -1.0], [0.0, -0.5, 1.0], [0.5, 0.0, 2.0]]),
    following_SA=torch.tensor([[1, 2, -1], [-1, -1, -1], [-1, -1, -1]]),
    n_slots=2,
)


def sample_episodes(problem, logits_SA, draw):
    """States and tokens [B, T], the mask of actions, and the score [B]."""
    state_BT = torch.zeros(EPISODES, problem.n_slots, dtype=torch.long)
    token_BT, mask_BT = torch.zeros_like(state_BT), torch.zeros_like(state_BT, dtype=torch.bool)
    score_B, state_B = torch.zeros(EPISODES), torch.zeros(EPISODES, dtype=torch.long)
    for t in range(problem.n_slots):
        running_B = state_B >= 0
        state_BT[:, t] = state_B.clamp(min=0)
        token_BT[:, t] = torch.multinomial(logits_SA.softmax(-1)[state_BT[:, t]], 1, generator=draw)[:, 0]
        mask_BT[:, t] = running_B
        next_B = problem.following_SA[state_BT[:, t], token_BT[:, t]]
        score_B = torch.where(running_B & (next_B < 0), problem.reward_SA[state_BT[:, t], token_BT[:, t]], score_B)
        state_B = torch.where(running_B, next_B, -1)
    return state_BT, token_BT, mask_BT, score_B


def train(problem, controller, *, updates=300, epochs=1, seed=0):
    """Plain PPO: 512 episodes an update, Adam from 0.05 to 0. Returns (policy [S, A], value [S], controller)."""
    draw = torch.Generator().manual_seed(seed)
    logits_SA = problem.reference_SA.log().clone().requires_grad_()
    value_S = torch.zeros(len(logits_SA), requires_grad=True)
    adam = torch.optim.Adam([logits_SA, value_S], lr=0.05)
    reference_SA = problem.reference_SA.log()
    for update in range(updates):
        adam.param_groups[0]["lr"] = 0.05 * (1 - update / updates)
        with torch.no_grad():
            state_BT, token_BT, mask_BT, score_B = sample_episodes(problem, logits_SA, draw)
            old_BT = logits_SA.log_softmax(-1)[state_BT, token_BT]
            old_value_BT = value_S[state_BT]
            k1_BT = k1(old_BT, reference_SA[state_BT, token_BT], mask_BT)
            reward_BT = token_rewards(score_B, k1_BT, mask_BT, beta=controller.coefficient)
            advantage_BT = gae(reward_BT, old_value_BT, mask_BT, gamma=1.0, lam=0.95)
        for _ in range(epochs):
            logp_BT = logits_SA.log_softmax(-1)[state_BT, token_BT]
            policy = policy_loss(logp_BT, old_BT, advantage_BT, mask_BT, clip=0.2)
            value = value_loss(value_S[state_BT], old_value_BT, advantage_BT + old_value_BT, mask_BT, clip=0.2)
            adam.zero_grad()
            (policy.loss + value.loss).backward()
            adam.step()
        controller = controller.update(k1_BT.sum(1).mean().item(), EPISODES)
    return logits_SA.detach().softmax(-1), value_S.detach(), controller


def test_the_closed_form_gives_the_published_optima():
    policy, value = BANDIT.optimum(0.5)
    near = {"rtol": 0, "atol": 1e-6}
    assert_close(policy, torch.tensor([[0.02952056, 0.16359678, 0.80588387, 0.00099879]]), **near)
    assert_close(value, torch.tensor([1.30318886]), **near)
    policy, value = TREE.optimum(0.5)
    expected = [
        [0.26832953, 0.72804346, 0.00362701],
        [0.04993893, 0.02755726, 0.92250382],
        [0.09005697, 0.00552168, 0.90442134],
    ]
    assert_close(policy, torch.tensor(expected), **near)
    assert_close(value, torch.tensor([1.00495443, 0.69375829, 1.44824357]), **near)


@pytest.mark.parametrize("epochs", [1, 4])
@pytest.mark.parametrize("problem", [BANDIT, TREE], ids=["bandit", "tree"])
def test_ppo_reaches_the_closed_form_optimum(problem, epochs):
    policy, value, _ = train(problem, FixedKL(0.5), epochs=epochs)
    best_policy, best_value = problem.optimum(0.5)
    assert (policy - best_policy).abs().max() < 0.005
    assert (value - best_value).abs().max() < 0.01


def test_under_adaptive_kl_ppo_reaches_the_optimum_of_the_weight_it_ends_with():
    policy, value, controller = train(BANDIT, AdaptiveKL(0.5, target=0.5, horizon=10_000), updates=600)
    assert controller.coefficient > 0.7
    best_policy, best_value = BANDIT.optimum(controller.coefficient)
    assert (policy - best_policy).abs().max() < 0.02
    assert (value - best_value).abs().max() < 0.04
