import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from direct_rlhf.errors import DivergenceError
from direct_rlhf.recipe.schema import OptimiserSection
from direct_rlhf.train.step import Optimiser, learning_rate


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float32))


def test_schedules_have_their_written_out_values():
    section = OptimiserSection(learning_rate=0.1, warmup=0.2, schedule="linear")
    assert [round(learning_rate(section, step, 10), 6) for step in range(10)] == [
        0.05, 0.1, 0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125,
    ]  # fmt: skip
    cosine = section.model_copy(update={"schedule": "cosine"})
    assert learning_rate(cosine, 6, 10) == pytest.approx(0.05)
    assert learning_rate(cosine, 10, 10) == pytest.approx(0.0)
    assert learning_rate(section.model_copy(update={"schedule": "constant", "warmup": 0.0}), 7, 10) == 0.1


@given(
    total=st.integers(1, 500),
    warmup=st.floats(0, 1),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    data=st.data(),
)
def test_rate_is_positive_and_never_above_its_peak(total, warmup, schedule, data):
    section = OptimiserSection(learning_rate=0.3, warmup=warmup, schedule=schedule)
    rate = learning_rate(section, data.draw(st.integers(0, total - 1)), total)
    assert 0 < rate <= 0.3


def test_step_is_adamw_on_the_clipped_gradient():
    ours, theirs = parameter(1.0, -2.0), parameter(1.0, -2.0)
    section = OptimiserSection(learning_rate=0.1, warmup=0.0, weight_decay=0.01, max_grad_norm=1.0)
    optimiser = Optimiser([ours], section, 10)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=section.betas, weight_decay=0.01)
    for scale in (3.0, 0.1):
        ours.grad = torch.tensor([3.0, 4.0]) * scale
        theirs.grad = torch.tensor([3.0, 4.0]) * min(scale, 1 / 5)
        assert optimiser.step(0.5, where="here") == pytest.approx(5 * scale)
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert ours.grad is None
    assert optimiser.steps == 2


@pytest.mark.promise("N1")
@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (0.5, math.nan), (0.5, -math.inf)])
def test_non_finite_loss_or_gradient_leaves_every_weight_and_moment_as_it_was(loss, gradient):
    first, second = parameter(1.0, 2.0), parameter(3.0)
    optimiser = Optimiser([first, second], OptimiserSection(learning_rate=0.1), 10)
    first.grad, second.grad = torch.tensor([0.1, 0.2]), torch.tensor([0.3])
    optimiser.step(0.1, where="before")
    weights = [first.detach().clone(), second.detach().clone()]
    moments = optimiser.state()["adamw"][0]["exp_avg"].clone()
    first.grad, second.grad = torch.tensor([0.1, gradient]), torch.tensor([0.3])
    with pytest.raises(DivergenceError, match=r"sft, step 2, rows a, b: loss .* gradient norm .* not taken"):
        optimiser.step(loss, where="sft, step 2, rows a, b")
    assert torch.equal(first, weights[0])
    assert torch.equal(second, weights[1])
    assert torch.equal(optimiser.state()["adamw"][0]["exp_avg"], moments)
    assert optimiser.steps == 1
    first.grad, second.grad = torch.tensor([0.1, 0.2]), torch.tensor([0.3])
    assert math.isfinite(optimiser.step(0.1, where="after"))


def test_saved_and_loaded_optimiser_continues_bit_for_bit():
    section = OptimiserSection(learning_rate=0.05, warmup=0.3, schedule="cosine")

    def run(optimiser: Optimiser, steps: range) -> None:
        for step in steps:
            optimiser.parameters[0].grad = torch.sin(torch.arange(5.0) * (step + 1))
            optimiser.step(1.0, where="")

    whole, part = parameter(*range(5)), parameter(*range(5))
    run(Optimiser([whole], section, 9), range(9))
    first = Optimiser([part], section, 9)
    run(first, range(4))
    state = first.state()
    state["adamw"] = {str(place): values for place, values in state["adamw"].items()}  # as JSON would hand it back
    second = Optimiser([part], section, 9)
    second.load_state(state)
    run(second, range(4, 9))
    assert torch.equal(whole, part)
