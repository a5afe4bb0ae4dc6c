import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats

from direct_rlhf.errors import DivergenceError
from direct_rlhf.maths.kl import AdaptiveKL, FixedKL, clamp_hits, k1, k2, k3


def test_estimators_agree_with_the_exact_kl():
    """Expectations under the policy: k1 and k3 are unbiased, k2 is near; all are 0 at the reference."""
    policy, ref = (torch.tensor(p, dtype=torch.float64) for p in ([0.6, 0.3, 0.1], [0.5, 0.3, 0.2]))
    exact = (policy * (policy / ref).log()).sum()
    means = [(policy * k(policy.log(), ref.log())).sum() for k in (k1, k2, k3)]
    assert means[0].item() == pytest.approx(exact.item(), abs=1e-12)
    assert means[2].item() == pytest.approx(exact.item(), abs=1e-12)
    assert means[1].item() == pytest.approx(exact.item(), rel=0.2)
    assert all(not k(ref, ref).any() for k in (k1, k2, k3))


@given(logp=floats(-60, 0), ref=floats(-60, 0))
def test_estimators_equal_their_formulas(logp, ref):
    x = min(max(logp - ref, -20.0), 20.0)
    found = [
        k(torch.tensor([logp], dtype=torch.float64), torch.tensor([ref], dtype=torch.float64)).item()
        for k in (k1, k2, k3)
    ]
    assert found == pytest.approx([x, x * x / 2, math.exp(-x) - 1 + x], rel=1e-12, abs=1e-12)
    assert found[2] >= 0


def test_log_ratios_beyond_20_nats_are_clamped_and_counted():
    logp, ref = torch.tensor([[0.0, -50.0, -1.0]]), torch.tensor([[-50.0, 0.0, -1.5]])
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    assert k1(logp, ref).tolist() == [[20.0, -20.0, 0.5]]
    assert k3(logp, ref).isfinite().all()
    assert clamp_hits(logp, ref, everywhere).item() == 2
    assert clamp_hits(logp, ref, torch.tensor([[True, False, True]])).item() == 1


@pytest.mark.parametrize("estimator", [k1, k2, k3])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_masked_slots_reach_neither_value_nor_gradient(estimator, junk):
    logp = torch.tensor([[-1.0, junk]], requires_grad=True)
    values = estimator(logp, torch.tensor([[-1.5, junk]]), torch.tensor([[True, False]]))
    values.sum().backward()
    assert values[0, 1] == logp.grad[0, 1] == 0
    assert values.isfinite().all()
    assert logp.grad[0, 0] != 0


def test_the_controller_rises_above_and_falls_below_its_target_within_bounds():
    controller = AdaptiveKL(0.05, target=6.0, horizon=1000)
    assert controller.update(6.0, 100) == controller
    assert controller.update(1e9, 100).coefficient == pytest.approx(0.05 * 1.02)
    assert controller.update(-1e9, 100).coefficient == pytest.approx(0.05 * 0.98)


def test_controllers_are_restored_from_their_state():
    adaptive = AdaptiveKL(0.05, 6.0, 1e4).update(9.0, 64)
    assert AdaptiveKL(**adaptive.state()).update(3.0, 64) == adaptive.update(3.0, 64)
    fixed = FixedKL(0.05)
    assert FixedKL(**fixed.state()).update(99.0, 64) == fixed


def test_impossible_settings_and_non_finite_kl_are_refused():
    with pytest.raises(ValueError, match=r"AdaptiveKL\.target must be positive, got 0"):
        AdaptiveKL(0.1, 0, 1e4)
    with pytest.raises(ValueError, match=r"AdaptiveKL\.horizon must be positive, got -1"):
        AdaptiveKL(0.1, 6, -1)
    with pytest.raises(ValueError, match="KL coefficient must be a finite number"):
        FixedKL(-0.1)
    with pytest.raises(DivergenceError, match="mean sequence KL is nan"):
        AdaptiveKL(0.1, 6, 1e4).update(math.nan, 64)
