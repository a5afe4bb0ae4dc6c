import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers

from direct_rlhf.maths.masked import masked_mean, masked_var, whiten
from maths.batches import exactly, random_batch

X = torch.tensor([[1.0, 2.0, float("nan")], [5.0, float("inf"), float("-inf")]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_moments_ignore_what_is_under_the_mask():
    assert masked_mean(X, MASK).item() == pytest.approx(8 / 3)
    assert masked_var(X, MASK).item() == pytest.approx(torch.tensor([1.0, 2.0, 5.0]).var(correction=0).item())


@given(seed=integers(0, 999))
def test_moments_and_whitening_equal_their_loops(seed):
    (x, _, _), mask = random_batch(seed)
    valid = [x[b, t].item() for b, t in mask.nonzero().tolist()]
    mean = sum(valid) / len(valid)
    variance = sum((v - mean) ** 2 for v in valid) / len(valid)
    assert masked_mean(x, mask).item() == pytest.approx(mean, abs=1e-12)
    assert masked_mean(x, mask, 7).item() == pytest.approx(sum(valid) / 7, abs=1e-12)
    assert masked_var(x, mask).item() == pytest.approx(variance, abs=1e-12)
    expected = torch.zeros_like(x)
    for b, t in mask.nonzero().tolist():
        expected[b, t] = (x[b, t].item() - mean) / math.sqrt(variance + 1e-8)
    exactly(whiten(x, mask), expected)


def test_whitened_values_have_mean_0_variance_1_and_are_0_under_the_mask():
    white = whiten(X, MASK)
    assert masked_mean(white, MASK).item() == pytest.approx(0, abs=1e-6)
    assert masked_var(white, MASK).item() == pytest.approx(1, abs=1e-6)
    assert white[~MASK].tolist() == [0, 0, 0]


def test_no_true_slot_gives_0_and_equal_values_whiten_to_0():
    empty = torch.zeros_like(MASK)
    assert masked_mean(X, empty).item() == masked_var(X, empty).item() == 0
    assert torch.equal(whiten(X, empty), torch.zeros_like(X))
    assert torch.equal(whiten(torch.full((2, 3), 7.0), MASK), torch.zeros(2, 3))


def test_half_precision_is_summed_in_float32_and_float64_stays():
    many = torch.full((1, 4096), 1.001, dtype=torch.bfloat16)
    mean = masked_mean(many, torch.ones_like(many, dtype=torch.bool))
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(many[0, 0].item(), rel=1e-6)
    assert masked_mean(many.double(), torch.ones_like(many, dtype=torch.bool)).dtype == torch.float64


def test_wrong_shapes_masks_and_denominators_are_named():
    with pytest.raises(ValueError, match=r"equal shape expected, got \(2, 3\), \(3, 2\)"):
        masked_mean(torch.ones(3, 2), MASK)
    with pytest.raises(ValueError, match=r"dtype bool expected, got torch\.float32"):
        masked_mean(X, MASK.float())
    with pytest.raises(ValueError, match="denominator must be positive, got 0"):
        masked_mean(X, MASK, 0)
