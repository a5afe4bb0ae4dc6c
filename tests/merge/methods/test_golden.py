"""The project's golden vectors for the merge methods."""

import pytest
import torch
from torch.testing import assert_close

from direct_rlhf.merge.factorise import spectrum
from direct_rlhf.merge.methods import della, r_tsvm
from direct_rlhf.merge.methods.model_stock import interpolation
from direct_rlhf.recipe.merge_methods import ModelStockParameters, RTsvmParameters
from merge.methods.blocks import GOLDEN, change, merged

A, B = torch.tensor([[2.0, 0], [0, 1]]), torch.full((2, 2), 1.5)
D1 = torch.tensor([[0.1, -0.2, 0.3, -0.1], [0.2, 5, -0.3, 0.1]])
D2 = torch.tensor([[0.3, 0.1, -0.2, 0.2], [-0.1, 0.4, 0.1, -0.3]])


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def golden(request):
    return [tau.to(request.param) for tau in GOLDEN]


def near(actual, expected, atol=1e-6):
    assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def test_task_arithmetic(golden):
    near(change("task_arithmetic", golden), [0.3, 0.21, 0, -0.42, 0.285, 0.03, 0, -0.15])


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_breadcrumbs(scope, golden):
    settings = {"beta": 0.5, "gamma": 0.125, "scale": 1, "scope": scope}
    near(change("breadcrumbs", golden, **settings), [0.1, 0.8, 0, -0.5, 0, 0, 0, -0.5])


def test_ties(golden):
    near(change("ties", golden, density=0.5), [0.7, 0.6, -0.6, -0.6, 0.8, -0.3, 0, -0.8])
    near(change("ties", golden, density=0.5, merge="sum"), [1.4, 0.6, -0.6, -1.2, 0.8, -0.3, 0, -0.8])


def test_della_probabilities():
    by_rank = della.keep_probabilities(8, 0.5, 0.15)
    ranks = GOLDEN[0].abs().argsort().argsort()
    near(by_rank[ranks], [0.65, 0.435714, 0.521429, 0.564286, 0.392857, 0.478571, 0.35, 0.607143])


def test_model_stock():
    products = torch.triu(torch.stack(GOLDEN) @ torch.stack(GOLDEN).T)
    norms = products.diag().sqrt()
    near((products / norms / norms[:, None])[[0, 0, 1], [1, 2, 2]], [0.29137908, -0.25259333, -0.00967842], atol=1e-8)
    ratios = {
        average: interpolation(products, ModelStockParameters(average=average))[1] for average in ("cosine", "angle")
    }
    assert ratios == {"cosine": pytest.approx(0.02855325, abs=1e-8), "angle": pytest.approx(0.03001656, abs=1e-8)}
    assert interpolation(products[:2, :2], ModelStockParameters())[1] == pytest.approx(0.45126808, abs=1e-8)
    near(change("model_stock", GOLDEN), (0.02855325 * torch.stack(GOLDEN).mean(0)).tolist())


def test_consensus(golden):
    near(change("consensus_ta", golden, scale=1), [1, 0, 0, 0, 0, 0.1, 0, 0])


def test_pcb(golden):
    expected = [0.852291, 0.587124, 0, -0.671431, 0.8, 0, 0, -0.8]
    near(change("pcb", golden, density=0.5, scale=1), expected)


def test_slerp():
    ends = torch.tensor([1.0, 0]), torch.tensor([0, 2.0])
    near(merged("slerp", None, ends), [0.707107, 1.414214])
    near(merged("slerp", None, ends, t=0.25), [0.923880, 0.765367])


def test_tsv_m():
    near(change("tsv_m", [A, B]), [[2.146447, 0.353553], [0.353553, 2.853553]])
    assert torch.linalg.svdvals(change("tsv_m", [A, B])).tolist() == pytest.approx([3, 2], abs=1e-6)


def test_iso_c():
    near(change("iso_c", [A, B]), [[3, 0], [0, 3]])


def wudi_loss(merged, experts):
    return sum(((merged - tau) @ tau.T).square().sum() / tau.square().sum() for tau in experts)


def test_wudi():
    exact = change("wudi", [A.double(), B.double()])
    near(exact, [[2.151515, 0.606061], [0.303030, 2.212121]])
    assert wudi_loss(exact, [A.double(), B.double()]).item() == pytest.approx(0.606061, abs=1e-6)
    assert wudi_loss(A + B, [A, B]).item() == pytest.approx(7, abs=1e-6)


def test_r_tsvm_weighting():
    weighings = [r_tsvm.weigh(delta, RTsvmParameters()) for delta in (D1, D2)]
    assert [r_tsvm.robust_scale(delta) for delta in (D1, D2)] == pytest.approx([0.29651594] * 2, abs=1e-8)
    assert [each.outlier_share for each in weighings] == pytest.approx([0.98853302, 0], abs=1e-7)
    assert [each.norm_factor for each in weighings] == pytest.approx([3.49498865, 1], abs=1e-6)
    factors, common = r_tsvm.factors_of(weighings, RTsvmParameters())
    assert common == pytest.approx(7.55792594, abs=1e-5)
    assert factors == pytest.approx([0.02580071, 1.5], abs=1e-7)


@pytest.mark.parametrize(
    ("r", "wanted", "caps", "expected"),
    [
        (30, [5, 10, 15], [30, 30, 30], [5, 10, 15]),
        (30, [5, 10, 15], [2, 30, 30], [2, 11, 17]),
        (30, [5, 10, 15], [4, 4, 4], [4, 4, 4]),
        (31, [7, 7, 7], [31, 31, 31], [11, 10, 10]),
    ],
)
def test_r_tsvm_shares(r, wanted, caps, expected):
    assert r_tsvm.shares(r, wanted, caps) == expected


def test_r_tsvm_ranks():
    found = spectrum(torch.diag(torch.tensor([3.0, 2, 1])))
    assert r_tsvm.effective_rank(found) == pytest.approx(2.29440078, abs=1e-7)
    assert r_tsvm.stable_rank(found) == pytest.approx(1.55555556, abs=1e-7)
