"""Sign election and disjoint merge, against a loop over single entries."""

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers, lists, sampled_from

from merge.methods.blocks import change, merged, tensors

STEPS = sampled_from([0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
COLUMNS = lists(lists(STEPS, min_size=3, max_size=3), min_size=1, max_size=12)
WEIGHTS = lists(sampled_from([0.0, 1.0, 0.5, 2.0, -1.0]), min_size=3, max_size=3)


def slowly(entries, weights, *, mean, positive):
    """theta_0 = 0, d = 1, lambda = 1: one entry after the other."""
    signs = []
    for values in entries:
        total = sum(w * x for w, x in zip(weights, values, strict=True))
        signs.append((total > 0) - (total < 0))
    of_zeros = 1 if positive or sum(signs) > 0 else -1
    result = []
    for values, sign in zip(entries, signs, strict=True):
        elected = sign or of_zeros
        agreeing = [(w, w * x) for w, x in zip(weights, values, strict=True) if w * x * elected > 0]
        divisor = sum(w for w, _ in agreeing) or 1
        result.append(sum(x for _, x in agreeing) / (divisor if mean else 1))
    return result


@given(entries=COLUMNS, weights=WEIGHTS, mean=booleans(), positive=booleans())
def test_election_and_merge_are_those_of_the_loop(entries, weights, mean, positive):
    deltas = [torch.tensor([values[i] for values in entries], dtype=torch.float64) for i in range(3)]
    settings = {"merge": "mean" if mean else "sum", "zero_sign": "positive" if positive else "majority"}
    found = change("ties", deltas, density=1.0, weight=tuple(weights), **settings)
    assert found.tolist() == pytest.approx(slowly(entries, weights, mean=mean, positive=positive))


def test_where_entries_cancel_the_sign_that_most_entries_elect_decides():
    cancel, others = [1.0, -1.0], [[2.0, 1.0], [3.0, 1.0], [-1.0, -1.0]]
    columns = torch.tensor([cancel, *others]).T
    assert change("ties", list(columns), density=1.0)[0] == 1
    assert change("ties", list(-columns), density=1.0)[0] == -1
    undecided = torch.tensor([cancel, *others[1:]]).T
    assert change("ties", list(undecided), density=1.0)[0] == -1
    assert change("ties", list(undecided), density=1.0, zero_sign="positive")[0] == 1


@given(seed=integers(0, 99), scale=sampled_from([1.0, -0.5, 3.0]))
def test_many_pieces_with_cancelled_entries_in_all_of_them(seed, scale):
    """The sign of cancelled entries is known only after the last piece."""
    base, delta = tensors(seed, 2, (150_000,), torch.float32)
    lean = torch.where(torch.arange(150_000) % 3 > 0, delta.abs(), 0)  # elects + where it is not 0
    found = merged("ties", base, [base + delta, base - delta, base + lean], density=1.0, merge="sum", scale=scale)
    up, down = base + delta - base, base - (base - delta)
    cancelled = (base + lean == base) & (up == down)
    expected = base + scale * up.abs()
    assert int(cancelled.sum()) > 10_000
    assert torch.allclose(found[cancelled], expected[cancelled])
