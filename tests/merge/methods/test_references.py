"""`reference:` gives what the named code does, here written down from its definition (and not from its text)."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis.strategies import floats, integers, sampled_from
from torch.testing import assert_close

from direct_rlhf.merge.methods.model_stock import interpolation
from direct_rlhf.recipe.merge_methods import PARAMETERS, ModelStockParameters
from merge.methods.blocks import change, tensors
from merge.methods.test_global_scope import merged_in_tensors, model

SEEDS = integers(0, 9999)


def ties_over_the_model(deltas, density, merge):
    """Keep what is at least as large as the (n - int(d n))-th smallest, zeros take the majority, mean or sum."""
    n = deltas.shape[1]
    place = n - int(n * density)
    limit = deltas.abs().sort(dim=1).values[:, place - 1 : place]
    kept = torch.where(deltas.abs() >= limit, deltas, 0)
    sign = kept.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agreeing = torch.where(torch.where(sign > 0, kept > 0, kept < 0), kept, 0)
    count = (agreeing != 0).sum(0).clamp(min=1) if merge == "mean" else 1
    return agreeing.sum(0) / count


@pytest.mark.parametrize(("reference", "merge"), [("original", "mean"), ("fusion_bench", "sum")])
@given(seed=SEEDS, density=floats(0.02, 0.95), coarse=sampled_from([False, True]))
def test_ties_of_the_original_and_of_fusion_bench(reference, merge, seed, density, coarse):
    vectors = model(seed, coarse=coarse)
    parameters = PARAMETERS["ties"](reference=reference, density=density, scale=0.7, precision="float64")
    found = merged_in_tensors("ties", vectors, parameters)
    deltas = torch.stack([x - vectors[0] for x in vectors[1:]])
    assert_close(found, vectors[0] + 0.7 * ties_over_the_model(deltas, density, merge))


def generalised_task_arithmetic(deltas, weights, *, elect, normalise):
    """What mergekit does after sparsifying: + where weighted entries cancel, weighted mean if normalised."""
    weighted = deltas * weights[:, None]
    if elect:
        sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        mask = weighted.sign() == sign
        merged, divisor = (weighted * mask).sum(0), (weights[:, None] * mask).sum(0)
    else:
        merged, divisor = weighted.sum(0), weights.sum()
    return merged / torch.where(divisor == 0, 1, divisor) if normalise else merged


@given(seed=SEEDS, density=floats(0.05, 1), coarse=sampled_from([False, True]))
def test_ties_of_mergekit(seed, density, coarse):
    _, *deltas = model(seed, coarse=coarse)
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    kept = []
    for delta in deltas:
        places = sorted(range(len(delta)), key=lambda i, delta=delta: (-abs(delta[i].item()), i))
        kept.append(torch.zeros_like(delta))
        chosen = places[: int(density * len(delta))]
        kept[-1][chosen] = delta[chosen]
    expected = generalised_task_arithmetic(torch.stack(kept), weights, elect=True, normalise=True)
    found = change("ties", deltas, reference="mergekit", density=density, weight=tuple(weights.tolist()))
    assert_close(found, expected)


def test_mergekits_dare_ties_restores_the_l1_norm_and_sums():
    deltas = tensors(0, 3, (200,))
    dropped = [change("dare_linear", [delta], scale=1.0, reference="mergekit") for delta in deltas]
    for left, delta in zip(dropped, deltas, strict=True):
        assert_close(left.abs().sum(), delta.abs().sum())
    found = change("dare_ties", [deltas[0]], reference="mergekit")
    assert_close(found, dropped[0])


@given(seed=SEEDS, beta=floats(0.1, 1), gamma=sampled_from([0.0, 0.01, 0.1, 0.5]), elect=sampled_from([False, True]))
def test_breadcrumbs_of_mergekit(seed, beta, gamma, elect):
    """Over the whole tensor: of n the int(beta n) after the largest, of which int(gamma n) go or as many as fit."""
    deltas = tensors(seed, 3, (60,))
    assume(int(beta * 60) > 0)
    kept = []
    for delta in deltas:
        rising = delta.abs().argsort()
        keep, top = int(beta * 60), int(gamma * 60)
        bottom = max(0, 60 - keep - top)
        kept.append(torch.zeros_like(delta))
        kept[-1][rising[bottom : bottom + keep]] = delta[rising[bottom : bottom + keep]]
    expected = generalised_task_arithmetic(
        torch.stack(kept), torch.ones(3, dtype=torch.float64), elect=elect, normalise=False
    )
    found = change("breadcrumbs", deltas, reference="mergekit", density=beta, gamma=gamma, elect=elect, scale=1.0)
    assert_close(found, expected)


@given(seed=SEEDS)
def test_model_stock_of_mergekit_and_of_fusion_bench(seed):
    base, *experts = tensors(seed, 4, (20,))
    deltas = [expert - base for expert in experts]
    cosines = [float(x @ y / (x.norm() * y.norm())) for i, x in enumerate(deltas) for y in deltas[i + 1 :]]
    for reference, c in (
        ("mergekit", sum(cosines) / 3),
        ("fusion_bench", math.cos(sum(map(math.acos, cosines)) / 3)),
    ):
        assume(abs(1 + 2 * c) > 0.05)
        expected = 3 * c / (1 + 2 * c) * sum(deltas) / 3
        assert_close(change("model_stock", deltas, reference=reference), expected, rtol=1e-5, atol=1e-5)


def test_model_stock_of_mergekit_leaves_the_base_where_it_has_no_solution():
    products = torch.tensor([[1.0, -0.5, -0.5], [0, 1, -0.5], [0, 0, 1]], dtype=torch.float64)
    assert interpolation(products, ModelStockParameters(reference="mergekit"))[1] == 0


def test_a_setting_that_is_given_wins_over_its_reference():
    parameters = PARAMETERS["ties"](reference="original", scope="tensor")
    assert (parameters.scope, parameters.at_cut) == ("tensor", "all")
