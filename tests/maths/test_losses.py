import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers

from direct_rlhf.maths.losses import nll, policy_loss, value_loss
from maths.batches import exactly, random_batch


def loop_policy_loss(logp, old, advantage, mask, clip, dual_clip):
    """Loss, mean ratio, clip fraction and k3, one token at a time."""
    terms, ratios, clipped, k3s = [], [], [], []
    for b, t in mask.nonzero().tolist():
        ratio, a = math.exp(logp[b, t] - old[b, t]), advantage[b, t].item()
        plain, near = -a * ratio, -a * min(max(ratio, 1 - clip), 1 + clip)
        term = max(plain, near)
        terms.append(min(term, -a * dual_clip) if a < 0 else term)
        ratios.append(ratio)
        clipped.append(near > plain)
        k3s.append(ratio - 1 - math.log(ratio))
    return [sum(column) / len(terms) for column in (terms, ratios, clipped, k3s)]


def loop_value_loss(value, old, target, mask, clip):
    """Loss and clip fraction, one token at a time."""
    terms, clipped = [], []
    for b, t in mask.nonzero().tolist():
        v, o, r = (x[b, t].item() for x in (value, old, target))
        near = min(max(v, o - clip), o + clip)
        terms.append(max((v - r) ** 2, (near - r) ** 2) / 2)
        clipped.append((near - r) ** 2 > (v - r) ** 2)
    return [sum(column) / len(terms) for column in (terms, clipped)]


@given(seed=integers(0, 999))
def test_vectorised_losses_and_their_statistics_equal_their_loops(seed):
    (new, old, target), mask = random_batch(seed)
    policy = policy_loss(new, old, target, mask, clip=0.2, dual_clip=1.5)
    found = [x.item() for x in (policy.loss, policy.ratio_mean, policy.clip_fraction, policy.k3)]
    assert found == pytest.approx(loop_policy_loss(new, old, target, mask, 0.2, 1.5), abs=1e-10)
    value = value_loss(new, old, target, mask, clip=0.3)
    expected = loop_value_loss(new, old, target, mask, 0.3)
    assert [value.loss.item(), value.clip_fraction.item()] == pytest.approx(expected, abs=1e-10)
    likelihoods = [-new[b, t].item() for b, t in mask.nonzero().tolist()]
    assert nll(new, mask).item() == pytest.approx(sum(likelihoods) / len(likelihoods), abs=1e-10)


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


@given(seed=integers(0, 99))
def test_weight_1_is_the_unweighted_loss_bit_for_bit(seed):
    tensors, mask = random_batch(seed)
    found = []
    for weight in (None, torch.ones_like(tensors[0])):
        new = tensors[0].clone().requires_grad_()
        result = policy_loss(new, *tensors[1:], mask, clip=0.2, dual_clip=3.0, weight_BT=weight, denominator=7.0)
        result.loss.backward()
        found.append((result.loss.item(), result.ratio_mean.item(), result.clip_fraction.item(), new.grad))
    assert found[0][:3] == found[1][:3]
    assert torch.equal(found[0][3], found[1][3])


def test_a_weight_multiplies_a_tokens_loss_and_its_gradient_and_has_none_itself():
    (new, old, advantage), mask = random_batch(8)
    weight = torch.rand_like(new).requires_grad_()
    plain, weighted = new.clone().requires_grad_(), new.clone().requires_grad_()
    policy_loss(plain, old, advantage, mask, clip=0.2).loss.backward()
    policy_loss(weighted, old, advantage, mask, clip=0.2, weight_BT=weight).loss.backward()
    exactly(weighted.grad, plain.grad * weight.detach())
    assert weight.grad is None
    with pytest.raises(ValueError, match="equal shape"):
        policy_loss(new, old, advantage, mask, clip=0.2, weight_BT=weight[:, :2])


def test_a_log_ratio_of_1000_nats_stays_finite():
    one = torch.ones(1, 1, dtype=torch.bool)
    logp = torch.tensor([[0.0]], requires_grad=True)
    loss = policy_loss(logp, torch.tensor([[-1000.0]]), torch.tensor([[-1.0]]), one, clip=0.2).loss
    loss.backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()


def test_half_precision_inputs_give_float32_losses():
    tensors, mask = random_batch(5)
    new, old, target = (x.bfloat16() for x in tensors)
    assert policy_loss(new, old, target, mask, clip=0.2).loss.dtype == torch.float32
    assert value_loss(new, old, target, mask, clip=0.2).loss.dtype == torch.float32
    assert nll(new, mask).dtype == torch.float32


def test_a_batch_without_actions_has_loss_0():
    (new, old, target), mask = random_batch(6)
    new.requires_grad_()
    nothing = torch.zeros_like(mask)
    for loss in (
        policy_loss(new, old, target, nothing, clip=0.2).loss,
        value_loss(new, old, target, nothing, clip=0.2).loss,
        nll(new, nothing),
    ):
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, new)[0].any()


def test_wrong_settings_are_refused_by_name():
    (new, old, target), mask = random_batch(7)
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        policy_loss(new, old, target, mask, clip=0)
    with pytest.raises(ValueError, match="dual_clip must be above 1, got 1"):
        policy_loss(new, old, target, mask, clip=0.2, dual_clip=1)
    with pytest.raises(ValueError, match="equal shape"):
        value_loss(new, old[:, :2], target, mask, clip=0.2)
