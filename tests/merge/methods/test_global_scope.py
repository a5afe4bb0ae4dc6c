"""`scope: global`: a model in several tensors merges as if it were one."""

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import booleans, floats, integers, sampled_from
from torch.testing import assert_close

from direct_rlhf.errors import MergeError
from direct_rlhf.merge import scopes
from direct_rlhf.merge.methods import METHODS
from merge.methods.blocks import KEYS, merge_block, tensors, whole

SEEDS = integers(0, 9999)
SHAPES = [(5, 4), (7,), (), (3, 2, 2), (6, 6)]
SIZE = sum(torch.Size(shape).numel() for shape in SHAPES)


def model(seed, count=3, coarse=False):
    """Base and experts, as one vector each; ``coarse``: many equal differences."""
    base, *experts = tensors(seed, 1 + count, (SIZE,))
    return [base.round(), *((4 * x).round() / 4 for x in experts)] if coarse else [base, *experts]


def cut_up(vectors, keys=KEYS):
    start = 0
    for number, shape in enumerate(SHAPES):
        size = torch.Size(shape).numel()
        base, *experts = (x[start : start + size].view(shape) for x in vectors)
        yield whole(base, experts, keys, name=f"tensor {number}")
        start += size


def merged_in_tensors(method, vectors, parameters, keys=KEYS):
    chosen = METHODS[method]
    survey = chosen.survey(lambda: ((block, parameters) for block in cut_up(vectors, keys)))
    parts = [merge_block(method, block, parameters, survey) for block in cut_up(vectors, keys)]
    return torch.cat([part.flatten() for part in parts])


@given(
    seed=SEEDS,
    density=floats(0.01, 1),
    coarse=booleans(),
    merge=sampled_from(["mean", "sum"]),
    at_cut=sampled_from(["exact", "all"]),
    sign=sampled_from(["majority", "positive"]),
)
def test_ties_over_a_model_is_ties_over_one_long_tensor(seed, density, coarse, merge, at_cut, sign):
    vectors = model(seed, coarse=coarse)
    settings = {"density": density, "merge": merge, "at_cut": at_cut, "zero_sign": sign, "precision": "float64"}
    parameters = METHODS["ties"].parameters
    found = merged_in_tensors("ties", vectors, parameters(scope="global", **settings))
    expected = merge_block("ties", whole(vectors[0], vectors[1:]), parameters(**settings))
    assert torch.equal(found, expected)


@given(seed=SEEDS, density=floats(0.05, 0.95), tails=sampled_from([0.0, 0.02]))
def test_pcb_over_a_model_is_pcb_over_one_long_tensor(seed, density, tails):
    vectors = model(seed)
    settings = {"density": density, "clamp_tails": tails, "precision": "float64"}
    parameters = METHODS["pcb"].parameters
    found = merged_in_tensors("pcb", vectors, parameters(scope="global", **settings))
    assert_close(found, merge_block("pcb", whole(vectors[0], vectors[1:]), parameters(**settings)))


def test_dare_ties_trims_over_the_model_what_its_masks_left():
    vectors = model(1)
    parameters = METHODS["dare_ties"].parameters(scope="global", trim=0.2, merge="sum", precision="float64", scale=1.0)
    untrimmed = parameters.model_copy(update={"trim": None, "scope": "tensor"})
    for expert in (1, 2, 3):
        alone, key = [vectors[0], vectors[expert]], KEYS[expert]
        found = merged_in_tensors("dare_ties", alone, parameters, key) - vectors[0]
        dropped = merged_in_tensors("dare_ties", alone, untrimmed, key) - vectors[0]
        largest = dropped.abs().argsort(descending=True)[: int(0.2 * SIZE)]
        assert_close(found[largest], dropped[largest])
        assert int((found != 0).sum()) == len(largest)


@pytest.mark.parametrize("method", ["ties", "pcb", "dare_ties"])
def test_the_order_of_the_experts_changes_nothing(method):
    vectors = model(2, coarse=True)
    settings = {"scope": "global"} | ({"trim": 0.5} if method == "dare_ties" else {})
    parameters = METHODS[method].parameters(weight=(0.5, 1, 2), **settings)
    turned = parameters.model_copy(update={"weight": (2, 1, 0.5)})
    found = merged_in_tensors(method, vectors, parameters)
    assert torch.equal(found, merged_in_tensors(method, [vectors[0], *vectors[:0:-1]], turned, KEYS[2::-1]))


@pytest.mark.parametrize("method", ["ties", "pcb", "dare_ties"])
def test_nothing_is_surveyed_for_the_scope_of_a_tensor(method):
    parameters = METHODS[method].parameters()
    assert METHODS[method].survey(lambda: ((block, parameters) for block in cut_up(model(3)))) is None


def test_a_survey_holds_no_more_than_one_tensor_of_each_model(monkeypatch):
    """It reads stretch by stretch, and keeps counts."""
    largest = 0
    read = scopes.pieces

    def counted(tensor, row=1, size=1 << 18):
        nonlocal largest
        largest = max(largest, min(tensor.numel(), size))
        return read(tensor, row, size)

    monkeypatch.setattr(scopes, "pieces", counted)
    parameters = METHODS["ties"].parameters(scope="global")
    merged_in_tensors("ties", model(4), parameters)
    assert largest <= 36


def test_shares_that_differ_by_tensor_are_refused_with_a_global_scope():
    method = METHODS["ties"]
    vectors = model(5)

    def passes():
        for number, block in enumerate(cut_up(vectors)):
            yield block, method.parameters(scope="global", density=0.2 + 0.1 * (number == 3))

    with pytest.raises(MergeError, match=r"tensor 3: density differs .* give one density, or scope: tensor"):
        method.survey(passes)
