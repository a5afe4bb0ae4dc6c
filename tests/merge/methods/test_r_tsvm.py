"""R-TSVM (this project's own reading): what its two ingredients do, and TSV-M to the last bit without them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import booleans, floats, integers, lists, sampled_from

from direct_rlhf.merge.methods import METHODS, r_tsvm
from direct_rlhf.recipe.merge_methods import RTsvmParameters
from merge.methods.blocks import change, tensors, whole
from merge.test_factorise import low_rank, random_matrix

SEEDS = integers(0, 9999)
OFF = {"weighting": False, "rank": "equal"}


def with_outliers(seed, count=3, shape=(30, 24)):
    spikes = torch.Generator().manual_seed(seed)
    return [
        delta + 30 * delta.sign() * (torch.rand(shape, generator=spikes) < 0.02)
        for delta in tensors(seed, count, shape, torch.float32)
    ]


@pytest.mark.promise("M4")
@given(
    seed=SEEDS,
    kind=sampled_from(["full", "low", "outliers", "bfloat16"]),
    reference=sampled_from([None, "original"]),
    svd=sampled_from(["auto", "exact"]),
)
def test_without_both_ingredients_it_is_tsv_m_to_the_last_bit(seed, kind, reference, svd):
    deltas = {
        "full": lambda: tensors(seed, 3, (15, 10), torch.float32),
        "low": lambda: [low_rank(seed + i, 20, 16, 2) for i in range(3)],
        "outliers": lambda: with_outliers(seed),
        "bfloat16": lambda: [x.bfloat16() for x in tensors(seed, 3, (15, 10), torch.float32)],
    }[kind]()
    common = {"reference": reference, "svd": svd, "scale": 0.7, "weight": (1.0, 0.5, 2.0)}
    assert torch.equal(change("r_tsvm", deltas, **OFF, **common), change("tsv_m", deltas, **common))


@given(seed=SEEDS, rank=sampled_from(["equal", "entropy", "stable"]), power=sampled_from([0.0, 1.0, 2.0]))
def test_an_infinite_threshold_weighs_nothing(seed, rank, power):
    deltas = with_outliers(seed)
    assert torch.equal(
        change("r_tsvm", deltas, threshold=1e30, power=power, rank=rank),
        change("r_tsvm", deltas, weighting=False, rank=rank),
    )


@given(seed=SEEDS, threshold=sampled_from([3.0, 4.5, 6.0]), power=sampled_from([0.0, 1.0, 2.0]), clamp=booleans())
def test_the_norm_is_kept_below_the_cap_and_reported_above_it(seed, threshold, power, clamp):
    deltas = with_outliers(seed)
    parameters = RTsvmParameters(threshold=threshold, power=power, clamp=clamp, norm_cap=None)
    weighings = [r_tsvm.weigh(delta, parameters) for delta in deltas]
    factors, _ = r_tsvm.factors_of(weighings, parameters)
    before = sum(delta.double().square().sum() for delta in deltas)
    after = sum((f * each.clamped_MN.double()).square().sum() for f, each in zip(factors, weighings, strict=True))
    assert float(after) == pytest.approx(float(before), rel=1e-5)
    block = whole(torch.zeros(30, 24), deltas)
    METHODS["r_tsvm"].merge(block, parameters.model_copy(update={"norm_cap": 1.0}), None)
    if clamp:
        assert block.notes["norm caps that bind"] >= 1
    assert all(0 <= block.notes[f"outlier energy of {key}"] < 1 for key in "abc")


def test_the_cap_protects_a_healthy_expert_from_one_with_a_single_huge_entry():
    healthy, sick = tensors(0, 2, (30, 24), torch.float32)
    sick[3, 4] = 1000.0
    uncapped, capped = RTsvmParameters(norm_cap=None), RTsvmParameters()
    weighings = [r_tsvm.weigh(delta, uncapped) for delta in (healthy, sick)]
    assert r_tsvm.factors_of(weighings, uncapped)[0][0] > 7
    assert r_tsvm.factors_of(weighings, capped)[0][0] <= 1.5


def test_clamping_and_expert_weights_can_be_had_apart():
    deltas = with_outliers(1)
    clamp_only, weights_only = RTsvmParameters(power=0), RTsvmParameters(clamp=False)
    assert [r_tsvm.weigh(delta, clamp_only).expert_weight for delta in deltas] == [1, 1, 1]
    for delta in deltas:
        weighing = r_tsvm.weigh(delta, weights_only)
        assert weighing.clamped_MN is delta
        assert weighing.norm_factor == 1
        assert 0 < weighing.expert_weight < 1
    neither = change("r_tsvm", deltas, clamp=False, power=0, rank="equal")
    assert torch.equal(neither, change("tsv_m", deltas))


@given(values=lists(sampled_from([0.0, 1.0, -2.0, 3.0, 0.5]), min_size=1, max_size=12))
def test_the_robust_scale_is_the_lower_median_of_what_changed(values):
    changed = sorted(abs(x) for x in values if x)
    expected = changed[(len(changed) - 1) // 2] / 0.6745 if changed else 0.0
    assert r_tsvm.robust_scale(torch.tensor(values)) == pytest.approx(expected)


@given(
    r=integers(3, 60),
    wanted=lists(floats(0.1, 50), min_size=3, max_size=3),
    caps=lists(integers(0, 60), min_size=3, max_size=3),
)
def test_shares_use_the_budget_up_to_the_caps(r, wanted, caps):
    counts = r_tsvm.shares(r, wanted, caps)
    assert all(0 <= k <= cap for k, cap in zip(counts, caps, strict=True))
    assert sum(counts) == min(r, sum(caps))
    assert all(k >= 1 for k, cap in zip(counts, caps, strict=True) if cap)


@given(seed=SEEDS, rank=sampled_from(["entropy", "stable"]))
def test_no_expert_gives_more_directions_than_it_has(seed, rank):
    ranks = (2, 5, 9)
    deltas = [low_rank(seed + i, 30, 24, q) for i, q in enumerate(ranks)]
    block = whole(torch.zeros(30, 24), deltas)
    METHODS["r_tsvm"].merge(block, RTsvmParameters(weighting=False, rank=rank), None)
    counts = [block.notes[f"directions of {key}"] for key in "abc"]
    assert all(k <= q for k, q in zip(counts, ranks, strict=True))
    assert sum(counts) <= 24


def test_an_expert_of_higher_effective_rank_gets_more_directions():
    spectra = [torch.logspace(0, -decades, 24) for decades in (0.5, 2, 3)]
    deltas = [random_matrix(i, 30, 24, s, torch.float32) for i, s in enumerate(spectra)]
    block = whole(torch.zeros(30, 24), deltas)
    METHODS["r_tsvm"].merge(block, RTsvmParameters(weighting=False), None)
    counts = [block.notes[f"directions of {key}"] for key in "abc"]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2]
    assert sum(counts) == 24


def test_zero_experts_change_nothing_and_stay_finite():
    delta = tensors(2, 1, (12, 9), torch.float32)[0]
    zero = torch.zeros_like(delta)
    for settings_ in ({}, {"rank": "stable"}, {"norm_cap": None}, {"clamp": False}):
        assert not change("r_tsvm", [zero, zero], **settings_).any()
        assert change("r_tsvm", [delta, zero], **settings_).isfinite().all()


def noisy_experts(seed, ranks=(30, 30, 30), outliers=0.0):
    """(experts, sum of their clean parts): low-rank signals of norm 1 with a fifth of noise, and entries 30 times as
    large."""
    draw = torch.Generator().manual_seed(seed)
    clean, noisy = [], []
    for i, rank in enumerate(ranks):
        signal = low_rank(100 * seed + i, 128, 96, rank).double()
        signal /= signal.norm()
        noise = torch.randn(128, 96, generator=draw, dtype=torch.float64)
        clean.append(signal)
        spiked = signal + 0.2 * noise / noise.norm()
        hit = torch.rand(128, 96, generator=draw) < outliers
        noisy.append(torch.where(hit, 30 * spiked.abs().median() * torch.sign(noise), spiked).float())
    return noisy, sum(clean)


def error(found, clean):
    return float((found.double() - clean).norm() / clean.norm())


def mean_error(ranks, outliers, **settings_):
    errors = []
    for seed in range(3):
        experts, clean = noisy_experts(seed, ranks, outliers)
        errors.append(error(change("r_tsvm", experts, **(OFF | settings_)), clean))
    return sum(errors) / 3


def test_weighting_recovers_what_outliers_cost():
    plain = mean_error((30, 30, 30), 0.0)
    spoiled = mean_error((30, 30, 30), 0.001)
    weighted = mean_error((30, 30, 30), 0.001, weighting=True)
    assert spoiled > 1.1 * plain
    assert weighted < 0.95 * spoiled
    assert mean_error((30, 30, 30), 0.0, weighting=True) == pytest.approx(plain, rel=0.02)


def test_adaptive_ranks_help_experts_of_different_rank():
    assert mean_error((4, 16, 60), 0.0, rank="entropy") < mean_error((4, 16, 60), 0.0)


@settings(max_examples=20)
@given(seed=SEEDS)
def test_float32_and_float64_agree(seed):
    deltas = with_outliers(seed)
    single, double = change("r_tsvm", deltas), change("r_tsvm", [delta.double() for delta in deltas])
    assert error(single, double) < 1e-3 or math.isclose(error(single, double), 0, abs_tol=1e-3)
