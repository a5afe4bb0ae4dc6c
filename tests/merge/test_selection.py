"""Keeping the k largest, against sorting in plain Python."""

import math
from functools import cached_property

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import booleans, floats, integers, lists, sampled_from

from direct_rlhf.merge import selection
from direct_rlhf.merge.selection import (
    Ranking,
    _band_by_sort,
    _order_by_sort,
    _order_packed,
    band_in_rows,
    by_rank_in_rows,
    first_of,
    kept,
    trim,
)

NUMBERS = lists(
    sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 1e-40, 3e38]) | floats(-9, 9, width=32), min_size=1, max_size=40
)
TYPES = sampled_from([torch.float32, torch.float64])


def scan_in(values, size):
    def scan(share=1):
        for start in range(0, len(values), size):
            yield start, values[start : first_of(start, min(start + size, len(values)), share)]

    return scan


def places_of_largest(values, keep):
    """By plain sorting: largest magnitude first, lower index first among equal ones."""
    return sorted(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:keep])


@given(numbers=NUMBERS, keep=integers(0, 45), size=integers(1, 41), dtype=TYPES)
def test_exactly_the_k_largest_are_kept_in_whatever_pieces_they_are_read(numbers, keep, size, dtype):
    values = torch.tensor(numbers, dtype=dtype)
    cut = Ranking(scan_in(values, size), len(values)).cut(keep)
    left = torch.cat([trim(piece, start, cut) for start, piece in scan_in(values, size)()])
    expected = torch.zeros_like(values)
    chosen = places_of_largest(values.tolist(), keep)
    expected[chosen] = values[chosen]
    assert left.tolist() == expected.tolist()


@given(numbers=NUMBERS, keep=integers(1, 45), dtype=TYPES)
def test_without_dividing_ties_all_that_equal_the_last_are_kept(numbers, keep, dtype):
    values = torch.tensor(numbers, dtype=dtype)
    left = trim(values, 0, Ranking(scan_in(values, 7), len(values)).cut(keep, ties=False))
    last = sorted(values.abs().tolist(), reverse=True)[min(keep, len(values)) - 1]
    assert left.tolist() == [x if abs(x) >= last else 0.0 for x in values.tolist()]


@given(numbers=NUMBERS, dtype=TYPES, seed=integers(0, 99))
def test_the_nth_largest_value_counts_signs(numbers, dtype, seed):
    values = torch.tensor(numbers, dtype=dtype)
    n = seed % len(values) + 1
    assert (
        Ranking(scan_in(values, 5), len(values), signed=True).value(n) == sorted(values.tolist(), reverse=True)[n - 1]
    )


def test_not_a_number_counts_as_the_largest_and_stays():
    values = torch.tensor([1.0, math.nan, 2.0, 3.0])
    left = trim(values, 0, Ranking(scan_in(values, 4), 4).cut(2))
    assert left[1].isnan()
    assert left[[0, 2, 3]].tolist() == [0, 0, 3]


def test_a_density_keeps_at_least_one():
    assert [kept(0.2, 4), kept(0.5, 5), kept(0.0, 9), kept(1.0, 3)] == [1, 2, 1, 3]


ROWS = lists(lists(sampled_from([0.0, 1.0, 1.0, 2.0, 0.5, 7.0]), min_size=6, max_size=6), min_size=1, max_size=5)


@given(rows=ROWS, skip=integers(0, 6), keep=integers(0, 7), dtype=TYPES)
def test_a_band_of_each_row_is_what_sorting_gives(rows, skip, keep, dtype):
    magnitude = torch.tensor(rows, dtype=dtype)
    expected = [
        [j in set(places_of_largest(row, skip + keep)) - set(places_of_largest(row, skip)) for j in range(6)]
        for row in rows
    ]
    assert band_in_rows(magnitude, skip, keep).tolist() == expected
    assert _band_by_sort(magnitude, skip, keep).tolist() == expected


@given(rows=ROWS, wide=booleans())
def test_values_go_to_the_ranks_of_each_row(rows, wide):
    magnitude = torch.tensor(rows, dtype=torch.float64 if wide else torch.float32)
    rising = [sorted(range(6), key=lambda j, row=row: (row[j], -j)) for row in rows]
    found = by_rank_in_rows(magnitude, torch.arange(6, dtype=magnitude.dtype))
    assert found.tolist() == [[order.index(j) for j in range(6)] for order in rising]
    assert _order_by_sort(magnitude).flip(1).tolist() == rising


def test_packed_order_is_that_of_a_stable_sort_on_random_rows():
    magnitude = torch.randn(9, 257, generator=torch.Generator().manual_seed(0)).bfloat16().float().abs()
    assert torch.equal(_order_packed(magnitude), _order_by_sort(magnitude).flip(1))


@pytest.fixture
def searched(monkeypatch):
    """How often the radix search went over the whole scan, where a few numbers are sampled too."""
    monkeypatch.setattr(selection, "FEW", 2)
    calls = []
    whole = Ranking._digits.func

    def counted(self):
        calls.append(self)
        return whole(self)

    replaced = cached_property(counted)
    replaced.__set_name__(Ranking, "_digits")
    monkeypatch.setattr(Ranking, "_digits", replaced)
    return calls


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=NUMBERS, n=integers(1, 40), size=integers(1, 41), dtype=TYPES, signed=booleans())
def test_a_sample_of_few_numbers_changes_no_answer(searched, numbers, n, size, dtype, signed):
    values = torch.tensor(numbers, dtype=dtype)
    ranking = Ranking(scan_in(values if signed else values.abs(), size), len(values), signed=signed)
    expected = sorted((values if signed else values.abs()).tolist(), reverse=True)
    assert ranking.value(min(n, len(values))) == expected[min(n, len(values)) - 1]


@pytest.mark.parametrize("wrong", [1e-3, 1e3])
def test_a_sample_that_misleads_costs_a_search_and_no_element(searched, wrong):
    values = torch.randn(1 << 14, generator=torch.Generator().manual_seed(2))
    values.view(-1, 1024)[:, :64] *= wrong  # all that is sampled
    cut = Ranking(scan_in(values, 1024), len(values)).cut(5000)
    assert searched
    kept_places = torch.sort(values.abs(), descending=True, stable=True).indices[:5000]
    assert trim(values, 0, cut).nonzero().flatten().tolist() == kept_places.sort().values.tolist()


def test_a_sample_that_is_like_the_rest_saves_the_search(searched):
    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(3))
    for keep in (1, 1000, 30_000, 65_535):
        Ranking(scan_in(values, 4096), len(values)).cut(keep)
    assert not searched


@pytest.mark.parametrize("sampled", ["the same", "others"])
def test_more_near_elements_than_may_be_held_are_searched_for(searched, monkeypatch, sampled):
    monkeypatch.setattr(selection, "MOST", 4000)
    values = torch.ones(1 << 14)
    if sampled == "others":  # a third of which is above 1
        values.view(-1, 1024)[:, :64] = torch.randn(16, 64, generator=torch.Generator().manual_seed(4))
    cut = Ranking(scan_in(values, 1024), len(values)).cut(5200)
    assert searched
    kept_places = torch.sort(values.abs(), descending=True, stable=True).indices[:5200]
    assert trim(values, 0, cut).nonzero().flatten().tolist() == kept_places.sort().values.tolist()


@pytest.mark.parametrize("keep", [1, 100, 40_000, 99_999])
def test_a_large_tensor_with_many_ties(keep):
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    left = trim(values, 0, Ranking(scan_in(values, 30_000), len(values)).cut(keep))
    order = torch.sort(values.abs(), descending=True, stable=True).indices[:keep]
    assert torch.equal(left, torch.zeros_like(values).scatter_(0, order, values[order]))
