import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import booleans, integers, lists, none, one_of

from direct_rlhf.maths import attention
from direct_rlhf.maths.attention import Rows, attend, few_sizes

HEADS, KEYS, SIZE = 4, 2, 6


def drawn(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    return [torch.randn(n, heads, SIZE, generator=draw, requires_grad=True) for heads in (HEADS, KEYS, KEYS)]


def one_by_one(query, key, value, lengths, window, scale):
    """Each token of each row against all it may see, written out."""
    out, start = [], 0
    for length in lengths:
        for place in range(length):
            first = 0 if window is None else max(0, place - window + 1)
            for head in range(HEADS):
                own = head // (HEADS // KEYS)
                seen = slice(start + first, start + place + 1)
                weight = (key[seen, own] @ query[start + place, head] * scale).softmax(0)
                out.append(weight @ value[seen, own])
        start += length
    return torch.stack(out).view(-1, HEADS, SIZE)


@settings(max_examples=30, deadline=None)
@given(
    lengths=lists(integers(1, 9), min_size=1, max_size=6),
    window=one_of(none(), integers(1, 6)),
    fused=booleans(),
    few=booleans(),
)
def test_packed_rows_attend_as_each_row_does_alone(lengths, window, fused, few):
    lengths = sorted(lengths)
    tensors = drawn(lengths)
    limit, attention.EAGER_SLOTS = attention.EAGER_SLOTS, {} if fused else attention.EAGER_SLOTS
    try:
        seen = attend(*tensors, Rows(tuple(lengths), torch.device("cpu"), few), window=window, scale=0.4)
    finally:
        attention.EAGER_SLOTS = limit
    expected = one_by_one(*tensors, lengths, window, 0.4)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-4)
    weight = torch.randn(seen.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((seen * weight).sum(), tensors)
    theirs = torch.autograd.grad((expected * weight).sum(), tensors)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@given(n=integers(1, 10**6))
def test_a_size_is_rounded_up_by_at_most_an_eighth_to_one_of_few(n):
    assert n <= few_sizes(n) <= n * 9 / 8
    assert few_sizes(few_sizes(n)) == few_sizes(n)


def test_eight_sizes_an_octave_are_left():
    assert len({few_sizes(n) for n in range(1024, 2048)}) <= 9


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [((5,), [(5,)]), ((4, 4, 8), [(4, 4, 8)]), ((2, 3, 5, 16, 20), [(2, 3), (5,), (16, 20)]), ((1, 16), [(1,), (16,)])],
)
def test_rows_are_padded_to_at_most_twice_their_length(lengths, groups):
    rows = Rows(lengths, torch.device("cpu"))
    assert [group.lengths for group in rows.groups] == groups
    assert [(group.start, group.end) for group in rows.groups][-1][1] == sum(lengths)
    assert rows.position_N.tolist() == [place for length in lengths for place in range(length)]


def test_a_nan_in_one_row_stays_in_it():
    query, key, value = drawn((3, 4))
    with torch.no_grad():
        value[1] = float("nan")
    seen = attend(query, key, value, Rows((3, 4), torch.device("cpu")), window=None, scale=1.0)
    assert seen[1:3].isnan().any()
    assert seen[3:].isfinite().all()
