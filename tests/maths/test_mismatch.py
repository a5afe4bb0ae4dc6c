import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers

from direct_rlhf.maths.mismatch import correction
from maths.batches import JUNK, exactly, random_batch


def loop(logp, sampler, mask, limit):
    """Weights, KL and truncated share, one token at a time."""
    weights, kl, truncated, n = torch.ones_like(logp), 0.0, 0, int(mask.sum())
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(logp[b, t] - sampler[b, t])
        weights[b, t] = min(ratio, limit)
        kl += ratio - 1 - math.log(ratio)
        truncated += ratio > limit
    return weights, kl / n, truncated / n


@given(seed=integers(0, 999), limit=floats(1, 4))
def test_weights_and_kl_equal_their_loop(seed, limit):
    (logp, sampler, _), mask = random_batch(seed)
    found = correction(logp, sampler, mask, limit=limit)
    weights, kl, truncated = loop(logp, sampler, mask, limit)
    exactly(found.weight_BT, weights)
    exactly(found.kl, kl)
    exactly(found.truncated, truncated)


def test_weights_are_exactly_1_where_sampler_and_trainer_agree():
    (logp, _, _), mask = random_batch(0)
    found = correction(logp.float(), logp.float().clone(), mask, limit=2.0)
    assert torch.equal(found.weight_BT, torch.ones_like(found.weight_BT))
    assert found.kl.item() == found.truncated.item() == 0


def test_a_weight_is_cut_at_the_limit_and_no_small_one_is():
    logp = torch.tensor([[math.log(3.0), math.log(0.01), math.log(2.0), 0.0]])
    found = correction(logp, torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), limit=2.0)
    assert found.weight_BT[0].tolist() == pytest.approx([2.0, 0.01, 2.0, 1.0])
    assert found.truncated.item() in (0.25, 0.5)  # log 2 and back may round up


def test_the_kl_is_that_of_the_sampler_from_the_trainer():
    """Mean over the sampler's tokens, whose expectation is the KL; the other direction is another number."""
    sampler, trainer = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]], dtype=torch.float64)
    tokens = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[None]
    found = correction(trainer.log()[tokens], sampler.log()[tokens], tokens >= 0, limit=9.0)
    exactly(found.kl, float((sampler * (sampler / trainer).log()).sum()))


@given(seed=integers(0, 99))
def test_what_lies_under_the_mask_reaches_nothing(seed):
    (logp, sampler, _), mask = random_batch(seed)
    for junk in JUNK:
        filled = [torch.where(mask, x, junk) for x in (logp, sampler)]
        found, clean = correction(*filled, mask, limit=2.0), correction(logp, sampler, mask, limit=2.0)
        assert torch.equal(found.weight_BT, clean.weight_BT)
        assert (found.kl.item(), found.truncated.item()) == (clean.kl.item(), clean.truncated.item())


def test_weights_carry_no_gradient_and_a_limit_below_1_is_refused():
    (logp, sampler, _), mask = random_batch(1)
    found = correction(logp.requires_grad_(), sampler, mask, limit=2.0)
    assert not found.weight_BT.requires_grad
    with pytest.raises(ValueError, match=r"limit must be at least 1, got 0\.5"):
        correction(logp, sampler, mask, limit=0.5)
