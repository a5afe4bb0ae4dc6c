import json
import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from direct_rlhf.errors import DivergenceError
from direct_rlhf.recipe.schema import OptimiserSection
from direct_rlhf.run.packing import pack, unpack
from direct_rlhf.train.step import GradientSpikes, Optimiser, learning_rate

BAD = [(math.nan, 1.0), (math.inf, 1.0), (0.5, math.nan), (0.5, -math.inf)]  # loss, one component of the gradient


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
        assert optimiser.step(0.5, where="here").norm == pytest.approx(5 * scale)
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert ours.grad is None
    assert optimiser.steps == 2


@pytest.mark.promise("N1")
@pytest.mark.parametrize(("loss", "gradient"), BAD)
def test_non_finite_loss_or_gradient_leaves_every_weight_and_moment_as_it_was(loss, gradient):
    first, second = parameter(1.0, 2.0), parameter(3.0)
    optimiser = Optimiser([first, second], OptimiserSection(learning_rate=0.1), 10)
    first.grad, second.grad = torch.tensor([0.1, 0.2]), torch.tensor([0.3])
    optimiser.step(0.1, where="before")
    weights = [first.detach().clone(), second.detach().clone()]
    state = deepcopy(optimiser.state())
    first.grad, second.grad = torch.tensor([0.1, gradient]), torch.tensor([0.3])
    with pytest.raises(DivergenceError, match=r"sft, step 2, rows a, b: loss .* gradient norm .* not taken"):
        optimiser.step(loss, where="sft, step 2, rows a, b")
    assert torch.equal(first, weights[0])
    assert torch.equal(second, weights[1])
    assert same_state(optimiser.state(), state)
    assert first.grad is None
    assert second.grad is None
    first.grad, second.grad = torch.tensor([0.1, 0.2]), torch.tensor([0.3])
    assert math.isfinite(optimiser.step(0.1, where="after").norm)


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
    second = Optimiser([part], section, 9)
    second.load_state(through_a_file(first.state()))
    run(second, range(4, 9))
    assert torch.equal(whole, part)


def same_state(one, other):
    """Whether two nested states of an optimiser are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def steps(optimiser, norms, loss=1.0):
    """One step for each norm of the gradient; what the steps say."""
    done = []
    for norm in norms:
        optimiser.parameters[0].grad = torch.full_like(optimiser.parameters[0], norm)
        done.append(optimiser.step(loss, where=f"step {optimiser.steps + 1}"))
    return done


def one_weight(**section):
    """An optimiser over a single weight, so that a gradient is its norm."""
    return Optimiser([parameter(0.0)], OptimiserSection(learning_rate=1e-3, **section), 1000)


def through_a_file(state):
    """The state as a checkpoint hands it back."""
    tensors, plain = pack(state)
    return unpack({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(plain)))


@pytest.mark.promise("N1")
@pytest.mark.parametrize(("loss", "gradient"), BAD)
def test_a_skipped_step_changes_no_weight_and_no_moment_and_says_so(loss, gradient):
    weights = parameter(1.0, 2.0)
    optimiser = Optimiser([weights], OptimiserSection(learning_rate=0.1, on_nonfinite="skip"), 10)
    weights.grad = torch.tensor([0.1, 0.2])
    optimiser.step(0.1, where="before")
    kept, moments = weights.detach().clone(), deepcopy(optimiser.state()["adamw"])
    weights.grad = torch.tensor([0.1, gradient])
    found = optimiser.step(loss, where="sft, step 2, items a, b")
    assert (found.taken, found.fault) == (False, "nonfinite_step")
    assert found.seen.startswith("sft, step 2, items a, b: loss ")
    assert torch.equal(weights, kept)
    assert same_state(optimiser.state()["adamw"], moments)
    assert weights.grad is None
    assert optimiser.steps == 2  # the batch is left behind
    assert steps(optimiser, [0.1])[0].taken
    assert not torch.equal(weights, kept)


@pytest.mark.promise("N1")
def test_more_skips_in_a_row_than_allowed_end_the_run_and_a_good_step_starts_the_count_again():
    optimiser = one_weight(on_nonfinite="skip", max_skipped=2)
    bad = math.nan
    assert [step.taken for step in steps(optimiser, [bad, bad, 1.0, bad, bad])] == [False, False, True, False, False]
    before = optimiser.parameters[0].detach().clone()
    with pytest.raises(DivergenceError, match=r"step 6: loss 1, gradient norm nan; .*after 2 steps left out in a row"):
        steps(optimiser, [bad])
    assert torch.equal(optimiser.parameters[0], before)
    assert optimiser.parameters[0].grad is None
    assert optimiser.steps == 5


@pytest.mark.promise("N1")
@pytest.mark.promise("K6")
def test_the_count_of_skips_in_a_row_goes_on_after_a_resume():
    first, second = (one_weight(on_nonfinite="skip", max_skipped=2) for _ in range(2))
    steps(first, [1.0, math.inf, math.inf])
    second.load_state(through_a_file(first.state()))
    with pytest.raises(DivergenceError, match=r"step 4: .*after 2 steps left out in a row"):
        steps(second, [math.inf])


def test_a_skipped_step_spends_its_place_in_the_schedule():
    section = OptimiserSection(learning_rate=0.1, warmup=0.0, schedule="linear", on_nonfinite="skip")
    optimiser = Optimiser([parameter(0.0)], section, 4)
    rates = [optimiser.learning_rate]
    for norm in (1.0, math.nan, 1.0):
        steps(optimiser, [norm])
        rates.append(optimiser.learning_rate)
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


@pytest.mark.promise("N9")
def test_the_limit_of_the_gradient_norm_has_its_written_out_values():
    spikes = GradientSpikes(6.0)
    for _ in range(16):
        spikes.add(1.0)
        spikes.add(3.0)
    assert spikes.limit() == 8.0  # mean 2, standard deviation 1
    spikes.norms = [2.0] * 32
    assert spikes.limit() == pytest.approx(2.6)  # no spread: 5 % of the mean stands in for it
    spikes.norms = [2.0] * 31
    assert spikes.limit() == math.inf
    assert GradientSpikes(None).limit() == math.inf
    spikes.norms = [100.0] * 5 + [1.0, 3.0] * 64
    spikes.add(2.0)  # mean 2 of 127 norms and the new one; the hundreds have left the window
    assert len(spikes.norms) == 128
    assert spikes.limit() == pytest.approx(2 + 1 / 128 + 6 * math.sqrt(127 / 128 - 1 / 128**2), rel=1e-9)


@pytest.mark.promise("N9")
def test_a_norm_beyond_six_sigma_is_reported_with_its_place_and_one_at_the_limit_is_not():
    optimiser = one_weight()
    assert all(not step.fault for step in steps(optimiser, [1.0, 3.0] * 16))
    (at_limit,) = steps(optimiser, [8.0])
    assert (at_limit.norm, at_limit.fault, at_limit.taken) == (8.0, "", True)
    optimiser = one_weight()
    steps(optimiser, [1.0, 3.0] * 16)
    (beyond,) = steps(optimiser, [8.01])
    assert (beyond.fault, beyond.taken) == ("gradient_spike", True)
    assert beyond.seen == "step 33: gradient norm 8.01, expected at most 8 from the steps before"


@pytest.mark.promise("N9")
def test_a_spike_is_stepped_on_or_left_out_as_the_recipe_says():
    for skips in (False, True):
        optimiser = one_weight(skip_spikes=skips)
        steps(optimiser, [1.0, 3.0] * 16)
        before, moments = optimiser.parameters[0].detach().clone(), deepcopy(optimiser.state()["adamw"])
        (spike,) = steps(optimiser, [1e4])
        assert spike.taken != skips
        assert torch.equal(optimiser.parameters[0], before) == skips
        assert same_state(optimiser.state()["adamw"], moments) == skips
        assert optimiser.steps == 33


@pytest.mark.promise("N9")
def test_left_out_spikes_count_towards_the_cap_as_well():
    optimiser = one_weight(skip_spikes=True, max_skipped=2, on_nonfinite="skip")
    steps(optimiser, [1.0, 3.0] * 16)
    assert not any(step.taken for step in steps(optimiser, [1e4, math.nan]))
    with pytest.raises(DivergenceError, match=r"step 35: gradient norm 10000, expected at most .*after 2 steps left"):
        steps(optimiser, [1e4])


@pytest.mark.promise("N9")
def test_fewer_than_32_norms_say_nothing():
    optimiser = one_weight()
    assert all(not step.fault for step in steps(optimiser, [1.0] * 31 + [1e4]))


@pytest.mark.promise("N9")
def test_one_spike_does_not_hide_the_next():
    optimiser = one_weight()
    steps(optimiser, [1.0, 3.0] * 16)
    assert [step.fault for step in steps(optimiser, [1e4, 1.0, 1e4, 1e4, 2.0])] == [
        "gradient_spike", "", "gradient_spike", "gradient_spike", "",
    ]  # fmt: skip


@pytest.mark.promise("N9")
@pytest.mark.parametrize(("level", "later"), [(1.0, 2.0), (1.0, 50.0), (0.0, 1.0)])
def test_a_lasting_change_is_learnt_within_the_window(level, later):
    optimiser = one_weight()
    steps(optimiser, [level] * 40)
    faults = [step.fault for step in steps(optimiser, [later] * 256)]
    assert faults[0] == ("gradient_spike" if level else "")  # norms of 0 are no scale to compare with
    assert not any(faults[128:])


@pytest.mark.promise("N9")
def test_a_lasting_change_is_learnt_even_where_spikes_are_left_out():
    optimiser = one_weight(skip_spikes=True, max_skipped=100)
    steps(optimiser, [1.0] * 40)
    taken = [step.taken for step in steps(optimiser, [50.0] * 100)]
    assert taken == sorted(taken)  # left out at first, then stepped on for good
    assert not taken[0]
    assert taken[-1]


@pytest.mark.promise("N9")
@given(norms=st.lists(st.floats(0.87, 1.13), min_size=1, max_size=60), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_norms_that_differ_by_little_are_never_spikes_whatever_their_unit(norms, scale):
    spikes = GradientSpikes(6.0)
    for norm in norms:
        assert norm * scale <= spikes.limit()
        spikes.add(norm * scale)


@pytest.mark.promise("N9")
@pytest.mark.promise("K6")
@pytest.mark.parametrize("before", [0, 1, 7])
def test_a_batch_scaled_by_ten_thousand_is_seen_also_just_after_a_resume(before):
    norms = [1.0, 1.2, 0.9, 1.1] * 10
    first, second = one_weight(), one_weight()
    steps(first, norms[: 40 - before])
    second.load_state(through_a_file(first.state()))
    steps(second, norms[40 - before :])
    (spike,) = steps(second, [norms[0] * 1e4])
    assert spike.fault == "gradient_spike"
    whole = one_weight()
    assert steps(whole, [*norms, norms[0] * 1e4])[-1] == spike
