"""ISO-C, ISO-CTS and WUDI: their laws, and what the reference code does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers, sampled_from
from torch.testing import assert_close

from direct_rlhf.merge.methods.iso import space_sizes
from direct_rlhf.recipe.merge_methods import IsoCtsParameters
from merge.methods.blocks import change, tensors
from merge.test_factorise import low_rank

SEEDS = integers(0, 9999)
SHAPES = sampled_from([(12, 9), (9, 12), (12, 12)])


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
@given(seed=SEEDS, shape=SHAPES)
def test_the_spectrum_is_flat(method, seed, shape):
    own = {"rcond": 1e-9} if method == "iso_cts" else {}
    s = torch.linalg.svdvals(change(method, tensors(seed, 3, shape), **own))
    assert_close(s, torch.full_like(s, float(s[0])), rtol=1e-6, atol=0)


@given(seed=SEEDS, shape=SHAPES)
def test_iso_c_keeps_the_nuclear_norm_of_the_sum(seed, shape):
    deltas = tensors(seed, 3, shape)
    nuclear = torch.linalg.svdvals(change("iso_c", deltas)).sum()
    assert_close(nuclear, torch.linalg.svdvals(sum(deltas)).sum())


def test_iso_c_leaves_the_null_space_of_a_low_rank_sum_alone():
    """Averaged over all directions, most of the energy goes to arbitrary ones (rank 9 in 40 x 30: 70 %)."""
    deltas = [low_rank(seed, 40, 30, 3) for seed in range(3)]
    found = change("iso_c", deltas).double()
    row_space = torch.linalg.svd(sum(deltas).double()).Vh[:9]
    assert_close(found @ row_space.T @ row_space, found, rtol=0, atol=1e-5)
    assert torch.linalg.matrix_rank(found, rtol=1e-5) == 9
    original = change("iso_c", deltas, reference="original").double()
    outside = (original - original @ row_space.T @ row_space).norm() ** 2 / original.norm() ** 2
    assert float(outside) == pytest.approx(0.7, abs=1e-3)


@given(seed=SEEDS, shape=SHAPES)
def test_iso_cts_with_only_common_directions_is_iso_c(seed, shape):
    deltas = tensors(seed, 3, shape)
    assert_close(change("iso_cts", deltas, common=1.0), change("iso_c", deltas), rtol=1e-6, atol=1e-6)


def test_what_does_not_divide_goes_to_the_common_space():
    assert space_sizes(30, 3, IsoCtsParameters()) == (24, 2)
    assert space_sizes(31, 4, IsoCtsParameters()) == (27, 1)
    assert space_sizes(10, 4, IsoCtsParameters()) == (10, 0)
    nearest = IsoCtsParameters(reference="fusion_bench")
    assert space_sizes(31, 4, nearest) == (23, 2)
    assert space_sizes(10, 4, nearest) == (10, 0)  # T = 2 (r - c): none


def iso_cts_literally(deltas, common):
    """With r - c a multiple of the number of experts, so that no rounding matters."""
    r = min(deltas[0].shape)
    c = int(r * common)
    d = (r - c) // len(deltas)
    u, s, vt = torch.linalg.svd(sum(deltas), full_matrices=False)
    us, ss, vs = [], [], []
    for delta in deltas:
        own = torch.linalg.svd(delta - u[:, :c] @ u[:, :c].T @ delta, full_matrices=False)
        us, ss, vs = [*us, own[0][:, :d]], [*ss, own[1][:d]], [*vs, own[2][:d].T]
    joined = [torch.cat([*us, u[:, :c]], 1), torch.cat([*ss, s[:c]]), torch.cat([*vs, vt[:c].T], 1)]
    orthonormal = []
    for x in (joined[0], joined[2]):
        p, _, q = torch.linalg.svd(x, full_matrices=False)
        orthonormal.append(p @ q)
    return joined[1].mean() * orthonormal[0] @ orthonormal[1].T


@given(seed=SEEDS, shape=sampled_from([(18, 15), (15, 18)]))
def test_iso_cts_is_its_literal_definition(seed, shape):
    deltas = tensors(seed, 3, shape)
    expected = iso_cts_literally(deltas, 0.8)
    assert_close(change("iso_cts", deltas, rcond=1e-9), expected, rtol=1e-6, atol=1e-6)
    assert_close(change("iso_cts", deltas, reference="original"), expected, rtol=1e-6, atol=1e-6)


def loss(merged, deltas):
    return sum(((merged - tau) @ tau.T).square().sum() / tau.square().sum() for tau in deltas)


@given(seed=SEEDS, shape=sampled_from([(4, 20), (20, 4), (12, 12), (6, 9)]))
def test_exact_wudi_has_no_gradient_and_a_loss_no_more_than_the_sums(seed, shape):
    deltas = tensors(seed, 3, shape)
    merged = change("wudi", deltas).requires_grad_()
    loss(merged, deltas).backward()
    assert merged.grad.abs().max() < 1e-8
    assert loss(merged, deltas) <= loss(sum(deltas), deltas) + 1e-9


@given(seed=SEEDS)
def test_both_ways_to_the_exact_solution_agree(seed):
    """3 x 4 rows against 9 columns take the columns' Gram matrix; with 3 x 2 against 9 the rows' one is smaller."""
    wide, square = tensors(seed, 3, (2, 9)), tensors(seed, 3, (4, 9))
    for deltas in (wide, square):
        gram = sum(tau.T @ tau / tau.square().sum() for tau in deltas)
        target = sum(tau @ tau.T @ tau / tau.square().sum() for tau in deltas)
        expected = target @ torch.linalg.pinv(gram, rcond=1e-11, hermitian=True)
        assert_close(change("wudi", deltas), expected, rtol=1e-6, atol=1e-6)


@given(seed=SEEDS)
def test_experts_with_orthogonal_row_spaces_add_up(seed):
    q = torch.linalg.qr(tensors(seed, 1, (12, 12))[0]).Q
    deltas = [part @ q[i * 4 : i * 4 + 4] for i, part in enumerate(tensors(seed + 1, 3, (7, 4)))]
    assert_close(change("wudi", deltas), sum(deltas))


def test_wudi_leaves_out_experts_that_changed_nothing():
    delta = tensors(0, 1, (5, 7))[0]
    assert_close(change("wudi", [delta, torch.zeros_like(delta)]), delta)


@given(seed=SEEDS)
@settings(max_examples=5)
def test_adam_takes_the_steps_of_the_original(seed):
    """The loss written out, through autograd."""
    deltas = [0.01 * delta for delta in tensors(seed, 3, (5, 7), torch.float32)]
    expected = torch.nn.Parameter(sum(deltas))
    optimiser = torch.optim.Adam([expected], lr=1e-5)
    for _ in range(20):
        optimiser.zero_grad()
        loss(expected, deltas).backward()
        optimiser.step()
    found = change("wudi", deltas, reference="original", steps=20)
    assert_close(found, expected.detach(), rtol=0, atol=2e-6)
    assert (found - sum(deltas)).abs().max() > 1e-4
