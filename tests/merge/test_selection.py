"""Keeping the k largest, against sorting in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import booleans, floats, integers, lists, sampled_from

from direct_rlhf.merge.selection import (
    Ranking,
    _band_by_sort,
    _order_by_sort,
    _order_packed,
    band_in_rows,
    by_rank_in_rows,
    kept,
    trim,
)

NUMBERS = lists(
    sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 1e-40, 3e38]) | floats(-9, 9, width=32), min_size=1, max_size=40
)
TYPES = sampled_from([torch.float32, torch.float64])


def scan_in(values, size):
    return lambda: ((start, values[start : start + size]) for start in range(0, len(values), size))


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


@pytest.mark.parametrize("keep", [1, 100, 40_000, 99_999])
def test_a_large_tensor_with_many_ties(keep):
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    left = trim(values, 0, Ranking(scan_in(values, 30_000), len(values)).cut(keep))
    order = torch.sort(values.abs(), descending=True, stable=True).indices[:keep]
    assert torch.equal(left, torch.zeros_like(values).scatter_(0, order, values[order]))
