"""Tasks whose best policy is known in closed form, and a PPO made of `direct_rlhf.maths` alone that must find it.

The maximiser of E[r] - beta KL(policy || reference) is reference * exp(r / beta), normalised; over several tokens the
same holds in every state with the soft value of what follows in place of r. So a wrong sign, a wrong KL estimator or a
missing credit shows as a distance, and `MISTAKES` shows that it does.

Legend: B episodes, T slots, S states, A tokens, K streams (reward, then cost if there is one).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from direct_rlhf.maths.advantages import gae
from direct_rlhf.maths.kl import AdaptiveKL, FixedKL, k1, k2, k3
from direct_rlhf.maths.lagrangian import Multiplier, combine
from direct_rlhf.maths.losses import policy_loss, value_loss
from direct_rlhf.maths.masked import masked_mean, whiten
from direct_rlhf.maths.rewards import token_rewards

EPISODES = 512  # per update
LEARNING_RATE = 0.05  # Adam's, falling to 0 along a line


def f64(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """A tabular task. In state s token a pays ``reward_SA`` and leads to ``following_SA``; -1 is the end.

    Start is state 0, a state's successors have larger numbers, and only tokens that end an episode pay: the score.
    """

    reference_SA: Tensor
    reward_SA: Tensor
    following_SA: Tensor
    n_slots: int
    cost_SA: Tensor | None = None

    def optimum(self, beta: float) -> tuple[Tensor, Tensor]:
        """The best policy [S, A] and its soft values [S], V*(s) = beta log sum_a ref exp(V*(following) / beta)."""
        value_S, policy_SA = self._zero_values(), torch.zeros_like(self.reference_SA)
        for s in reversed(range(len(self.reference_SA))):
            target_A = self.reward_SA[s] + value_S[self.following_SA[s]]
            value_S[s] = beta * torch.logsumexp(self.reference_SA[s].log() + target_A / beta, 0)
            policy_SA[s] = self.reference_SA[s] * ((target_A - value_S[s]) / beta).exp()
        return policy_SA, value_S[:-1]

    def mean(self, policy_SA: Tensor, payment_SA: Tensor) -> float:
        """Expected sum of the payments of one episode under ``policy_SA``, exactly."""
        value_S = self._zero_values()
        for s in reversed(range(len(policy_SA))):
            value_S[s] = (policy_SA[s] * (payment_SA[s] + value_S[self.following_SA[s]])).sum()
        return value_S[0].item()

    def kl(self, policy_SA: Tensor) -> float:
        """KL(policy || reference) of whole episodes, nats."""
        return self.mean(policy_SA, (policy_SA / self.reference_SA).log())

    def weighed(self, multiplier: float) -> "Problem":
        """The task without cost that PPO-Lagrangian solves at this multiplier."""
        assert self.cost_SA is not None
        reward_SA = (self.reward_SA - multiplier * self.cost_SA) / (1 + multiplier)
        return replace(self, reward_SA=reward_SA, cost_SA=None)

    def _zero_values(self) -> Tensor:
        return torch.zeros(len(self.reference_SA) + 1, dtype=torch.float64)  # the last one is the end's: index -1


BANDIT = Problem(
    reference_SA=f64([[0.4, 0.3, 0.2, 0.1]]),
    reward_SA=f64([[0.0, 1.0, 2.0, -1.0]]),
    following_SA=torch.tensor([[-1, -1, -1, -1]]),
    n_slots=1,
    cost_SA=f64([[-0.5, -0.5, 1.5, 0.0]]),
)
# tokens a, b and E, the end; states start, after a, after b
TREE = Problem(
    reference_SA=f64([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.6, 0.1, 0.3]]),
    reward_SA=f64([[0.0, 0.0, -1.0], [0.0, -0.5, 1.0], [0.5, 0.0, 2.0]]),
    following_SA=torch.tensor([[1, 2, -1], [-1, -1, -1], [-1, -1, -1]]),
    n_slots=2,
    cost_SA=f64([[0.0, 0.0, 0.5], [0.0, -1.0, -0.5], [1.0, 0.0, 1.5]]),
)
PROBLEMS = {"bandit": BANDIT, "two-step tree": TREE}


def distance(policy_SA: Tensor, other_SA: Tensor) -> float:
    """Total variation between two policies, the largest over the states."""
    return ((policy_SA - other_SA).abs().sum(-1) / 2).max().item()


@dataclass(frozen=True)
class Episodes:
    """A batch of sampled answers; ``score_KB`` holds the reward and, where the task has one, the cost."""

    state_BT: Tensor
    token_BT: Tensor
    mask_BT: Tensor
    score_KB: Tensor


def sample(problem: Problem, policy_SA: Tensor, n: int, draw: torch.Generator) -> Episodes:
    """``n`` episodes; slots after the end are state 0, token 0 and False."""
    payments = [problem.reward_SA] if problem.cost_SA is None else [problem.reward_SA, problem.cost_SA]
    state_BT = torch.zeros(n, problem.n_slots, dtype=torch.long)
    token_BT, mask_BT = torch.zeros_like(state_BT), torch.zeros_like(state_BT, dtype=torch.bool)
    score_KB = torch.zeros(len(payments), n, dtype=torch.float64)
    state_B = torch.zeros(n, dtype=torch.long)
    for t in range(problem.n_slots):
        running_B = state_B >= 0
        at_B = state_B.clamp(min=0)
        drawn_B = torch.multinomial(policy_SA[at_B], 1, generator=draw)[:, 0]
        for score_B, payment_SA in zip(score_KB, payments, strict=True):
            score_B += torch.where(running_B, payment_SA[at_B, drawn_B], 0.0)
        state_BT[:, t], token_BT[:, t] = at_B * running_B, drawn_B * running_B
        mask_BT[:, t] = running_B
        state_B = torch.where(running_B, problem.following_SA[at_B, drawn_B], -1)
    return Episodes(state_BT, token_BT, mask_BT, score_KB)


@dataclass(frozen=True)
class Method:
    """How PPO is done. The defaults are the project's rules, except that whitening is a choice here."""

    epochs: int = 1
    lam: float = 0.95
    whitened: bool = False
    critic: bool = True  # False: V is 0 for ever
    reward_kl: Callable[..., Tensor] = k1  # the estimator in the token reward ...
    reward_kl_sign: float = 1.0  # ... and its sign; 0 leaves it out
    loss_kl: Callable[..., Tensor] | None = None  # an estimator as a term of the loss, token by token


MISTAKES = {
    "KL of the wrong sign": Method(reward_kl_sign=-1.0),
    "no KL": Method(reward_kl_sign=0.0),
    "k3 in the reward": Method(reward_kl=k3),
    "k1 as a loss per token": Method(reward_kl_sign=0.0, loss_kl=k1),
    "k2 as a loss per token": Method(reward_kl_sign=0.0, loss_kl=k2),
    "k3 as a loss per token": Method(reward_kl_sign=0.0, loss_kl=k3),
    "lambda 0 without a critic": Method(lam=0.0, critic=False),
}


@dataclass(frozen=True)
class Trained:
    """Where PPO ended."""

    policy_SA: Tensor
    value_KS: Tensor
    controller: AdaptiveKL | FixedKL
    multiplier: Multiplier | None
    first_advantages: Tensor  # of the first batch's tokens, 1-d
    last_advantages: Tensor  # of a fresh batch of the trained policy


def advantages(
    problem: Problem,
    method: Method,
    episodes: Episodes,
    logp_BT: Tensor,
    value_KBT: Tensor,
    *,
    beta: float,
    multiplier: Multiplier | None = None,
) -> tuple[Tensor, Tensor]:
    """Unwhitened advantages: the combined ones [B, T] and those of each stream [K, B, T]."""
    ref_BT = problem.reference_SA.log()[episodes.state_BT, episodes.token_BT]
    kl_BT = method.reward_kl(logp_BT, ref_BT, episodes.mask_BT)
    streams = []
    for score_B, value_BT, sign in zip(episodes.score_KB, value_KBT, (1.0, -1.0), strict=False):
        weight = sign * method.reward_kl_sign * beta  # the penalty lowers the reward and raises the cost
        reward_BT = token_rewards(score_B, kl_BT, episodes.mask_BT, beta=weight)
        streams.append(gae(reward_BT, value_BT, episodes.mask_BT, gamma=1.0, lam=method.lam))
    combined = streams[0] if multiplier is None else combine(streams[0], streams[1], multiplier.value)
    return combined, torch.stack(streams)


def train(
    problem: Problem,
    controller: AdaptiveKL | FixedKL,
    method: Method | None = None,
    *,
    multiplier: Multiplier | None = None,
    updates: int = 300,
    seed: int = 0,
) -> Trained:
    """PPO from the reference on ``problem``; its cost counts only if there is a ``multiplier``."""
    method = method or Method()
    problem = problem if multiplier is not None else replace(problem, cost_SA=None)
    draw = torch.Generator().manual_seed(seed)
    logits_SA = problem.reference_SA.log().clone().requires_grad_()
    value_KS = torch.zeros(1 if multiplier is None else 2, len(logits_SA), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits_SA, value_KS] if method.critic else [logits_SA], lr=LEARNING_RATE)
    ref_SA = problem.reference_SA.log()
    seen = []
    for update in range(updates + 1):
        with torch.no_grad():
            episodes = sample(problem, logits_SA.softmax(-1), EPISODES, draw)
            state_BT, token_BT, mask_BT = episodes.state_BT, episodes.token_BT, episodes.mask_BT
            old_BT, old_value_KBT = logits_SA.log_softmax(-1)[state_BT, token_BT], value_KS[:, state_BT]
            beta = controller.coefficient
            advantage_BT, stream_KBT = advantages(
                problem, method, episodes, old_BT, old_value_KBT, beta=beta, multiplier=multiplier
            )
            seen.append(advantage_BT[mask_BT])
        if update == updates:
            break  # this batch is only looked at
        adam.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / updates)
        trained_BT = whiten(advantage_BT, mask_BT) if method.whitened else advantage_BT
        for _ in range(method.epochs):
            logp_BT = logits_SA.log_softmax(-1)[state_BT, token_BT]
            loss = policy_loss(logp_BT, old_BT, trained_BT, mask_BT, clip=0.2).loss
            if method.loss_kl is not None:
                kl_BT = method.loss_kl(logp_BT, ref_SA[state_BT, token_BT], mask_BT)
                loss = loss + beta * masked_mean(kl_BT, mask_BT)
            for value_S, was_BT, stream_BT in zip(value_KS, old_value_KBT, stream_KBT, strict=True):
                loss = loss + value_loss(value_S[state_BT], was_BT, stream_BT + was_BT, mask_BT, clip=0.2).loss
            adam.zero_grad()
            loss.backward()
            adam.step()
        controller = controller.update(k1(old_BT, ref_SA[state_BT, token_BT], mask_BT).sum(1).mean().item(), EPISODES)
        if multiplier is not None:
            multiplier = multiplier.update(episodes.score_KB[1].mean().item())
    policy_SA = logits_SA.detach().softmax(-1)
    return Trained(policy_SA, value_KS.detach(), controller, multiplier, seen[0], seen[-1])


def measure(problem: Problem, result: Trained) -> dict[str, float]:
    """The result against the closed form at the weight, and the multiplier, that it ended with."""
    beta, policy_SA = result.controller.coefficient, result.policy_SA
    solved = replace(problem, cost_SA=None)
    measured: dict[str, float] = {}
    value_S = result.value_KS[0]
    if result.multiplier is not None and problem.cost_SA is not None:
        weight = result.multiplier.value
        solved = problem.weighed(weight)
        value_S = (result.value_KS[0] - weight * result.value_KS[1]) / (1 + weight)
        measured["multiplier"] = weight
        measured["cost"] = problem.mean(policy_SA, problem.cost_SA)
    best_SA, best_value_S = solved.optimum(beta)
    return measured | {
        "beta": beta,
        "distance": distance(policy_SA, best_SA),
        "value_error": (value_S - best_value_S).abs().max().item(),
        "kl": problem.kl(policy_SA),
        "reward": problem.mean(policy_SA, problem.reward_SA),
        "best_reward": problem.mean(best_SA, problem.reward_SA),
        **_spread("first", result.first_advantages),
        **_spread("last", result.last_advantages),
    }


def _spread(name: str, advantages: Tensor) -> dict[str, float]:
    rms = advantages.square().mean().sqrt().item()
    return {f"{name}_largest_advantage": advantages.abs().max().item(), f"{name}_rms_advantage": rms}


def balanced_multiplier(problem: Problem, beta: float, bound: float) -> float:
    """The multiplier at whose optimum the mean cost equals ``bound``, by bisection of its logarithm."""
    assert problem.cost_SA is not None
    low, high = -10.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        policy_SA, _ = problem.weighed(math.exp(middle)).optimum(beta)
        low, high = (middle, high) if problem.mean(policy_SA, problem.cost_SA) > bound else (low, middle)
    return math.exp(low)
