import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers, lists
from torch.testing import assert_close

from direct_rlhf.maths.losses import bradley_terry, dpo, nll, policy_loss, value_loss

JUNK = [math.nan, math.inf, -math.inf]


def random_batch(seed, n_rows=6, n_slots=5):
    """Four float64 tensors [B, T] and a mask with full, one-token and empty rows."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, n_slots + 1, (n_rows,), generator=draw)
    lengths[:3] = torch.tensor([n_slots, 1, 0])
    mask = torch.arange(n_slots) < lengths[:, None]
    tensors = [torch.randn(n_rows, n_slots, generator=draw, dtype=torch.float64) for _ in range(3)]
    return tensors, mask


def both_losses(tensors, mask, denominator=None):
    """The sum of all token losses on (new, old, target), as one scalar."""
    new, old, target = tensors
    return (
        policy_loss(new, old, target, mask, clip=0.2, dual_clip=3.0, denominator=denominator).loss
        + value_loss(new, old, target, mask, clip=0.2, denominator=denominator).loss
        + nll(new, mask, denominator)
    )


def loss_and_gradient(tensors, mask, denominator=None):
    new = tensors[0].clone().requires_grad_()
    loss = both_losses([new, *tensors[1:]], mask, denominator)
    loss.backward()
    return loss.detach(), new.grad


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=1e-10)


@given(seed=integers(0, 999), pad=integers(0, 6), left=booleans())
def test_padding_and_what_it_holds_changes_neither_loss_nor_gradient(seed, pad, left):
    tensors, mask = random_batch(seed)
    sides = (pad, 0) if left else (0, pad)
    junked = [torch.where(mask, x, JUNK[i]) for i, x in enumerate(tensors)]
    longer = [torch.nn.functional.pad(x, sides, value=JUNK[-i]) for i, x in enumerate(junked)]
    loss, gradient = loss_and_gradient(longer, torch.nn.functional.pad(mask, sides))
    expected_loss, expected_gradient = loss_and_gradient(tensors, mask)
    exactly(loss, expected_loss)
    exactly(gradient, torch.nn.functional.pad(expected_gradient, sides))


@given(seed=integers(0, 999))
def test_order_of_answers_does_not_change_the_loss(seed):
    tensors, mask = random_batch(seed)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    loss, gradient = loss_and_gradient(tensors, mask)
    moved_loss, moved_gradient = loss_and_gradient([x[order] for x in tensors], mask[order])
    exactly(moved_loss, loss)
    exactly(moved_gradient, gradient[order])


@given(seed=integers(0, 999), cuts=lists(integers(1, 5), max_size=3, unique=True))
def test_micro_batches_add_up_to_the_batch(seed, cuts):
    tensors, mask = random_batch(seed)
    n = int(mask.sum())
    edges = [0, *sorted(cuts), len(mask)]
    parts = [loss_and_gradient([x[a:b] for x in tensors], mask[a:b], denominator=n) for a, b in pairwise(edges)]
    loss, gradient = loss_and_gradient(tensors, mask)
    exactly(sum(part[0] for part in parts), loss)
    exactly(torch.cat([part[1] for part in parts]), gradient)


def test_statistics_of_micro_batches_add_up_too():
    (new, old, advantage), mask = random_batch(0)
    whole = policy_loss(new, old, advantage, mask, clip=0.2)
    parts = [
        policy_loss(new[s], old[s], advantage[s], mask[s], clip=0.2, denominator=int(mask.sum()))
        for s in (slice(0, 2), slice(2, 6))
    ]
    for name in ("ratio_mean", "clip_fraction", "k3"):
        exactly(sum(getattr(part, name) for part in parts), getattr(whole, name))


def loop_policy_loss(logp, old, advantage, mask, clip, dual_clip):
    terms = []
    for b, t in mask.nonzero().tolist():
        ratio, a = math.exp(logp[b, t] - old[b, t]), advantage[b, t].item()
        term = max(-a * ratio, -a * min(max(ratio, 1 - clip), 1 + clip))
        terms.append(min(term, -a * dual_clip) if a < 0 else term)
    return sum(terms) / len(terms)


def loop_value_loss(value, old, target, mask, clip):
    terms = []
    for b, t in mask.nonzero().tolist():
        v, o, r = (x[b, t].item() for x in (value, old, target))
        near = o + min(max(v - o, -clip), clip)
        terms.append(max((v - r) ** 2, (near - r) ** 2) / 2)
    return sum(terms) / len(terms)


@given(seed=integers(0, 999))
def test_vectorised_losses_equal_their_loops(seed):
    (new, old, target), mask = random_batch(seed)
    policy = policy_loss(new, old, target, mask, clip=0.2, dual_clip=1.5).loss.item()
    assert policy == pytest.approx(loop_policy_loss(new, old, target, mask, 0.2, 1.5), abs=1e-10)
    value = value_loss(new, old, target, mask, clip=0.3).loss.item()
    assert value == pytest.approx(loop_value_loss(new, old, target, mask, 0.3), abs=1e-10)


def test_an_infinite_clip_is_no_clip():
    (new, old, target), mask = random_batch(3)
    policy = policy_loss(new, old, target, mask, clip=math.inf)
    exactly(policy.loss, -(target * (new - old).exp())[mask].mean())
    value = value_loss(new, old, target, mask, clip=math.inf)
    exactly(value.loss, (new - target).square()[mask].mean() / 2)
    assert policy.clip_fraction.item() == value.clip_fraction.item() == 0


def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    (new, _, advantage), mask = random_batch(4)
    logp = new.clone().requires_grad_()
    result = policy_loss(logp, new, advantage, mask, clip=0.2)
    result.loss.backward()
    exactly(logp.grad, torch.where(mask, -advantage / mask.sum(), 0.0))
    assert result.ratio_mean.item() == pytest.approx(1, abs=1e-12)
    assert result.k3.item() == result.clip_fraction.item() == 0


def test_dual_clip_bounds_the_loss_of_a_large_ratio_under_a_negative_advantage():
    one = torch.ones(1, 1, dtype=torch.bool)
    arguments = (torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[-1.5]]), one)
    assert policy_loss(*arguments, clip=0.2).loss.item() == pytest.approx(1.5 * math.exp(2), rel=1e-6)
    assert policy_loss(*arguments, clip=0.2, dual_clip=3.0).loss.item() == pytest.approx(4.5)


def test_a_log_ratio_of_1000_nats_stays_finite():
    one = torch.ones(1, 1, dtype=torch.bool)
    logp = torch.tensor([[0.0]], requires_grad=True)
    loss = policy_loss(logp, torch.tensor([[-1000.0]]), torch.tensor([[-1.0]]), one, clip=0.2).loss
    loss.backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()


def test_half_precision_inputs_give_float32_losses():
    tensors, mask = random_batch(5)
    assert both_losses([x.bfloat16() for x in tensors], mask).dtype == torch.float32


def test_a_batch_without_actions_has_loss_0():
    tensors, mask = random_batch(6)
    loss, gradient = loss_and_gradient(tensors, torch.zeros_like(mask))
    assert loss.item() == 0
    assert not gradient.any()


def test_bradley_terry_on_equal_and_on_huge_scores():
    assert bradley_terry(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2))
    chosen = torch.tensor([-1e4], requires_grad=True)
    loss = bradley_terry(chosen, torch.tensor([1e4]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert chosen.grad.item() == pytest.approx(-1)


def test_pair_losses_of_micro_batches_add_up():
    scores = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = (scores[:, :1], scores[:, 1:])
    exactly(
        sum(bradley_terry(part[0], part[1], centring=0.1, denominator=6) for part in parts),
        bradley_terry(scores[0], scores[1], centring=0.1),
    )
    exactly(sum(dpo(*part, beta=0.3, denominator=6).loss for part in parts), dpo(*scores, beta=0.3).loss)


def test_dpo_is_bradley_terry_on_implicit_rewards():
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 5, dtype=torch.float64)
    result = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    exactly(result.loss, bradley_terry(0.1 * (chosen - ref_chosen), 0.1 * (rejected - ref_rejected)))
    exactly(result.chosen_reward, 0.1 * (chosen - ref_chosen).mean())
    exactly(result.accuracy, (chosen - ref_chosen > rejected - ref_rejected).double().mean())
    assert dpo(chosen, rejected, chosen, rejected, beta=0.1).loss.item() == pytest.approx(math.log(2))


def test_wrong_settings_are_refused_by_name():
    (new, old, target), mask = random_batch(7)
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        policy_loss(new, old, target, mask, clip=0)
    with pytest.raises(ValueError, match="dual_clip must be above 1, got 1"):
        policy_loss(new, old, target, mask, clip=0.2, dual_clip=1)
    with pytest.raises(ValueError, match="equal shape"):
        value_loss(new, old[:, :2], target, mask, clip=0.2)
    with pytest.raises(ValueError, match="number of pairs must be positive"):
        bradley_terry(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="beta must be positive"):
        dpo(*torch.zeros(4, 1), beta=0)
