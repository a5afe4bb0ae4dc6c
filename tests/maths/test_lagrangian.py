import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers
from torch.testing import assert_close

from direct_rlhf.errors import DivergenceError
from direct_rlhf.maths.advantages import gae
from direct_rlhf.maths.lagrangian import Multiplier, combine
from direct_rlhf.maths.rewards import token_rewards
from maths.batches import exactly, random_batch

START = Multiplier(1.0, learning_rate=0.1, bound=0.3, maximum=5.0)
COSTS = floats(-10, 10)
MULTIPLIERS = floats(0, 100)


def test_golden_values_of_the_multiplier_and_the_combined_advantage():
    once = START.update(0.8)
    twice = once.update(0.1)
    assert once.value == pytest.approx(1.05127110, abs=1e-8)
    assert twice.value == pytest.approx(1.02939842, abs=1e-8)
    reward, cost = torch.tensor([[1.0, -0.5]]), torch.tensor([[0.2, 0.8]])
    assert_close(combine(reward, cost, 2.0), torch.tensor([[0.2, -0.7]]))


@given(value=floats(1e-3, 5), rate=floats(0, 1), bound=COSTS, cost=COSTS)
def test_the_update_equals_its_formula_in_logarithms(value, rate, bound, cost):
    expected = math.exp(min(math.log(value) + rate * (cost - bound) * value, math.log(5.0)))
    assert Multiplier(value, rate, bound, 5.0).update(cost).value == pytest.approx(expected, rel=1e-12)


@given(value=floats(1e-3, 5), low=COSTS, high=COSTS)
def test_a_larger_cost_never_gives_a_smaller_multiplier(value, low, high):
    start = Multiplier(value, 0.1, 0.0, 5.0)
    low, high = sorted((low, high))
    assert start.update(low).value <= start.update(high).value
    assert start.update(0.0) == start
    assert start.update(1.0).value >= value >= start.update(-1.0).value


@given(value=floats(1e-3, 5), cost=COSTS)
def test_a_learning_rate_of_0_keeps_the_multiplier_to_the_last_bit(value, cost):
    fixed = Multiplier(value, 0.0, 0.0, 5.0)
    assert fixed.update(cost) == fixed


@pytest.mark.parametrize("cost", [1e6, 1e300])
def test_the_multiplier_stays_within_its_maximum_and_above_0(cost):
    assert START.update(cost).value == 5.0
    fallen = START.update(-cost)
    assert 0 < fallen.value < 1e-300
    assert fallen.update(-cost).value > 0


def test_a_multiplier_is_restored_from_its_state():
    later = START.update(0.8)
    assert Multiplier(**later.state()).update(0.1) == later.update(0.1)
    assert later.state() == {"value": later.value, "learning_rate": 0.1, "bound": 0.3, "maximum": 5.0}


@given(seed=integers(0, 999), multiplier=MULTIPLIERS)
def test_combining_equals_a_loop_and_lies_between_both_advantages(seed, multiplier):
    (reward, cost, _), _ = random_batch(seed)
    combined = combine(reward, cost, multiplier)
    for b, t in torch.ones_like(combined).nonzero().tolist():
        r, c = reward[b, t].item(), cost[b, t].item()
        assert combined[b, t].item() == pytest.approx((r - multiplier * c) / (1 + multiplier), abs=1e-12)
        assert min(r, -c) - 1e-12 <= combined[b, t].item() <= max(r, -c) + 1e-12


def test_at_multiplier_0_the_reward_is_left_and_at_a_huge_one_the_cost():
    (reward, cost, _), _ = random_batch(0)
    assert torch.equal(combine(reward, cost, 0.0), reward)
    assert_close(combine(reward, cost, 1e12), -cost)


@given(seed=integers(0, 999), multiplier=MULTIPLIERS, beta=floats(0, 2), lam=floats(0, 1))
def test_the_combined_kl_weight_is_beta_for_every_multiplier(seed, multiplier, beta, lam):
    """Two streams that both carry the penalty equal one stream with the combined score, values and penalty beta."""
    (k1, value, cost_value), mask = random_batch(seed)
    score, cost = k1.sum(1), value.sum(1)
    reward_stream = token_rewards(score, k1, mask, beta=beta)
    cost_stream = token_rewards(cost, k1, mask, beta=-beta)
    one_score = (score - multiplier * cost) / (1 + multiplier)
    one_value = (value - multiplier * cost_value) / (1 + multiplier)
    one_stream = token_rewards(one_score, k1, mask, beta=beta)
    exactly(combine(reward_stream, cost_stream, multiplier), one_stream)
    settings = {"gamma": 1.0, "lam": lam}
    exactly(
        combine(
            gae(reward_stream, value, mask, **settings), gae(cost_stream, cost_value, mask, **settings), multiplier
        ),
        gae(one_stream, one_value, mask, **settings),
    )


@given(seed=integers(0, 999), multiplier=MULTIPLIERS)
def test_half_of_the_penalty_in_each_stream_would_halve_the_kl_weight(seed, multiplier):
    (k1, _, _), mask = random_batch(seed)
    nothing = torch.zeros(len(k1), dtype=torch.float64)
    halves = [token_rewards(nothing, k1, mask, beta=sign * 0.15) for sign in (1, -1)]
    exactly(combine(*halves, multiplier), token_rewards(nothing, k1, mask, beta=0.15))


def test_padding_stays_0_and_what_it_held_stays_out():
    (k1, value, cost_value), mask = random_batch(1)
    junk = [torch.where(mask, x, math.nan) for x in (k1, value, cost_value)]
    streams = [
        gae(token_rewards(value.sum(1), junk[0], mask, beta=beta), v, mask, gamma=1.0, lam=0.95)
        for beta, v in ((0.1, junk[1]), (-0.1, junk[2]))
    ]
    combined = combine(*streams, 2.0)
    assert combined.isfinite().all()
    assert not combined[~mask].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0.0, 0.1, 0.0, 5.0), r"Multiplier\.value must be positive and at most maximum=5\.0, got 0\.0"),
        ((6.0, 0.1, 0.0, 5.0), r"at most maximum=5\.0, got 6\.0"),
        ((1.0, -0.1, 0.0, 5.0), r"Multiplier\.learning_rate must be at least 0, got -0\.1"),
        ((1.0, 0.1, math.nan, 5.0), r"Multiplier\.bound must be finite, got nan"),
        ((1.0, 0.1, 0.0, math.inf), r"Multiplier\.maximum must be finite, got inf"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Multiplier(*settings)


@pytest.mark.parametrize("cost", [math.nan, math.inf, -math.inf])
def test_a_cost_that_is_not_finite_is_refused(cost):
    with pytest.raises(DivergenceError, match=f"the mean cost is {cost}, .* cost model"):
        START.update(cost)


def test_unfit_shapes_and_multipliers_are_refused():
    with pytest.raises(ValueError, match="equal shape"):
        combine(torch.zeros(2, 3), torch.zeros(3, 2), 1.0)
    for wrong in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"multiplier must be a finite number of at least 0, got {wrong}"):
            combine(torch.zeros(1, 1), torch.zeros(1, 1), wrong)
