"""TSV-M: its definition written down literally, its laws, and the three traps."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis.strategies import integers, sampled_from
from torch.testing import assert_close

from direct_rlhf.errors import MergeError
from direct_rlhf.merge.methods import METHODS
from merge.methods.blocks import change, tensors, whole
from merge.test_factorise import low_rank

SEEDS = integers(0, 9999)
SHAPES = sampled_from([(12, 9), (9, 12), (12, 12)])


def literally(deltas):
    """Steps 1 to 5 of the definition, in float64, with nothing added."""
    r = min(deltas[0].shape)
    k = int(r * (1 / len(deltas)))
    us, ss, vs = [], [], []
    for delta in deltas:
        u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
        us.append(u[:, :k])
        ss.append(s[:k])
        vs.append(vt[:k].T)
    u, s, v = torch.cat(us, 1), torch.cat(ss), torch.cat(vs, 1)
    pu, _, qu = torch.linalg.svd(u, full_matrices=False)
    pv, _, qv = torch.linalg.svd(v, full_matrices=False)
    return pu @ qu @ torch.diag(s) @ (pv @ qv).T


def truncated(delta, k):
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    return u[:, :k] * s[:k] @ vt[:k]


def joint_basis_is_well_conditioned(deltas, counts, limit=0.02):
    """Whether no direction of the experts' joint basis is near the cut at rcond 1e-3."""
    each = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = torch.cat([u[:, :k] for (u, _, _), k in zip(each, counts, strict=True)], 1)
    right = torch.cat([vt[:k] for (_, _, vt), k in zip(each, counts, strict=True)])
    return all(float(s[-1] / s[0]) > limit for s in map(torch.linalg.svdvals, (left, right)))


def cuts_are_clear(deltas, counts, share=0.02):
    """Whether no expert's last kept singular value is nearly that of the first direction cut off, which rounding mixes."""
    spectra = [torch.linalg.svdvals(delta.double()) for delta in deltas]
    return all(
        k == len(s) or float(s[k - 1] - s[k]) > share * float(s[0]) for s, k in zip(spectra, counts, strict=True)
    )


@given(seed=SEEDS, shape=SHAPES, count=integers(1, 4))
def test_without_the_fixes_it_is_the_literal_definition(seed, shape, count):
    deltas = tensors(seed, count, shape)
    assume(joint_basis_is_well_conditioned(deltas, [min(shape) // count] * count))
    assert_close(change("tsv_m", deltas, reference="original"), literally(deltas), rtol=0, atol=1e-9)


@pytest.mark.parametrize("svd", ["auto", "exact"])
@given(seed=SEEDS, shape=SHAPES, count=sampled_from([1, 3]))
def test_with_the_fixes_it_is_the_same_where_the_experts_are_full_rank_and_apart(svd, seed, shape, count):
    """And in float32, to 1e-5 of the largest entry: the float64 inside keeps ill-conditioned bases exact."""
    deltas = [delta.float() for delta in tensors(seed, count, shape)]
    counts = [min(shape) // count] * count
    assume(joint_basis_is_well_conditioned([delta.double() for delta in deltas], counts))
    assume(cuts_are_clear(deltas, counts))
    expected = literally(deltas)
    found = change("tsv_m", deltas, svd=svd)
    tolerance = (1e-5 if svd == "auto" else 1e-4) * float(expected.abs().max())
    assert_close(found.double(), expected, rtol=0, atol=tolerance)


@given(seed=SEEDS, shape=SHAPES, count=integers(1, 5))
def test_the_singular_values_are_those_that_were_kept(seed, shape, count):
    deltas = tensors(seed, count, shape)
    r = min(shape)
    each = [torch.linalg.svdvals(delta) for delta in deltas]
    k = r // count
    after = sorted(range(count), key=lambda i: -each[i][k]) if k < r else []
    counts = [k + (i in after[: r % count]) for i in range(count)]
    assert sum(counts) == r
    assume(joint_basis_is_well_conditioned(deltas, counts))
    next_values = sorted((float(s[k]) for s in each), reverse=True) if k < r else [1.0]
    assume(all(a - b > 1e-3 * a for a, b in itertools.pairwise(next_values)))  # who gets one more
    expected = torch.cat([s[:n] for s, n in zip(each, counts, strict=True)]).sort(descending=True).values
    assert_close(torch.linalg.svdvals(change("tsv_m", deltas)), expected, rtol=1e-9, atol=1e-9)
    assert_close(change("tsv_m", deltas).square().sum(), expected.square().sum())


@given(seed=SEEDS)
def test_rotating_all_differences_rotates_the_change(seed):
    deltas = tensors(seed, 3, (12, 9))
    left, right = (torch.linalg.qr(x).Q for x in (tensors(seed + 1, 1, (12, 12))[0], tensors(seed + 2, 1, (9, 9))[0]))
    rotated = change("tsv_m", [left @ delta @ right for delta in deltas])
    assert_close(rotated, left @ change("tsv_m", deltas) @ right, rtol=1e-6, atol=1e-6)


@given(seed=SEEDS)
def test_orthogonal_experts_add_up_truncated(seed):
    u, v = (torch.linalg.qr(x).Q for x in tensors(seed, 2, (12, 12)))
    blocks = [
        u[:, i : i + 6] @ torch.diag(torch.linspace(3, 1, 6, dtype=torch.float64)) @ v[:, i : i + 6].T for i in (0, 6)
    ]
    assert_close(change("tsv_m", blocks), sum(truncated(block, 6) for block in blocks))
    three = [sum(blocks), *blocks]  # k = 4 of each, and they share directions: not orthogonal any more
    assert (change("tsv_m", three) - sum(truncated(block, 4) for block in three)).abs().max() > 0.1


@pytest.mark.promise("M4")
@given(seed=SEEDS, shape=SHAPES)
def test_one_expert_is_that_expert(seed, shape):
    delta = tensors(seed, 1, shape)[0]
    assert_close(change("tsv_m", [delta]), delta)
    assert_close(change("tsv_m", [delta.float()]).double(), delta.float().double(), rtol=0, atol=1e-5)


# Trap 1: directions that the number of experts does not divide


def test_31_directions_of_3_experts_are_all_used_and_the_original_loses_one():
    deltas = tensors(0, 3, (40, 31))
    assert torch.linalg.matrix_rank(change("tsv_m", deltas)) == 31
    assert torch.linalg.matrix_rank(change("tsv_m", deltas, reference="original")) == 30


# Trap 2: shared directions


@given(seed=SEEDS, shape=SHAPES, count=integers(2, 4))
def test_identical_experts_give_the_truncated_difference(seed, shape, count):
    delta = tensors(seed, 1, shape)[0]
    k = min(shape) // count
    found = change("tsv_m", [delta] * count, remainder="floor")
    assert_close(found, truncated(delta, k))


@given(seed=SEEDS, shape=SHAPES)
def test_opposite_experts_give_nothing(seed, shape):
    delta = tensors(seed, 1, shape)[0]
    assert change("tsv_m", [delta, -delta], remainder="floor").abs().max() < 1e-9


def test_the_polar_factor_is_wrong_for_identical_experts():
    delta = tensors(1, 1, (40, 32))[0]
    wrong = change("tsv_m", [delta] * 2, reference="original")
    assert ((wrong - truncated(delta, 16)).norm() / truncated(delta, 16).norm()) > 0.5


@given(seed=SEEDS)
@settings(max_examples=20)
def test_experts_equal_up_to_noise_give_the_truncated_difference_too(seed):
    delta, *noise = tensors(seed, 3, (40, 32))
    noisy = [delta + 1e-6 * x for x in noise]
    found, expected = change("tsv_m", noisy), truncated(delta, 16)
    assume(float(torch.linalg.svdvals(delta)[15] - torch.linalg.svdvals(delta)[16]) > 0.05)
    assert ((found - expected).norm() / expected.norm()) < 1e-4
    tiny = change("tsv_m", noisy, rcond=1e-9)
    assert ((tiny - expected).norm() / expected.norm()) > 0.3


# Trap 3: low rank


@pytest.mark.parametrize("size", [(64, 48), (400, 330)])
def test_null_directions_of_low_rank_experts_do_not_bend_the_real_ones(size):
    deltas = [low_rank(seed, *size, 4, dtype=torch.float64) for seed in (1, 2)]
    only_real = change("tsv_m", deltas)
    found = change("tsv_m", [delta.float() for delta in deltas]).double()
    assert ((found - only_real).norm() / only_real.norm()) < 1e-5
    assert ((literally(deltas) - only_real).norm() / only_real.norm()) > 0.3
    assert int(torch.linalg.matrix_rank(only_real)) == 8


def test_rank_8_stored_in_bfloat16_counts_8_directions_each():
    base = (torch.randn(256, 256, generator=torch.Generator().manual_seed(3)) * 0.02).bfloat16()
    stored = [(base.float() + low_rank(seed, 256, 256, 8, 3e-3)).bfloat16() for seed in (1, 2)]
    for method in ("tsv_m", "r_tsvm"):
        settings = {"weighting": False} if method == "r_tsvm" else {}
        block = whole(base, stored)
        METHODS[method].merge(block, METHODS[method].parameters(**settings), None)
        assert block.notes == {"directions of a": 8, "directions of b": 8}


# Tensors of other shapes


def test_matrices_with_fewer_directions_than_experts_take_the_mean():
    deltas = tensors(4, 3, (2, 9))
    assert_close(change("tsv_m", deltas), sum(deltas) / 3)
    assert not change("tsv_m", deltas, reference="original").any()  # int(2 / 3) = 0 directions


def test_a_stack_of_matrices_is_merged_matrix_by_matrix():
    stacks = tensors(5, 3, (4, 8, 6))
    method = METHODS["tsv_m"]
    parameters = method.parameters(precision="float64")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = method.merge(whole(torch.zeros(4, 8, 6).double(), stacks, name=name), parameters, None)
    for index in range(4):
        assert_close(found[index], change("tsv_m", [stack[index] for stack in stacks]))
    other = method.merge(whole(torch.zeros(4, 8, 6).double(), stacks, name="conv1d.weight"), parameters, None)
    assert_close(other, sum(stacks) / 3)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight", "experts.down_proj_bias"]
)
def test_embeddings_head_and_biases_take_the_mean(name):
    deltas = tensors(6, 2, (8, 6))
    method = METHODS["tsv_m"]
    found = method.merge(
        whole(torch.zeros(8, 6).double(), deltas, name=name), method.parameters(precision="float64"), None
    )
    assert_close(found, sum(deltas) / 2)


def test_weights_scale_the_differences_before_their_decomposition():
    first, second = tensors(7, 2, (8, 6))
    assert_close(change("tsv_m", [first, second], weight=(2.0, -0.5)), change("tsv_m", [2 * first, -0.5 * second]))


def test_a_model_with_values_that_are_not_finite_is_named():
    broken = torch.full((4, 5), torch.nan)
    with pytest.raises(
        MergeError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: a model holds values that are not finite"
    ):
        change("tsv_m", [broken, torch.ones(4, 5)])
