"""Answers of every length through the whole estimate: empty, EOS only, one token, full; junk under the mask (N7, N8)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import booleans, floats, integers, lists

from direct_rlhf.maths.advantages import gae
from direct_rlhf.maths.kl import clamp_hits, k1, k2, k3
from direct_rlhf.maths.losses import nll, policy_loss, value_loss
from direct_rlhf.maths.masked import masked_mean, masked_var, whiten
from direct_rlhf.maths.rewards import explained_variance, token_rewards
from maths.batches import JUNK, random_batch

N_SLOTS = 5


def mask_of(lengths, left):
    slots = torch.arange(N_SLOTS)
    lengths = torch.tensor(lengths)[:, None]
    return slots >= N_SLOTS - lengths if left else slots < lengths


@pytest.mark.promise("N7")
@pytest.mark.promise("N8")
@given(lengths=lists(integers(0, N_SLOTS), min_size=1, max_size=6), seed=integers(0, 99), left=booleans())
def test_every_row_that_has_an_action_is_paid_its_score_on_the_last_one(lengths, seed, left):
    mask = mask_of(lengths, left)
    draw = torch.Generator().manual_seed(seed)
    score = torch.randn(len(lengths), generator=draw, dtype=torch.float64)
    kl = torch.randn(mask.shape, generator=draw, dtype=torch.float64)
    without_kl = token_rewards(score, kl, mask, beta=0.0)
    rewards = token_rewards(score, kl, mask, beta=0.3)
    for b, length in enumerate(lengths):
        last = N_SLOTS - 1 if left else length - 1
        assert without_kl[b].nonzero().flatten().tolist() == ([last] if length else [])
        if length:
            assert without_kl[b, last] == score[b]
            assert rewards[b].sum().item() == pytest.approx((score[b] - 0.3 * kl[b][mask[b]].sum()).item(), abs=1e-12)
    assert not rewards[~mask].any()


@pytest.mark.promise("N7")
@given(
    lengths=lists(integers(0, N_SLOTS), min_size=1, max_size=6),
    seed=integers(0, 99),
    left=booleans(),
    score_size=floats(0, 10),
)
def test_every_mix_of_lengths_gives_finite_losses_and_gradients(lengths, seed, left, score_size):
    """In float32 as in training, with NaN in every slot that is no action; an EOS-only answer is one of length 1."""
    mask = mask_of(lengths, left)
    draw = torch.Generator().manual_seed(seed)
    logp, old, ref, value, old_value = (
        torch.where(mask, torch.randn(mask.shape, generator=draw), math.nan) for _ in range(5)
    )
    score = score_size * torch.randn(len(lengths), generator=draw)
    rewards = token_rewards(score, k1(old, ref), mask, beta=0.1)
    advantage = gae(rewards, old_value, mask, gamma=1.0, lam=0.95)
    white = whiten(advantage, mask)
    logp.requires_grad_()
    value.requires_grad_()
    policy = policy_loss(logp, old, white, mask, clip=0.2)
    critic = value_loss(value, old_value, advantage + old_value, mask, clip=0.2)
    (policy.loss + critic.loss).backward()
    for x in (rewards, advantage, white, policy.loss, policy.k3, critic.loss, logp.grad, value.grad):
        assert x.isfinite().all()
    for x in (rewards, advantage, white, logp.grad, value.grad):
        assert not x[~mask].any()
    assert explained_variance(old_value, advantage + old_value, mask).isfinite()


def test_an_answer_of_one_token_has_its_signal():
    """An empty answer keeps its first sampled token as an action: its score must move that token's probability."""
    mask = mask_of([1, 1], left=False)
    rewards = token_rewards(torch.tensor([1.0, -1.0]), torch.zeros(2, N_SLOTS), mask, beta=0.1)
    advantage = whiten(gae(rewards, torch.zeros(2, N_SLOTS), mask, gamma=1.0, lam=0.95), mask)
    logp = torch.zeros(2, N_SLOTS, requires_grad=True)
    policy_loss(logp, torch.zeros(2, N_SLOTS), advantage, mask, clip=0.2).loss.backward()
    assert logp.grad[0, 0].item() == pytest.approx(-0.5, abs=1e-6)  # -A / N: more probable
    assert logp.grad[1, 0].item() == pytest.approx(0.5, abs=1e-6)
    assert not logp.grad[:, 1:].any()


# each function of three tensors [B, T] and their mask; tensors that it does not need are left aside
MASKED = {
    "masked_mean": lambda x, y, z, m: masked_mean(x, m),
    "masked_var": lambda x, y, z, m: masked_var(x, m),
    "whiten": lambda x, y, z, m: whiten(x, m),
    "gae": lambda x, y, z, m: gae(x, y, m, gamma=0.9, lam=0.8),
    "k1": lambda x, y, z, m: k1(x, y, m),
    "k2": lambda x, y, z, m: k2(x, y, m),
    "k3": lambda x, y, z, m: k3(x, y, m),
    "clamp_hits": lambda x, y, z, m: clamp_hits(50 * x, y, m),
    "token_rewards": lambda x, y, z, m: token_rewards(torch.arange(len(m)), x, m, beta=0.1),
    "explained_variance": lambda x, y, z, m: explained_variance(x, y, m),
    "policy_loss": lambda x, y, z, m: policy_loss(x, y, z, m, clip=0.2).loss,
    "policy_loss, dual clip": lambda x, y, z, m: policy_loss(x, y, z, m, clip=0.2, dual_clip=1.1).loss,
    "policy_loss, infinite clip": lambda x, y, z, m: policy_loss(x, y, z, m, clip=math.inf).loss,
    "ratio_mean": lambda x, y, z, m: policy_loss(x, y, z, m, clip=0.2).ratio_mean,
    "value_loss": lambda x, y, z, m: value_loss(x, y, z, m, clip=0.2).loss,
    "nll": lambda x, y, z, m: nll(x, m),
}


def output_and_gradients(function, tensors, mask):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = function(*leaves, mask)
    if output.requires_grad:
        output.square().sum().backward()
    return output.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", MASKED)
def test_junk_under_the_mask_reaches_neither_value_nor_gradient(name, junk):
    tensors, mask = random_batch(11)
    clean = [torch.where(mask, x, 0.0) for x in tensors]
    dirty = [torch.where(mask, x, junk) for x in tensors]
    expected, expected_gradients = output_and_gradients(MASKED[name], clean, mask)
    found, gradients = output_and_gradients(MASKED[name], dirty, mask)
    assert torch.equal(found, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, expected_gradient)
        assert not gradient[~mask].any()
    if found.shape == mask.shape:
        assert not found[~mask].any()
