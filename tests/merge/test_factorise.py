"""Decompositions by products against LAPACK's, with their bounds; numerical rank with the rounding of stored weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, sampled_from
from torch.testing import assert_close

from direct_rlhf.merge import factorise
from direct_rlhf.merge.factorise import inverse_root, polar, rank_of, rounding_floor, spectrum


def random_matrix(seed, m, n, values=None, dtype=torch.float64):
    """A random matrix, or one of these singular values."""
    draw = torch.Generator().manual_seed(seed)
    if values is None:
        return torch.randn(m, n, generator=draw, dtype=dtype)
    u = torch.linalg.qr(torch.randn(m, len(values), generator=draw, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, len(values), generator=draw, dtype=torch.float64)).Q
    return (u * torch.as_tensor(values, dtype=torch.float64) @ v.T).to(dtype)


def low_rank(seed, m, n, rank, scale=1.0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw)
    return a.to(dtype) @ b.to(dtype) * scale


def together(factors):
    return factors.u_MK * factors.s_K @ factors.v_NK.T


def orthonormality_error(x):
    return float((x.T @ x - torch.eye(x.shape[1], dtype=x.dtype)).abs().max())


@given(seed=integers(0, 999), shape=sampled_from([(12, 12), (40, 9), (9, 40), (1, 5), (5, 1)]), decades=floats(0, 3))
@settings(max_examples=40)
def test_the_gram_matrix_stays_within_its_bound_of_the_exact_decomposition(seed, shape, decades):
    """Condition numbers up to 1000: values to 1e-6 of the largest, vectors orthonormal to 1e-5, as float32 allows."""
    r = min(shape)
    matrix = random_matrix(seed, *shape, torch.logspace(0, -decades, r), torch.float32)
    fast, exact = spectrum(matrix), spectrum(matrix.double(), exact=True)
    assert_close(fast.s_K, exact.s_K, rtol=0, atol=1e-6)
    k = fast.rank
    for side in ("u_MK", "v_NK"):
        assert orthonormality_error(getattr(fast.leading(k), side)) < 1e-5
    assert_close(together(fast.leading(k)), matrix.double(), rtol=0, atol=1e-5)


def test_the_gram_matrix_is_more_exact_than_a_float32_decomposition():
    """On the kept side of the rank tolerance, at the worst condition it lets through."""
    n = 256
    true = torch.logspace(0, -4, n, dtype=torch.float64)
    matrix = random_matrix(0, n, n, true, torch.float32)
    true = torch.linalg.svdvals(matrix.double())
    fast = spectrum(matrix)
    kept = true[: fast.rank]
    by_gram = ((fast.s_K[: fast.rank] - kept).abs() / kept).max()
    by_svd = ((torch.linalg.svdvals(matrix).double()[: fast.rank] - kept).abs() / kept).max()
    assert by_gram < 1e-7 < by_svd
    assert orthonormality_error(fast.leading(fast.rank).u_MK) < 1e-7


@pytest.mark.parametrize("shape", [(400, 330), (330, 400)])
@pytest.mark.parametrize("rank", [0, 1, 16, 60])
def test_few_directions_are_found_by_power_iteration_as_by_the_exact_decomposition(shape, rank, monkeypatch):
    matrix = low_rank(1, *shape, rank)
    monkeypatch.setattr(factorise, "_by_gram", lambda *_: pytest.fail("low rank was not noticed"))
    fast, exact = spectrum(matrix), spectrum(matrix.double(), exact=True)
    assert fast.rank == rank
    if rank:
        assert_close(fast.s_K[:rank], exact.s_K[:rank], rtol=1e-6, atol=0)
        error = (together(fast.leading(rank)) - together(exact.leading(rank))).norm() / matrix.double().norm()
        assert error < 1e-6


@pytest.mark.parametrize("rank", [65, 330])
def test_many_directions_go_to_the_gram_matrix(rank, monkeypatch):
    monkeypatch.setattr(factorise, "_by_gram", lambda *_: "gram")
    assert (
        spectrum(low_rank(2, 400, 330, rank) if rank < 330 else random_matrix(2, 400, 330, dtype=torch.float32))
        == "gram"
    )


def test_slow_convergence_goes_to_the_gram_matrix(monkeypatch):
    """A direction just above its floor among others just below it cannot be told apart in a few rounds."""
    values = [1.0, *[0.011] * 5, *torch.linspace(0.0099, 0.0095, 324).tolist()]
    matrix = random_matrix(3, 400, 330, values, torch.float32)
    monkeypatch.setattr(factorise, "_by_gram", lambda *_: "gram")
    assert spectrum(matrix, floor=0.01) == "gram"


def test_exact_uncapped_and_float64_decompositions_are_lapacks(monkeypatch):
    monkeypatch.setattr(factorise, "_by_power", lambda *_: pytest.fail("not exact"))
    monkeypatch.setattr(factorise, "_by_gram", lambda *_: pytest.fail("not exact"))
    matrix = random_matrix(4, 8, 6, dtype=torch.float32)
    for found in (spectrum(matrix, exact=True), spectrum(matrix, capped=False), spectrum(matrix.double())):
        assert_close(found.s_K.float(), torch.linalg.svdvals(matrix))


def test_where_lapack_does_not_converge_the_gram_matrix_answers(monkeypatch):
    matrix = random_matrix(4, 8, 6, dtype=torch.float32)
    expected = spectrum(matrix, exact=True).s_K

    def fails(*_, **__):
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "svd", fails)
    assert_close(spectrum(matrix, exact=True).s_K, expected, rtol=1e-5, atol=0)


def test_a_zero_matrix_has_no_direction():
    for shape in ((5, 3), (400, 330)):
        assert spectrum(torch.zeros(shape)).rank == 0


def test_rank_counts_what_is_above_the_tolerance():
    s = torch.tensor([1.0, 1e-3, 2e-6, 1e-6, 0])
    assert rank_of(s, (10, 10), torch.float32) == 3  # 10 eps = 1.2e-6
    assert rank_of(s, (10, 10), torch.float32, floor=1e-4) == 2
    assert rank_of(s, (10, 10), torch.float32, floor=2.0) == 3  # a floor that leaves nothing is not used


def test_the_floor_is_that_of_the_weights_own_rounding():
    weight = torch.tensor([[1.0, 1.5, -3.0], [0.5, 0, 0.26]]).bfloat16()
    ulps = torch.tensor([[1.0, 1, 2], [0.5, 0, 0.25]]) * 2**-7
    expected = 1.1 * (ulps.square().mean() / 12).sqrt() * (2**0.5 + 3**0.5)
    assert rounding_floor(weight) == pytest.approx(float(expected), rel=1e-6)
    assert rounding_floor(weight.half()) == pytest.approx(float(expected) / 8, rel=1e-6)
    assert rounding_floor(weight.float()) == pytest.approx(float(expected) / 2**16, rel=1e-6)
    assert rounding_floor(weight.double()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_rank_update_stored_in_half_precision_keeps_its_rank(dtype):
    draw = torch.Generator().manual_seed(0)
    base = (torch.randn(256, 256, generator=draw) * 0.02).to(dtype)
    stored = (base.float() + low_rank(1, 256, 256, 8, 1e-2)).to(dtype)
    difference = stored.float() - base.float()
    assert spectrum(difference).rank > 100  # rounding fills the rest
    assert spectrum(difference, floor=rounding_floor(stored)).rank == 8


@given(seed=integers(0, 999), rcond=sampled_from([1e-3, 1e-6]))
def test_a_basis_times_its_inverse_root_is_the_nearest_orthonormal_matrix(seed, rcond):
    basis = random_matrix(seed, 12, 7)
    assert_close(basis @ inverse_root(basis, rcond), polar(basis), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rcond", [1e-3, 1e-6])
def test_directions_that_a_basis_has_twice_count_once(rcond):
    basis = random_matrix(0, 12, 4)
    q = torch.linalg.qr(basis).Q
    doubled = torch.cat([q, q], 1)
    root = inverse_root(doubled, rcond)
    assert_close(doubled @ root @ root.T @ doubled.T, q @ q.T, rtol=0, atol=1e-9)


@given(gap=floats(1e-3, 1))
def test_the_root_by_gram_matrix_is_exact_to_its_bound_near_the_cut(gap):
    """Singular values down to the cut at 1e-3: the bound is K 2^-52 / rcond^2 = 2e-9 for 8 columns."""
    basis = random_matrix(5, 30, 8, torch.linspace(1, gap * 1.01, 8, dtype=torch.float64))
    assert_close(basis @ inverse_root(basis, 1e-3), basis @ inverse_root(basis, 1e-9), rtol=0, atol=2e-9)
