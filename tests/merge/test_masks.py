"""Random masks: repeatable wherever they are drawn (M5), and as good as random."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers, sampled_from

from direct_rlhf.merge.masks import HALF, SURE, chances, drop_, random_numbers

CPU = torch.device("cpu")
GOLDEN_BITS = [-258370873, -302068787, -1006040706, -321361196]
MANY = 1 << 18
SIGMAS = 4.5  # a fixed seed either passes or does not; a bad generator misses by far more


def uniform(*key, start=0, count=MANY):
    return (random_numbers(start, count, CPU, *key).double() + HALF) / SURE


def correlation(x, y):
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


@pytest.mark.promise("M5")
@given(start=integers(0, (1 << 33) - 50), count=integers(0, 60), first=integers(0, 60))
def test_a_number_depends_on_its_index_and_not_on_what_was_drawn_with_it(start, count, first):
    first = min(first, count)
    together = random_numbers(start, count, CPU, "drop", 0, "a", "w")
    apart = [
        random_numbers(start, first, CPU, "drop", 0, "a", "w"),
        random_numbers(start + first, count - first, CPU, "drop", 0, "a", "w"),
    ]
    assert torch.equal(together, torch.cat(apart))


def test_indices_on_both_sides_of_a_32_bit_border_are_drawn_apart():
    border = 1 << 32
    joined = random_numbers(border - 3, 6, CPU, "k")
    assert torch.equal(joined[3:], random_numbers(border, 3, CPU, "k"))
    assert not torch.equal(joined[3:], random_numbers(0, 3, CPU, "k"))


def test_the_numbers_of_a_key_never_change():
    """Merged models can be made again only if these stay."""
    assert random_numbers(0, 4, CPU, "drop", 0, "expert", "weight").tolist() == GOLDEN_BITS


def test_numbers_are_uniform():
    x = uniform("uniform")
    assert abs(float(x.mean()) - 0.5) < SIGMAS * math.sqrt(1 / 12 / MANY)
    counts = torch.bincount((x * 256).long(), minlength=256).double()
    chi_square = float(((counts - MANY / 256).square() / (MANY / 256)).sum())
    assert abs(chi_square - 255) < SIGMAS * math.sqrt(2 * 255)


def test_every_bit_is_set_half_the_time():
    bits = random_numbers(0, MANY, CPU, "bits") + HALF
    for place in range(31):
        share = float(((bits >> place) & 1).double().mean())
        assert abs(share - 0.5) < SIGMAS * 0.5 / math.sqrt(MANY), place


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 64, 1000, 1024, 4096])
def test_neighbours_in_a_row_and_in_a_column_are_uncorrelated(lag):
    x = uniform("neighbours")
    assert abs(correlation(x[:-lag], x[lag:])) < SIGMAS / math.sqrt(MANY)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("drop", 0, "a", "w"), ("drop", 1, "a", "w")),  # seeds
        (("drop", 0, "a", "w"), ("drop", 0, "b", "w")),  # experts
        (("drop", 0, "a", "layers.0.w"), ("drop", 0, "a", "layers.1.w")),  # tensors
    ],
)
def test_masks_of_different_keys_are_independent(one, other):
    x, y = uniform(*one), uniform(*other)
    assert abs(correlation(x, y)) < SIGMAS / math.sqrt(MANY)
    for p in (0.1, 0.5, 0.9):
        both = float(((x < p) & (y < p)).double().mean())
        assert abs(both - p * p) < SIGMAS * math.sqrt(p * p * (1 - p * p) / MANY)


def test_the_same_pattern_does_not_appear_shifted_under_another_key():
    x, y = uniform("one", count=1 << 14), uniform("other", count=1 << 14)
    spectrum = torch.fft.ifft(torch.fft.fft(x - 0.5) * torch.fft.fft(y - 0.5).conj()).real / len(x) * 12
    assert float(spectrum.abs().max()) < 6 / math.sqrt(len(x))


@given(p=sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]), dtype=sampled_from([torch.float32, torch.float64]))
def test_dropped_entries_are_plus_zero_and_others_keep_their_bits(p, dtype):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    left = drop_(x.clone(), 0, chances(p), "k")
    gone = left == 0
    assert torch.equal(left[~gone], x[~gone])
    assert not left[gone].signbit().any()
    assert abs(float((~gone).double().mean()) - p) <= SIGMAS * math.sqrt(p * (1 - p) / 5000)


def test_both_types_have_the_same_masks():
    x = torch.ones(1000)
    assert torch.equal(drop_(x.clone(), 7, chances(0.5), "k") == 0, drop_(x.double(), 7, chances(0.5), "k") == 0)
