"""What holds for linear, SLERP, task arithmetic, Model Stock, Consensus TA and PCB alone."""

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, lists, sampled_from
from torch.testing import assert_close

from direct_rlhf.merge.methods import METHODS
from merge.methods.blocks import change, merged, tensors, whole

SEEDS = integers(0, 9999)


@given(seed=SEEDS, weights=lists(floats(0.01, 5), min_size=3, max_size=3))
def test_an_average_is_within_the_smallest_and_the_largest_entry(seed, weights):
    models = torch.stack(tensors(seed, 3))
    found = merged("linear", None, list(models), weight=tuple(weights))
    assert (found >= models.amin(0) - 1e-12).all()
    assert (found <= models.amax(0) + 1e-12).all()


@pytest.mark.promise("M4")
@given(seed=SEEDS, dtype=sampled_from([torch.float32, torch.bfloat16, torch.float16]), count=integers(1, 5))
def test_equal_models_average_to_that_model_to_the_last_bit(seed, dtype, count):
    model = tensors(seed, 1, dtype=torch.float32)[0].to(dtype)
    found = merged("linear", None, [model] * count, weight=tuple(0.1 + 0.3 * i for i in range(count)))
    assert torch.equal(found, model.float())


def test_without_normalisation_weights_are_plain_factors():
    first, second = tensors(0, 2)
    assert_close(merged("linear", None, [first, second], weight=(2, -1), normalize=False), 2 * first - second)


@given(seed=SEEDS, t=floats(0, 1))
def test_slerp_from_the_other_side_is_the_same(seed, t):
    first, second = tensors(seed, 2)
    assert_close(merged("slerp", None, [first, second], t=t), merged("slerp", None, [second, first], t=1 - t))


@given(seed=SEEDS, close=sampled_from([0.0, 1e-3]))
def test_slerp_begins_and_ends_at_the_models(seed, close):
    first, second = tensors(seed, 2)
    second = first + close * second if close else second
    assert_close(merged("slerp", None, [first, second], t=0.0), first)
    assert_close(merged("slerp", None, [first, second], t=1.0), second)


@given(seed=SEEDS, t=floats(0, 1))
def test_slerp_keeps_equal_norms(seed, t):
    first, second = (x / x.norm() for x in tensors(seed, 2))
    assert merged("slerp", None, [first, second], t=t).norm().item() == pytest.approx(1, abs=1e-9)


def test_slerp_on_differences_interpolates_these():
    base, first, second = tensors(1, 3)
    found = merged("slerp", base, [base + first, base + second], t=0.3, on="delta")
    assert_close(found, base + merged("slerp", None, [first, second], t=0.3))


def test_slerp_reports_opposite_models_and_passes_zero_between_them():
    first = tensors(2, 1)[0]
    block = whole(None, [first, -first])
    method = METHODS["slerp"]
    assert not method.merge(block, method.parameters(precision="float64"), None).any()
    assert block.notes["cosine"] == pytest.approx(-1)


def test_slerp_of_a_zero_model_is_finite():
    first = tensors(3, 1)[0]
    assert merged("slerp", None, [torch.zeros_like(first), first]).isfinite().all()


@pytest.mark.promise("M4")
def test_one_expert_at_scale_1_is_that_expert():
    base, expert = tensors(4, 2)
    assert_close(merged("task_arithmetic", base, [expert], scale=1.0), expert)


def orthogonal_pair(seed):
    first, second = tensors(seed, 2)
    return first, second - first * ((first * second).sum() / first.square().sum())


@given(seed=SEEDS)
def test_model_stock_returns_copies_and_gives_up_orthogonal_differences(seed):
    first, second = orthogonal_pair(seed)
    assert_close(change("model_stock", [first] * 3), first)
    assert change("model_stock", [first, second]).abs().max() < 1e-12


def test_model_stock_clamps_what_would_extrapolate_and_says_so():
    first, second = orthogonal_pair(5)
    block = whole(torch.zeros_like(first), [first, second - 0.5 * first])
    method = METHODS["model_stock"]
    assert not method.merge(block, method.parameters(precision="float64"), None).any()
    assert block.notes["clamped"] == 1
    assert block.notes["t"] == 0
    assert method.merge(block, method.parameters(precision="float64", clamp=False), None).any()


def test_model_stock_of_one_or_no_change_is_finite():
    base, expert = tensors(6, 2)
    assert_close(merged("model_stock", base, [base, base, expert]).isfinite().all(), torch.tensor(True))


@given(seed=SEEDS)
def test_consensus_of_nobody_is_task_arithmetic(seed):
    deltas = tensors(seed, 3)
    assert_close(change("consensus_ta", deltas, agree=0), change("task_arithmetic", deltas))


@given(seed=SEEDS, k=integers(0, 3), mask_scale=floats(0, 2))
def test_what_consensus_keeps_shrinks_with_both_of_its_bounds(seed, k, mask_scale):
    deltas = tensors(seed, 3)
    kept = change("consensus_ta", deltas, agree=k, mask_scale=mask_scale) != 0
    for stricter in ({"agree": k + 1, "mask_scale": mask_scale}, {"agree": k, "mask_scale": mask_scale + 0.3}):
        assert not ((change("consensus_ta", deltas, **stricter) != 0) & ~kept).any()


def test_each_expert_may_have_its_own_mask_scale():
    deltas = tensors(7, 2)
    strict = change("consensus_ta", deltas, agree=1, mask_scale=(0.6, 1e9))
    first, second = deltas
    assert_close(strict, 0.3 * torch.where(first.abs() > 0.6 * second.abs(), first + second, 0))


@given(seed=SEEDS, density=floats(0.05, 1), count=integers(1, 4))
def test_pcb_stays_within_the_experts_or_leaves_the_base(seed, density, count):
    deltas = torch.stack(tensors(seed, count))
    found = change("pcb", list(deltas), density=density, scale=1.0)
    inside = (found >= deltas.amin(0) - 1e-9) & (found <= deltas.amax(0) + 1e-9)
    assert (inside | (found == 0)).all()


def test_pcb_of_constant_differences_leaves_the_base():
    assert not change("pcb", [torch.ones(3, 4)] * 2).any()


def pcb_slowly(deltas, rho, tails):
    """Over flat vectors, with full sorts."""
    t, n = deltas.shape
    total = deltas.sum(0)
    shares, values = [], []
    for tau in deltas:
        rising = tau.abs().sort().values
        magnitude = tau.abs()
        if tails:
            magnitude = magnitude.clamp(rising[int(n * tails)], rising[int(n * (1 - tails) - 1)])
        a = ((magnitude - magnitude.min()) / (magnitude.max() - magnitude.min())) ** 2
        b = torch.exp(t * a) * torch.tanh(tau * total)
        b = b.clamp(min=b.sort().values[int(n * (1 - rho))])
        shares.append((b - b.min()) / (b.max() - b.min()))
        values.append(tau.sign() * magnitude)
    shares, values = torch.stack(shares), torch.stack(values)
    return (shares * values).sum(0) / shares.sum(0).clamp(min=1e-12)


@given(seed=SEEDS, rho=floats(0.05, 0.95), tails=sampled_from([0.0, 1e-4, 0.05]))
def test_pcb_is_its_definition_with_full_sorts(seed, rho, tails):
    deltas = torch.stack(tensors(seed, 3, (97,)))
    found = change("pcb", list(deltas), density=rho, clamp_tails=tails, scale=1.0)
    assert_close(found, pcb_slowly(deltas, rho, tails))
