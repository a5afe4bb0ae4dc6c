"""What the tests of the maths share: random float64 batches with rows of every kind, and exact comparison."""

import math

import torch
from torch.testing import assert_close

JUNK = [math.nan, math.inf, -math.inf]  # what a padded slot may hold


def random_batch(seed, n_rows=6, n_slots=5):
    """Three float64 tensors [B, T] and a mask with full, one-token and empty rows."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, n_slots + 1, (n_rows,), generator=draw)
    lengths[:3] = torch.tensor([n_slots, 1, 0])
    mask = torch.arange(n_slots) < lengths[:, None]
    tensors = [torch.randn(n_rows, n_slots, generator=draw, dtype=torch.float64) for _ in range(3)]
    return tensors, mask


def exactly(actual, expected):
    """Equal to 1e-10, absolute: float64 rounding and nothing else."""
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=1e-10)
