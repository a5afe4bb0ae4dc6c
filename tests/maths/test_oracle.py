"""PPO made of our maths alone reaches optima that are known in closed form, and known mistakes do not.

`benchmarks/oracle.py` holds the tasks and the trainer, `benchmarks/bandit.py` the whole table.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, sampled_from

from direct_rlhf.maths.kl import AdaptiveKL, FixedKL
from direct_rlhf.maths.lagrangian import Multiplier
from maths.batches import exactly
from oracle import BANDIT, MISTAKES, TREE, Method, advantages, balanced_multiplier, distance, measure, sample, train

PROBLEMS = pytest.mark.parametrize("problem", [BANDIT, TREE], ids=["bandit", "tree"])


def test_the_closed_form_gives_the_published_optima():
    policy, value = BANDIT.optimum(0.5)
    assert policy[0].tolist() == pytest.approx([0.02952056, 0.16359678, 0.80588387, 0.00099879], abs=1e-8)
    assert value.item() == pytest.approx(1.30318886, abs=1e-8)
    assert BANDIT.mean(policy, BANDIT.reward_SA) == pytest.approx(1.77436573, abs=1e-8)
    assert BANDIT.kl(policy) == pytest.approx(0.94235373, abs=1e-8)
    policy, value = TREE.optimum(0.5)
    expected = [
        [0.26832953, 0.72804346, 0.00362701],
        [0.04993893, 0.02755726, 0.92250382],
        [0.09005697, 0.00552168, 0.90442134],
    ]
    assert policy.tolist() == [pytest.approx(row, abs=1e-8) for row in expected]
    assert value.tolist() == pytest.approx([1.00495443, 0.69375829, 1.44824357], abs=1e-8)
    assert TREE.mean(policy, TREE.reward_SA) == pytest.approx(1.58990957, abs=1e-8)
    assert TREE.kl(policy) == pytest.approx(1.16991028, abs=1e-8)


@given(problem=sampled_from([BANDIT, TREE]), beta=floats(0.1, 5), seed=integers(0, 999))
def test_every_policy_falls_short_of_the_optimum_by_beta_times_its_kl_to_it(problem, beta, seed):
    best_policy, best_value = problem.optimum(beta)
    draw = torch.Generator().manual_seed(seed)
    policy = torch.randn(best_policy.shape, generator=draw, dtype=torch.float64).softmax(-1)
    gained = problem.mean(policy, problem.reward_SA) - beta * problem.kl(policy)
    to_the_best = replace(problem, reference_SA=best_policy).kl(policy)
    assert gained == pytest.approx(best_value[0].item() - beta * to_the_best, abs=1e-9)


def advantages_at_the_optimum(problem, method, beta=0.5):
    best_policy, best_value = problem.optimum(beta)
    episodes = sample(problem, best_policy, 128, torch.Generator().manual_seed(0))
    logp = best_policy.log()[episodes.state_BT, episodes.token_BT]
    return advantages(problem, method, episodes, logp, best_value[None, episodes.state_BT], beta=beta)[0]


@PROBLEMS
@given(lam=floats(0, 1), beta=floats(0.1, 5))
def test_at_the_optimum_every_advantage_is_0(problem, lam, beta):
    found = advantages_at_the_optimum(problem, Method(lam=lam), beta)
    exactly(found, torch.zeros_like(found))


@pytest.mark.parametrize("mistake", ["KL of the wrong sign", "no KL", "k3 in the reward"])
@PROBLEMS
def test_at_the_optimum_a_wrong_reward_leaves_advantages(problem, mistake):
    assert advantages_at_the_optimum(problem, MISTAKES[mistake]).square().mean().sqrt() > 0.2


@pytest.mark.parametrize("method", [Method(), Method(epochs=4), Method(whitened=True)], ids=["1", "4", "whitened"])
@PROBLEMS
def test_ppo_reaches_the_closed_form_optimum(problem, method):
    trained = train(problem, FixedKL(0.5), method)
    assert (trained.policy_SA - problem.optimum(0.5)[0]).abs().max() < 0.005
    measured = measure(problem, trained)
    assert measured["distance"] < 0.01
    assert measured["value_error"] < 0.01
    assert measured["last_rms_advantage"] < measured["first_rms_advantage"] / 20


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_ends_far_from_the_optimum(mistake):
    assert measure(TREE, train(TREE, FixedKL(0.5), MISTAKES[mistake]))["distance"] > 0.05


def test_under_adaptive_kl_ppo_reaches_the_optimum_of_the_weight_it_ends_with():
    measured = measure(BANDIT, train(BANDIT, AdaptiveKL(0.5, target=0.5, horizon=10_000), updates=600))
    assert measured["beta"] > 0.7
    assert measured["distance"] < 0.02
    assert measured["value_error"] < 0.04
    assert measured["kl"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("value", [0.5, 2.0])
def test_with_a_fixed_multiplier_ppo_reaches_the_optimum_of_the_weighed_scores(value):
    """At the KL weight beta whatever the multiplier: half of the penalty in each stream would end elsewhere."""
    trained = train(TREE, FixedKL(0.5), multiplier=Multiplier(value, learning_rate=0.0, bound=0.0, maximum=10.0))
    measured = measure(TREE, trained)
    assert measured["multiplier"] == value
    assert measured["distance"] < 0.01
    assert distance(trained.policy_SA, TREE.weighed(value).optimum(0.25)[0]) > 0.05


def test_a_learned_multiplier_brings_the_mean_cost_to_its_bound():
    start = Multiplier(1.0, learning_rate=0.1, bound=0.5, maximum=10.0)
    measured = measure(BANDIT, train(BANDIT, FixedKL(0.5), multiplier=start, updates=600))
    assert measured["cost"] == pytest.approx(0.5, abs=0.05)
    assert measured["multiplier"] == pytest.approx(balanced_multiplier(BANDIT, 0.5, bound=0.5), rel=0.05)
    assert measured["distance"] < 0.02
