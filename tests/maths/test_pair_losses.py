import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers

from direct_rlhf.maths.losses import bradley_terry, dpo
from maths.batches import exactly


def random_scores(seed, n_pairs=5):
    return torch.randn(4, n_pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x))


@given(seed=integers(0, 999))
def test_pair_losses_equal_their_loops(seed):
    scores = random_scores(seed)
    rows = scores.T.tolist()
    preference = [minus_log_sigmoid(c - r - m) + 0.1 * (c + r) ** 2 for c, r, m, _ in rows]
    found = bradley_terry(scores[0], scores[1], scores[2], centring=0.1).item()
    assert found == pytest.approx(sum(preference) / len(rows), abs=1e-10)
    rewards = [(0.3 * (c - ref_c), 0.3 * (r - ref_r)) for c, r, ref_c, ref_r in rows]
    expected = [(minus_log_sigmoid(c - r), c, r, c > r) for c, r in rewards]
    result = dpo(*scores, beta=0.3)
    found = [x.item() for x in (result.loss, result.chosen_reward, result.rejected_reward, result.accuracy)]
    assert found == pytest.approx([sum(column) / len(rows) for column in zip(*expected, strict=True)], abs=1e-10)


def test_bradley_terry_on_equal_and_on_huge_scores():
    assert bradley_terry(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2))
    chosen = torch.tensor([-1e4], requires_grad=True)
    loss = bradley_terry(chosen, torch.tensor([1e4]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert chosen.grad.item() == pytest.approx(-1)


def test_dpo_is_bradley_terry_on_implicit_rewards():
    chosen, rejected, ref_chosen, ref_rejected = random_scores(0)
    result = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    exactly(result.loss, bradley_terry(0.1 * (chosen - ref_chosen), 0.1 * (rejected - ref_rejected)))
    exactly(result.chosen_reward, 0.1 * (chosen - ref_chosen).mean())
    exactly(result.accuracy, (chosen - ref_chosen > rejected - ref_rejected).double().mean())
    assert dpo(chosen, rejected, chosen, rejected, beta=0.1).loss.item() == pytest.approx(math.log(2))


def test_a_margin_and_centring_of_0_change_nothing():
    chosen, rejected, _, _ = random_scores(1)
    plain = bradley_terry(chosen, rejected)
    assert torch.equal(bradley_terry(chosen, rejected, torch.zeros(5), centring=0.0), plain)
    assert bradley_terry(chosen, rejected, torch.ones(5)) > plain


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="number of pairs must be positive"):
        bradley_terry(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="equal shape"):
        bradley_terry(torch.zeros(2), torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match="beta must be positive"):
        dpo(*torch.zeros(4, 1), beta=0)
