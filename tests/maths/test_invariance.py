"""The losses and gradients of one optimiser step do not depend on how its answers are padded, ordered or cut (N4)."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers, lists
from torch.nn.functional import logsigmoid, pad

from direct_rlhf.maths.losses import bradley_terry, dpo, nll, policy_loss, value_loss
from direct_rlhf.maths.masked import whiten
from maths.batches import JUNK, exactly, random_batch

N_RANKS = 3
CUTS = lists(integers(1, 5), max_size=3, unique=True)


def all_losses(new, value, old, target, mask, denominator=None):
    """Policy, value and likelihood losses as one scalar."""
    return (
        policy_loss(new, old, target, mask, clip=0.2, dual_clip=3.0, denominator=denominator).loss
        + value_loss(value, old, target, mask, clip=0.2, denominator=denominator).loss
        + nll(new, mask, denominator)
    )


def loss_and_gradient(tensors, mask, denominator=None):
    """The loss, and its gradient in the log-probabilities (which serve as values too)."""
    new = tensors[0].clone().requires_grad_()
    loss = all_losses(new, new, *tensors[1:], mask, denominator)
    loss.backward()
    return loss.detach(), new.grad


def trimmed(tensors, mask):
    """Without the columns that no answer reaches, as micro-batches are fed."""
    longest = int(mask.sum(1).max()) if len(mask) else 0
    return [x[:, :longest] for x in tensors], mask[:, :longest]


def accumulated(weights, micro_batches, denominator, factor=1.0):
    """Loss and gradient in the weights of a model that all answers share, one backward a micro-batch.

    log-probability and value of a slot are functions of its features; ``factor`` multiplies every loss.
    """
    weights = weights.clone().requires_grad_()
    total = 0.0
    for (features, old, target), mask in micro_batches:
        new, value = logsigmoid(features @ weights[0]), features @ weights[1]
        loss = all_losses(new, value, old, target, mask, denominator) * factor
        loss.backward()
        total += loss.detach()
    return torch.as_tensor(total), torch.zeros_like(weights) if weights.grad is None else weights.grad


def shared_model(seed):
    """(weights [2, F], features [B, T, F], old, target, mask)."""
    (old, target, _), mask = random_batch(seed)
    draw = torch.Generator().manual_seed(seed + 1)
    features = torch.randn(*mask.shape, 4, generator=draw, dtype=torch.float64)
    return torch.randn(2, 4, generator=draw, dtype=torch.float64), features, old, target, mask


@pytest.mark.promise("N4")
@given(seed=integers(0, 999), amount=integers(0, 6), left=booleans())
def test_padding_and_what_it_holds_changes_neither_loss_nor_gradient(seed, amount, left):
    tensors, mask = random_batch(seed)
    sides = (amount, 0) if left else (0, amount)
    junked = [torch.where(mask, x, JUNK[i]) for i, x in enumerate(tensors)]
    longer = [pad(x, sides, value=JUNK[-i]) for i, x in enumerate(junked)]
    loss, gradient = loss_and_gradient(longer, pad(mask, sides))
    expected_loss, expected_gradient = loss_and_gradient(tensors, mask)
    exactly(loss, expected_loss)
    exactly(gradient, pad(expected_gradient, sides))


@pytest.mark.promise("N4")
@given(seed=integers(0, 999))
def test_the_order_of_answers_changes_neither_loss_nor_gradient(seed):
    tensors, mask = random_batch(seed)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    loss, gradient = loss_and_gradient(tensors, mask)
    moved_loss, moved_gradient = loss_and_gradient([x[order] for x in tensors], mask[order])
    exactly(moved_loss, loss)
    exactly(moved_gradient, gradient[order])


@pytest.mark.promise("N4")
@given(seed=integers(0, 999), cuts=CUTS)
def test_micro_batches_add_up_to_the_batch(seed, cuts):
    tensors, mask = random_batch(seed)
    n = int(mask.sum())
    edges = [0, *sorted(cuts), len(mask)]
    parts = [loss_and_gradient([x[a:b] for x in tensors], mask[a:b], denominator=n) for a, b in pairwise(edges)]
    loss, gradient = loss_and_gradient(tensors, mask)
    exactly(sum(part[0] for part in parts), loss)
    exactly(torch.cat([part[1] for part in parts]), gradient)


@pytest.mark.promise("N4")
@given(
    seed=integers(0, 999),
    owner=lists(integers(0, N_RANKS - 1), min_size=6, max_size=6),
    size=integers(1, 6),
    averaged=booleans(),
)
def test_ranks_with_micro_batches_of_their_own_give_the_gradient_of_the_global_batch(seed, owner, size, averaged):
    """Each rank divides by the global N. Gradients are summed, or each loss is times the world size and they are
    averaged. A rank may own no answer, or only an empty one."""
    weights, *tensors, mask = shared_model(seed)
    loss, gradient = accumulated(weights, [(tensors, mask)], int(mask.sum()))
    losses, gradients = [], []
    for rank in range(N_RANKS):
        rows = [row for row in range(6) if owner[row] == rank]
        micro_batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        part = accumulated(
            weights,
            [trimmed([x[chosen] for x in tensors], mask[chosen]) for chosen in micro_batches],
            int(mask.sum()),
            factor=N_RANKS if averaged else 1,
        )
        losses.append(part[0])
        gradients.append(part[1])
    reduce = torch.mean if averaged else torch.sum
    exactly(reduce(torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in losses])), loss)
    exactly(reduce(torch.stack(gradients), dim=0), gradient)


def test_means_of_each_micro_batch_would_weigh_the_tokens_of_short_answers_more():
    """The rule that we do not use gives another gradient on these very batches, so the laws above can fail."""
    weights, *tensors, mask = shared_model(0)
    _, gradient = accumulated(weights, [(tensors, mask)], int(mask.sum()))
    halves = [([x[s] for x in tensors], mask[s]) for s in (slice(0, 3), slice(3, 6))]
    naive = sum(accumulated(weights, [half], int(half[1].sum()), factor=0.5)[1] for half in halves)
    assert (naive - gradient).abs().max() > 0.01


@pytest.mark.promise("N4")
@given(seed=integers(0, 999), amount=integers(0, 6), left=booleans())
def test_whitening_depends_on_neither_padding_nor_order(seed, amount, left):
    (x, _, _), mask = random_batch(seed)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    sides = (amount, 0) if left else (0, amount)
    white = whiten(pad(torch.where(mask, x, JUNK[seed % 3])[order], sides, value=JUNK[0]), pad(mask[order], sides))
    exactly(white, pad(whiten(x, mask)[order], sides))


def test_whitening_each_rank_apart_would_give_other_advantages():
    (x, _, _), mask = random_batch(0)
    apart = torch.cat([whiten(x[s], mask[s]) for s in (slice(0, 3), slice(3, 6))])
    assert (apart - whiten(x, mask)).abs().max() > 0.1


@given(seed=integers(0, 999), cuts=CUTS)
def test_logged_statistics_of_micro_batches_add_up_too(seed, cuts):
    (new, old, target), mask = random_batch(seed)
    edges = [0, *sorted(cuts), len(mask)]
    n = int(mask.sum())
    rows = [slice(a, b) for a, b in pairwise(edges)]
    whole = policy_loss(new, old, target, mask, clip=0.2)
    parts = [policy_loss(new[s], old[s], target[s], mask[s], clip=0.2, denominator=n) for s in rows]
    for name in ("ratio_mean", "clip_fraction", "k3"):
        exactly(sum(getattr(part, name) for part in parts), getattr(whole, name))
    values = [value_loss(new[s], old[s], target[s], mask[s], clip=0.2, denominator=n) for s in rows]
    exactly(sum(part.clip_fraction for part in values), value_loss(new, old, target, mask, clip=0.2).clip_fraction)


@pytest.mark.promise("N4")
@given(seed=integers(0, 999), cuts=CUTS)
def test_pair_losses_and_their_gradients_add_up_over_micro_batches(seed, cuts):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, 6, dtype=torch.float64, generator=draw, requires_grad=True)
    margin = torch.rand(6, dtype=torch.float64, generator=draw)

    def both(s, denominator=None):
        part = scores[:, s]
        preference = bradley_terry(part[0], part[1], margin[s], centring=0.1, denominator=denominator)
        return preference + dpo(*part, beta=0.3, denominator=denominator).loss

    whole = both(slice(0, 6))
    summed = sum(both(slice(a, b), denominator=6) for a, b in pairwise([0, *sorted(cuts), 6]))
    exactly(summed, whole)
    exactly(torch.autograd.grad(summed, scores)[0], torch.autograd.grad(whole, scores)[0])
