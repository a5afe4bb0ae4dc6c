"""The project's golden vectors: two answers, one of full length and one of two tokens."""

import pytest
import torch
from torch.testing import assert_close

from direct_rlhf.maths.advantages import gae
from direct_rlhf.maths.kl import AdaptiveKL, k1, k2, k3
from direct_rlhf.maths.losses import bradley_terry, policy_loss, value_loss
from direct_rlhf.maths.masked import masked_mean, masked_var, whiten
from direct_rlhf.maths.rewards import explained_variance, token_rewards


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
SCORE = f64([1.5, -0.5])
LOGP = f64([[-1.0, -0.5, -2.0, -0.1], [-0.7, -1.2, 0, 0]])
REF = f64([[-1.2, -0.4, -2.5, -0.3], [-0.9, -1.0, 0, 0]])
OLD = f64([[-1.1, -0.9, -1.9, -0.1], [-0.4, -1.2, 0, 0]])
VALUE = f64([[0.1, 0.2, 0.3, 0.4], [-0.2, 0.5, 0, 0]])
NEW_VALUE = f64([[0.15, 0.6, 0.1, 0.35], [-0.1, 0.1, 0, 0]])
REWARD = f64([[-0.02, 0.01, -0.05, 1.48], [-0.02, -0.48, 0, 0]])
ADVANTAGE = f64([[1.15559, 1.1322, 1.076, 1.08], [-0.251, -0.98, 0, 0]])
RETURN = f64([[1.25559, 1.3322, 1.376, 1.48], [-0.451, -0.48, 0, 0]])
WHITENED = f64([[0.737295, 0.709486, 0.642667, 0.647423], [-0.935064, -1.801806, 0, 0]])
UNBIASED = f64([[0.673055, 0.647669, 0.586672, 0.591013], [-0.853593, -1.644816, 0, 0]])


def near(actual, expected, atol=1e-8):
    assert_close(actual, torch.as_tensor(expected, dtype=torch.float64).reshape(actual.shape), rtol=0, atol=atol)


def advantages(lam=0.95):
    return gae(token_rewards(SCORE, k1(LOGP, REF), MASK, beta=0.1), VALUE, MASK, gamma=1.0, lam=lam)


def sequence_mean(per_token):
    """Mean over answers of each answer's token mean: the aggregation we do not use, for its golden values."""
    return (per_token.sum(1) / MASK.sum(1)).mean()


def test_token_rewards_put_the_score_on_the_last_token():
    near(token_rewards(SCORE, k1(LOGP, REF), MASK, beta=0.1), REWARD)


def test_advantages_and_returns():
    near(advantages(), ADVANTAGE)
    near(torch.where(MASK, advantages() + VALUE, 0.0), RETURN)
    near(advantages(lam=1.0)[0], [1.32, 1.24, 1.13, 1.08])


def test_advantage_moments_and_explained_variance():
    near(masked_mean(ADVANTAGE, MASK), 0.535465, atol=1e-6)
    near(masked_var(ADVANTAGE, MASK), 0.70741758)
    near(masked_var(ADVANTAGE, MASK) * 6 / 5, 0.84890110)
    near(explained_variance(VALUE, RETURN, MASK), 0.05142826)


def test_whitening_takes_the_population_variance():
    near(whiten(advantages(), MASK), WHITENED, atol=1e-6)
    near(whiten(advantages(), MASK) * (5 / 6) ** 0.5, UNBIASED, atol=1e-6)


def test_policy_loss_and_its_gradient():
    logp = LOGP.clone().requires_grad_()
    result = policy_loss(logp, OLD, whiten(advantages(), MASK), MASK, clip=0.2)
    near(result.loss, -0.05754902)
    near(result.clip_fraction, 1 / 3)
    near(result.k3, 0.02377521)
    result.loss.backward()
    near(logp.grad, [[-0.13580617, 0, -0.09691817, -0.10790377], [0, 0.30030097, 0, 0]])


@pytest.mark.parametrize(
    ("scale", "token_mean", "per_sequence"), [(1, -0.05754902, 0.27557039), ((5 / 6) ** 0.5, -0.05253483, 0.25156019)]
)
def test_policy_loss_under_both_aggregations(scale, token_mean, per_sequence):
    advantage = whiten(advantages(), MASK) * scale
    near(policy_loss(LOGP, OLD, advantage, MASK, clip=0.2).loss, token_mean)
    rows = [policy_loss(LOGP[b], OLD[b], advantage[b], MASK[b], clip=0.2).loss for b in range(2)]
    near(torch.stack(rows).mean(), per_sequence)


def test_value_loss_and_its_gradient():
    value = NEW_VALUE.clone().requires_grad_()
    result = value_loss(value, VALUE, RETURN, MASK, clip=0.2)
    near(result.loss, 0.47733359)
    near(result.clip_fraction, 1 / 3)
    result.loss.backward()
    near(value.grad, [[-0.184265, 0, -0.21266667, -0.18833333], [0.0585, 0, 0, 0]])


@pytest.mark.parametrize(
    ("estimator", "token", "sequence"), [(k1, 0.13333333, 0.4), (k2, 0.035, 0.105), (k3, 0.03154943, 0.09464830)]
)
def test_kl_token_mean_and_sequence_sum(estimator, token, sequence):
    near(masked_mean(estimator(LOGP, REF), MASK), token)
    near(estimator(LOGP, REF, MASK).sum(1).mean(), sequence)


def test_adaptive_kl_one_update_after_another():
    controller = AdaptiveKL(coefficient=0.1, target=6.0, horizon=1e4)
    for kl, expected in [(3.0, 0.099488), (12.0, 0.09999738), (6.6, 0.10025337)]:
        controller = controller.update(kl, 256)
        assert controller.coefficient == pytest.approx(expected, abs=1e-8)


def test_bradley_terry_with_margin_and_centring():
    chosen, rejected = f64([1.0, 0.2]), f64([0.5, 0.7])
    near(bradley_terry(chosen, rejected), 0.72407698)
    near(bradley_terry(chosen, rejected, f64([1.0, 0.0])), 0.97407698)
    near(bradley_terry(chosen, rejected, centring=0.01) - bradley_terry(chosen, rejected), 0.0153)


def test_the_score_one_slot_after_the_last_token_gives_other_advantages():
    """TRL's slot: our GAE gives its numbers when fed its rewards, the critic's .25 on the first pad and one slot more."""
    mask = torch.tensor([[1, 1, 1]]).bool()
    reward, value = f64([[-0.02, 0.02, -0.5]]), f64([[-0.2, 0.5, 0.25]])
    theirs = gae(reward, value, mask, gamma=1.0, lam=0.95)[0, :2]
    near(theirs, [-0.215375, -0.9425])
    assert (theirs - advantages()[1, :2]).abs().min() > 0.03
