"""What holds for TIES, DARE, DELLA and Breadcrumbs alone; random methods repeat (M5)."""

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, sampled_from
from torch.testing import assert_close

from direct_rlhf.merge.methods import METHODS, della
from direct_rlhf.merge.methods.breadcrumbs import counts
from merge.methods.blocks import KEYS, change, merge_block, merged, tensors, whole

SEEDS = integers(0, 9999)
RANDOM = [method.name for method in METHODS.values() if method.random]


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.promise("M5")
@given(
    seed=SEEDS,
    size=integers(1, 60),
    rescale=sampled_from(["inverse", "l1"]),
    sign=sampled_from(["majority", "positive"]),
)
def test_a_seed_repeats_whatever_the_blocks_and_the_order_of_the_experts(method, seed, size, rescale, sign):
    base, *experts = tensors(seed, 4, (7, 8), torch.float32)
    settings = {"seed": seed, "rescale": rescale} | ({"zero_sign": sign} if method != "dare_linear" else {})
    parameters = METHODS[method].parameters(**settings)
    at_once = merge_block(method, whole(base, experts), parameters)
    assert torch.equal(at_once, merge_block(method, whole(base, experts), parameters, size=size))
    turned = whole(base, experts[::-1], KEYS[2::-1])
    assert torch.equal(at_once, merge_block(method, turned, parameters))


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.promise("M5")
def test_masks_differ_by_seed_expert_and_tensor(method):
    base, expert = torch.zeros(40, 40), torch.ones(40, 40)
    parameters = METHODS[method].parameters(density=0.5)

    def kept(block, parameters=parameters):
        return merge_block(method, block, parameters) != 0

    first = kept(whole(base, [expert]))
    assert not torch.equal(first, kept(whole(base, [expert]), parameters.model_copy(update={"seed": 1})))
    assert not torch.equal(first, kept(whole(base, [expert], keys="b")))
    assert not torch.equal(first, kept(whole(base, [expert], name="other")))
    assert torch.equal(first, kept(whole(base, [expert])))


@given(seed=SEEDS, density=floats(0.05, 1))
def test_dare_leaves_0_or_the_rescaled_difference(seed, density):
    delta = tensors(seed, 1, (50,))[0]
    left = change("dare_linear", [delta], density=density, scale=1.0)
    assert_close(left, torch.where(left == 0, 0, delta / density))


@pytest.mark.parametrize("method", RANDOM)
def test_the_mean_over_seeds_is_the_difference(method):
    delta = tensors(0, 1, (6, 8))[0]
    runs = torch.stack([change(method, [delta], seed=seed, scale=1.0) for seed in range(4000)])
    error = (runs.mean(0) - delta) / (runs.std(0) / 4000**0.5)
    assert error.abs().max() < 4.5


@pytest.mark.parametrize("method", RANDOM)
@given(seed=SEEDS)
def test_l1_restores_the_sum_of_absolute_values(method, seed):
    delta = tensors(seed, 1, (20, 9))[0]
    left = change(method, [delta], rescale="l1", scale=1.0)
    assert left.abs().sum().item() == pytest.approx(delta.abs().sum().item())
    assert (left == 0).any()


@pytest.mark.parametrize("method", RANDOM)
def test_without_rescaling_what_stays_is_the_difference(method):
    delta = tensors(1, 1, (20, 9))[0]
    left = change(method, [delta], rescale="none", scale=1.0)
    assert_close(left, torch.where(left == 0, 0, delta))


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_everything_or_nothing_dropped_is_finite(method, rescale):
    deltas = [torch.zeros(4, 5), *tensors(2, 1, (4, 5), torch.float32)]
    lowest = {"density": 0.0} if method != "della" else {"density": 1e-3, "epsilon": 1e-4}
    assert change(method, deltas, rescale=rescale, **lowest).isfinite().all()
    assert change(method, deltas, rescale=rescale, density=1.0).isfinite().all()


@given(seed=SEEDS, trim=floats(0.05, 1))
def test_dare_ties_trims_what_dare_left_if_asked(seed, trim):
    deltas = tensors(seed, 3, (60,))
    dropped = [change("dare_linear", [delta], scale=1.0) for delta in deltas]
    keys = {"seed": 0}
    for i, delta in enumerate(deltas):  # the masks of experts a, b, c
        block = whole(torch.zeros_like(delta), [delta], KEYS[i])
        parameters = METHODS["dare_linear"].parameters(scale=1.0, precision="float64")
        dropped[i] = merge_block("dare_linear", block, parameters)
    assert_close(change("dare_ties", deltas, trim=trim, **keys), change("ties", dropped, density=trim))


@given(count=integers(1, 60), density=floats(0.2, 0.8), epsilon=floats(0, 0.19))
def test_della_keeps_larger_entries_sooner_and_the_density_on_average(count, density, epsilon):
    p = della.keep_probabilities(count, density, epsilon, torch.float64)
    assert (p.diff() >= 0).all()
    assert p.mean().item() == pytest.approx(density)
    assert (p > 0).all()
    assert (p < 1).all()


@given(seed=SEEDS, columns=integers(1, 9))
def test_della_leaves_0_or_the_difference_over_its_chance(seed, columns):
    delta = tensors(seed, 1, (8, columns))[0]
    p = della.keep_probabilities(columns, 0.7, 0.07, torch.float64)[delta.abs().argsort(1).argsort(1)]
    left = change("della", [delta])
    assert_close(left, torch.where(left == 0, 0, delta / p))


def test_della_without_a_range_is_dare_with_the_same_masks():
    deltas = tensors(3, 3, (30, 11))
    for elect, other in ((True, "dare_ties"), (False, "dare_linear")):
        settings = {"density": 0.6, "seed": 5, "scale": 1.0, "merge": "mean"}
        assert torch.equal(
            change("della", deltas, epsilon=0.0, elect=elect, **settings), change(other, deltas, **settings)
        )


def test_a_row_of_one_entry_stays_with_the_density():
    delta = torch.ones(4000, 1)
    left = change("della", [delta])
    assert left.isfinite().all()
    assert abs(float((left != 0).double().mean()) - 0.7) < 0.04
    assert_close(left[left != 0], torch.full_like(left[left != 0], 1 / 0.7))


@given(seed=SEEDS, beta=floats(0, 1), gamma=floats(0, 1), scope=sampled_from(["row", "tensor"]))
def test_breadcrumbs_removes_and_keeps_exact_counts(seed, beta, gamma, scope):
    delta = tensors(seed, 1, (5, 12))[0].bfloat16().double()
    left = change("breadcrumbs", [delta], beta=beta, gamma=gamma, scope=scope, scale=1.0)
    rows = zip(delta, left, strict=True) if scope == "row" else [(delta.flatten(), left.flatten())]
    for row, kept in rows:
        n = len(row)
        outliers, keep = counts(n, beta, gamma)
        falling = sorted(range(n), key=lambda j, row=row: (-abs(row[j].item()), j))
        chosen = set(falling[outliers : outliers + keep])
        assert kept.tolist() == [row[j].item() if j in chosen else 0.0 for j in range(n)]


def test_breadcrumbs_counts():
    assert counts(100, 0.2, 0.1) == (10, 20)
    assert counts(100, 0.95, 0.1) == (10, 90)
    assert counts(100, 0.95, 0.1, beta_first=True) == (5, 95)
    assert counts(100, 1.0, 0.1, beta_first=True) == (0, 100)
    assert counts(4, 0.0, 0.1) == (0, 1)


@given(seed=SEEDS)
def test_breadcrumbs_that_removes_nothing_is_task_arithmetic(seed):
    deltas = tensors(seed, 3)
    for scope in ("row", "tensor"):
        found = change("breadcrumbs", deltas, beta=1.0, gamma=0.0, scale=0.3, scope=scope)
        assert torch.equal(found, change("task_arithmetic", deltas))


@given(seed=SEEDS)
def test_a_ties_sum_is_the_mean_times_how_many_agree(seed):
    deltas = tensors(seed, 3, (40,))
    mean, total = (change("ties", deltas, density=0.5, merge=merge) for merge in ("mean", "sum"))
    kept = torch.stack([change("ties", [delta], density=0.5) for delta in deltas])
    agree = ((kept.sign() == total.sign()) & (kept != 0)).sum(0)
    assert_close(total, mean * agree)


def test_densities_and_weights_are_each_experts_own():
    first, second = tensors(8, 2, (50,))
    found = change("ties", [first, second], density=(0.1, 1.0), weight=(0.0, 2.0), merge="sum")
    assert_close(found, 2 * second)
    found = merged("ties", torch.zeros_like(first), [first, second], density=(0.1, 0.0001), merge="sum")
    assert int((found != 0).sum()) in (5, 6)


@pytest.mark.parametrize(
    "method", ["ties", "breadcrumbs", "della", "dare_ties", "pcb", "task_arithmetic", "model_stock"]
)
@given(seed=SEEDS)
def test_half_precision_models_merge_as_their_exact_values(method, seed):
    """The differences of bfloat16 weights tie often; float64 of the same weights must choose the same entries."""
    base, *noise = tensors(seed, 4, (9, 20), torch.float32)
    stored = [(0.02 * base).bfloat16(), *((0.02 * base + 1e-4 * x).bfloat16() for x in noise)]
    exact = [x.double() for x in stored]
    found = merged(method, stored[0], stored[1:])
    assert found.dtype == torch.float32
    assert_close(found.double(), merged(method, exact[0], exact[1:]), rtol=1e-4, atol=1e-7)
