import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import make_context, write_checkpoint

from direct_rlhf.errors import CheckpointError, DataError, DivergenceError, Interrupted, OutOfMemoryError
from direct_rlhf.models.batches import BATCH_TOKENS, by_length
from direct_rlhf.randomness import cycle
from direct_rlhf.recipe.schema import OptimiserSection, SupervisedSection
from direct_rlhf.train import loop
from direct_rlhf.train.loop import Task, load_trainee, run_steps, total_steps

SECTION = SupervisedSection(
    epochs=2.5, batch_size=4, optimiser=OptimiserSection(learning_rate=0.05, warmup=0.2, schedule="cosine")
)
ITEMS = 11
STEPS = 7  # ceil(2.5 * 11 / 4)


class Fit:
    """Least squares on ITEMS points, with a record of the rows it was given.

    ``factors`` scales the loss of a step (from 1); ``done`` steps lie behind a resumed one. ``stop_at_check`` is the
    held-out check (from 0) in which a stop is asked for.
    """

    def __init__(self, factors=None, done=0, stop_at_check=None):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(ITEMS, 3, generator=generator), torch.randn(ITEMS, generator=generator)
        self.module = torch.nn.Linear(3, 1)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.fill_(0.1)
        self.rows, self.rehearsed, self.checks = [], False, 0
        self.factors, self.done, self.stop_at_check = factors or {}, done, stop_at_check

    def loss(self, rows):
        return (self.module(self.x[rows]).squeeze(-1) - self.y[rows]).square().mean()

    def accumulate(self, rows, slots):
        if not self.rehearsed:  # the longest batch, tried before the first step
            self.rehearsed = True
            self.loss(rows).backward()
            return {"loss": 0.0}
        self.rows.append(rows)
        loss = self.loss(rows) * self.factors.get(self.done + len(self.rows), 1.0)
        loss.backward()
        return {"loss": float(loss.detach())}

    def evaluate(self, slots):
        self.checks += 1
        if self.checks - 1 == self.stop_at_check:
            raise Interrupted("stopped on request")
        with torch.no_grad():
            return {"held_out_loss": float(self.loss(list(range(ITEMS))))}

    def task(self):
        ids = [f"item{i}" for i in range(ITEMS)]
        return Task("fit", "fit", ids, self.module, [3] * ITEMS, self.accumulate, self.evaluate)


def json_lines(ctx, name):
    path = ctx.run.path / name
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def metric_lines(ctx):
    return json_lines(ctx, "metrics.jsonl")


def alert_lines(ctx):
    return json_lines(ctx, "alerts.jsonl")


def batch_ids(step, section=SECTION, seed=0):
    """Names of the items of a step (from 1)."""
    return [f"item{row}" for row in cycle(ITEMS, (step - 1) * section.batch_size, section.batch_size, seed, "fit")]


def assert_same_run(one, other):
    """``one`` and ``other`` are (context, fit): the same weights, metrics, alerts and last checkpoint."""
    assert torch.equal(weights(one[1]), weights(other[1]))
    assert metric_lines(one[0]) == metric_lines(other[0])
    assert alert_lines(one[0]) == alert_lines(other[0])
    ours, theirs = (ctx.run.checkpoints("fit", keep=1).latest() for ctx, _ in (one, other))
    assert ours.state == theirs.state
    for group in ("model", "optimiser"):
        for name, tensor in ours.tensors(group).items():
            assert torch.equal(tensor, theirs.tensors(group)[name]), name


def weights(fit):
    return torch.cat([parameter.detach().flatten() for parameter in fit.module.parameters()])


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base")


def test_steps_are_the_epochs_rounded_up_and_capped():
    assert total_steps(SECTION, ITEMS) == STEPS
    assert total_steps(SECTION.model_copy(update={"epochs": 0.01}), ITEMS) == 1
    assert total_steps(SECTION.model_copy(update={"max_steps": 3}), ITEMS) == 3
    assert total_steps(SECTION.model_copy(update={"epochs": 1.0}), 8) == 2


def test_each_pass_sees_every_item_once_in_an_order_of_its_own(tmp_path, base):
    fit = Fit()
    ctx = make_context(tmp_path / "runs", base, seed=3)
    assert run_steps(ctx, fit.task(), SECTION) == STEPS
    seen = [row for rows in fit.rows for row in rows]
    assert seen == cycle(ITEMS, 0, STEPS * 4, 3, "fit")
    assert sorted(seen[:ITEMS]) == sorted(seen[ITEMS : 2 * ITEMS]) == list(range(ITEMS))
    assert seen[:ITEMS] != seen[ITEMS : 2 * ITEMS]


def test_metrics_have_a_line_for_every_step_and_held_out_checks_from_start_to_end(tmp_path, base):
    ctx = make_context(tmp_path / "runs", base)
    run_steps(ctx, Fit().task(), SECTION)
    lines = metric_lines(ctx)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert all({"loss", "grad_norm", "learning_rate", "epoch"} <= line.keys() for line in lines[1:])
    checked = [line["step"] for line in lines if "held_out_loss" in line]
    assert checked[0] == 0
    assert checked[-1] == STEPS
    assert len(checked) == 1 + loop.HELD_OUT_CHECKS
    assert lines[-1]["held_out_loss"] < lines[0]["held_out_loss"]


@pytest.mark.promise("K6")
@settings(max_examples=7, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(k=st.integers(1, STEPS - 1))
def test_n_steps_equal_k_steps_then_a_resume(tmp_path_factory, base, k):
    root = tmp_path_factory.mktemp("resume")
    whole, whole_ctx = Fit(), make_context(root / "whole", base)
    run_steps(whole_ctx, whole.task(), SECTION)

    part, part_ctx = Fit(), make_context(root / "part", base)
    with pytest.raises(Interrupted):
        run_steps(replace(part_ctx, should_stop=lambda: len(part.rows) >= k), part.task(), SECTION)
    assert len(part.rows) == k
    part_ctx.run.metrics("fit").log(k + 1, {"loss": 99.0})  # a line of a step that was lost with the process
    resumed = Fit()
    run_steps(part_ctx, resumed.task(), SECTION)
    assert part.rows + resumed.rows == whole.rows
    assert_same_run((part_ctx, resumed), (whole_ctx, whole))


def test_a_finished_training_resumes_to_itself(tmp_path, base):
    ctx, first, again = make_context(tmp_path / "runs", base), Fit(), Fit()
    run_steps(ctx, first.task(), SECTION)
    lines = metric_lines(ctx)
    assert run_steps(ctx, again.task(), SECTION) == STEPS
    assert again.rows == []
    assert torch.equal(weights(first), weights(again))
    assert metric_lines(ctx) == lines


@pytest.mark.promise("N1")
def test_a_non_finite_loss_names_stage_step_and_items_and_takes_no_step(tmp_path, base):
    fit = Fit({3: float("nan")})
    before = []
    accumulate = fit.accumulate

    def watched(rows, slots):
        before.append(weights(fit).clone())
        return accumulate(rows, slots)

    ctx = make_context(tmp_path / "runs", base)
    task = replace(fit.task(), accumulate=watched)
    with pytest.raises(DivergenceError, match=r"fit, step 3, items item\d+, item\d+.* loss nan"):
        run_steps(ctx, task, SECTION)
    assert torch.equal(weights(fit), before[3])
    assert [line["step"] for line in metric_lines(ctx)] == [0, 1, 2]
    (line,) = alert_lines(ctx)
    assert (line["stage"], line["step"], line["name"]) == ("fit", 3, "diverged")
    assert line["batch"] == batch_ids(3)
    assert line["last"] == {"loss": None}  # not finite
    assert "loss nan" in line["seen"]
    assert line["remedy"].endswith("--resume.")


SKIPPING = SECTION.model_copy(update={"optimiser": SECTION.optimiser.model_copy(update={"on_nonfinite": "skip"})})


@pytest.mark.promise("N1")
def test_a_skipped_step_moves_on_to_the_next_batch_and_leaves_a_line_in_alerts(tmp_path, base, capsys):
    ctx, fit, seen = make_context(tmp_path / "runs", base), Fit({3: float("nan")}), []
    accumulate = fit.accumulate

    def watched(rows, slots):
        seen.append(weights(fit).clone())
        return accumulate(rows, slots)

    run_steps(ctx, replace(fit.task(), accumulate=watched), SKIPPING)
    assert torch.equal(seen[4], seen[3])  # the first call was the rehearsal
    assert not torch.equal(seen[5], seen[4])
    assert [row for rows in fit.rows for row in rows] == cycle(ITEMS, 0, STEPS * 4, 0, "fit")
    lines = metric_lines(ctx)
    assert [line["skipped"] for line in lines[1:]] == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert lines[3]["loss"] is None
    assert set(lines[3]["nonfinite"]) == {"loss", "grad_norm"}
    (line,) = alert_lines(ctx)
    assert (line["stage"], line["step"], line["name"], line["batch"]) == ("fit", 3, "nonfinite_step", batch_ids(3))
    assert line["seen"].startswith("fit, step 3, items item")
    assert "[fit] fit, step 3, items item" in capsys.readouterr().err


@pytest.mark.promise("N1")
@pytest.mark.promise("K6")
@pytest.mark.parametrize("k", range(1, STEPS))
def test_a_run_with_a_skipped_step_equals_itself_under_a_stop_and_a_resume(tmp_path, base, k):
    bad = {3: float("nan")}
    whole, whole_ctx = Fit(bad), make_context(tmp_path / "whole", base)
    run_steps(whole_ctx, whole.task(), SKIPPING)
    part, part_ctx = Fit(bad), make_context(tmp_path / "part", base)
    with pytest.raises(Interrupted):
        run_steps(replace(part_ctx, should_stop=lambda: len(part.rows) >= k), part.task(), SKIPPING)
    resumed = Fit(bad, done=k)
    run_steps(part_ctx, resumed.task(), SKIPPING)
    assert_same_run((part_ctx, resumed), (whole_ctx, whole))


@pytest.mark.promise("K6")
@pytest.mark.promise("S1")
@pytest.mark.parametrize("check", range(loop.HELD_OUT_CHECKS + 1))
def test_a_stop_during_a_held_out_check_keeps_the_step_and_its_alert(tmp_path, base, check):
    at = [0, *(step for step in range(1, STEPS + 1) if loop._checks_now(step, STEPS))][check]
    bad = {at: float("nan")}  # the checked step itself is one that is left out
    whole, whole_ctx = Fit(bad), make_context(tmp_path / "whole", base)
    run_steps(whole_ctx, whole.task(), SKIPPING)
    part, part_ctx = Fit(bad, stop_at_check=check), make_context(tmp_path / "part", base)
    with pytest.raises(Interrupted):
        run_steps(part_ctx, part.task(), SKIPPING)
    assert len(part.rows) == at
    assert [line["step"] for line in metric_lines(part_ctx)] == list(range(at))
    # what a resumed run wrote before it crashed
    part_ctx.run.metrics("fit").log(at, {"loss": 99.0})
    part_ctx.run.alert("fit", at, {"name": "nonfinite_step"})
    resumed = Fit(bad, done=at)
    run_steps(part_ctx, resumed.task(), SKIPPING)
    assert part.rows + resumed.rows == whole.rows
    assert_same_run((part_ctx, resumed), (whole_ctx, whole))


LONG = SupervisedSection(
    epochs=20, batch_size=4, max_steps=40, optimiser=OptimiserSection(learning_rate=1e-4, warmup=0.0)
)


@pytest.mark.promise("N9")
@pytest.mark.parametrize("skips", [False, True])
def test_a_batch_scaled_by_ten_thousand_is_named_in_the_alerts_also_just_after_a_resume(tmp_path, base, skips):
    optimiser = LONG.optimiser.model_copy(update={"skip_spikes": skips})
    section = LONG.model_copy(update={"optimiser": optimiser})
    odd = {36: 1e4}
    whole, whole_ctx = Fit(odd), make_context(tmp_path / "whole", base)
    run_steps(whole_ctx, whole.task(), section)
    part, part_ctx = Fit(odd), make_context(tmp_path / "part", base)
    with pytest.raises(Interrupted):
        run_steps(replace(part_ctx, should_stop=lambda: len(part.rows) >= 35), part.task(), section)
    assert alert_lines(part_ctx) == []
    resumed = Fit(odd, done=35)
    run_steps(part_ctx, resumed.task(), section)
    assert_same_run((part_ctx, resumed), (whole_ctx, whole))
    (line,) = alert_lines(part_ctx)
    assert (line["step"], line["name"], line["batch"]) == (36, "gradient_spike", batch_ids(36, section))
    assert "expected at most" in line["seen"]
    skipped = [row["step"] for row in metric_lines(part_ctx) if row.get("skipped")]
    assert skipped == ([36] if skips else [])


LENGTHS = [5, 1, 9, 2, 7, 11, 3, 4, 8, 6, 10]


class Small(Fit):
    """A Fit in float64 on items of unlike length, whose forward passes hold at most ``memory`` slots."""

    def __init__(self, memory):
        super().__init__()
        self.module.double()
        self.x, self.y = self.x.double(), self.y.double()
        self.memory, self.raised, self.slots, self.checked = memory, [], [], []

    def accumulate(self, rows, slots):
        total = 0.0
        self.slots.append(slots)
        for chunk in by_length(LENGTHS, rows, slots):
            if len(chunk) * max(LENGTHS[row] for row in chunk) > self.memory:
                self.raised.append(slots)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            loss = (self.module(self.x[chunk]).squeeze(-1) - self.y[chunk]).square().sum() / len(rows)
            loss.backward()
            total += float(loss.detach())
        return {"loss": total}

    def evaluate(self, slots):
        self.checked.append(slots)
        return super().evaluate(slots)

    def task(self):
        return replace(super().task(), lengths=LENGTHS)


@pytest.mark.promise("R3")
@pytest.mark.parametrize("memory", [11, 16, 30])
def test_out_of_memory_cuts_batches_finer_and_changes_no_gradient(tmp_path, base, capsys, memory):
    large, large_ctx = Small(10**9), make_context(tmp_path / "large", base)
    run_steps(large_ctx, large.task(), SECTION)
    small, small_ctx = Small(memory), make_context(tmp_path / "small", base)
    run_steps(small_ctx, small.task(), SECTION)
    assert large.raised == []
    assert small.raised == [BATCH_TOKENS >> n for n in range(len(small.raised))]
    assert small.slots[-1] == BATCH_TOKENS >> len(small.raised) <= memory
    torch.testing.assert_close(weights(small), weights(large), atol=1e-10, rtol=0)
    for ours, theirs in zip(metric_lines(small_ctx), metric_lines(large_ctx), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-10)
    said = f"fit, training: out of memory; the chunk is {BATCH_TOKENS // 2} instead of {BATCH_TOKENS}"
    assert said in capsys.readouterr().err


@pytest.mark.promise("R3")
def test_an_attempt_that_ran_out_half_way_leaves_nothing_in_the_gradient(tmp_path, base):
    large, small = Small(10**9), Small(10**9)
    run_steps(make_context(tmp_path / "large", base), large.task(), SECTION)
    broken = []

    def accumulate(rows, slots):
        if len(small.slots) == 3 and not broken:
            broken.append(slots)
            small.loss(rows[:2]).backward()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return small.accumulate(rows, slots)

    run_steps(make_context(tmp_path / "small", base), replace(small.task(), accumulate=accumulate), SECTION)
    assert broken == [BATCH_TOKENS]
    assert small.slots == [BATCH_TOKENS] * 3 + [BATCH_TOKENS // 2] * (STEPS - 2)
    torch.testing.assert_close(weights(small), weights(large), atol=1e-10, rtol=0)


@pytest.mark.promise("R3")
def test_the_smaller_chunk_is_in_the_checkpoint_and_each_phase_has_its_own(tmp_path, base):
    part, ctx = Small(16), make_context(tmp_path / "runs", base)
    with pytest.raises(Interrupted):
        run_steps(replace(ctx, should_stop=lambda: len(part.checked) >= 2), part.task(), SECTION)
    assert part.raised
    assert set(part.checked) == {BATCH_TOKENS}  # the held-out check had memory enough
    resumed = Small(16)
    run_steps(ctx, resumed.task(), SECTION)
    assert resumed.raised == []
    assert set(resumed.slots) == {16}
    assert set(resumed.checked) == {BATCH_TOKENS}


@pytest.mark.promise("R3")
def test_one_item_that_does_not_fit_ends_the_run_before_the_first_step(tmp_path, base):
    small, ctx = Small(10), make_context(tmp_path / "runs", base)  # the longest item has 11 slots
    before = weights(small).clone()
    with pytest.raises(OutOfMemoryError, match=r"fit, training: out of memory even with a chunk of 1 \(CUDA out of"):
        run_steps(ctx, small.task(), SECTION)
    assert torch.equal(weights(small), before)
    assert metric_lines(ctx) == []


@pytest.mark.promise("R5")
def test_a_module_that_fails_at_full_length_is_found_before_any_step_and_metrics_line(tmp_path, base):
    fit, ctx = Small(10**9), make_context(tmp_path / "runs", base)
    tried = []

    def accumulate(rows, slots):
        tried.append(rows)
        if max(LENGTHS[row] for row in rows) == max(LENGTHS):
            raise RuntimeError("the kernel has no room for 11 positions")
        return fit.accumulate(rows, slots)

    first = cycle(ITEMS, 0, SECTION.batch_size, 0, "fit")
    assert LENGTHS.index(max(LENGTHS)) not in first  # without the rehearsal a step would have been taken
    before = weights(fit).clone()
    with pytest.raises(RuntimeError, match="no room for 11 positions"):
        run_steps(ctx, replace(fit.task(), accumulate=accumulate), SECTION)
    assert tried == [[5, 10, 2, 8]]  # the longest four, longest first
    assert torch.equal(weights(fit), before)
    assert metric_lines(ctx) == []
    assert ctx.run.checkpoints("fit", keep=1).latest() is None


@pytest.mark.promise("R5")
def test_the_rehearsal_leaves_no_gradient_behind(tmp_path, base):
    fit, ctx, seen = Small(10**9), make_context(tmp_path / "runs", base), []
    accumulate = fit.accumulate

    def watched(rows, slots):
        seen.append([parameter.grad for parameter in fit.module.parameters()])
        return accumulate(rows, slots)

    run_steps(ctx, replace(fit.task(), accumulate=watched), SECTION)
    assert seen == [[None, None]] * (STEPS + 1)


def test_checkpoints_come_every_so_many_steps(tmp_path, base, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 3)
    saved = []
    ctx = make_context(tmp_path / "runs", base)
    store = ctx.run.checkpoints("fit", keep=1)
    monkeypatch.setattr(type(store), "save", lambda self, step, tensors, state, later: saved.append(step))
    run_steps(ctx, Fit().task(), SECTION)
    assert saved == [3, 6, 7]


def test_no_items_and_another_models_checkpoint_are_refused(tmp_path, base):
    ctx = make_context(tmp_path / "runs", base)
    with pytest.raises(DataError, match=r"fit: no training items are left"):
        run_steps(ctx, replace(Fit().task(), ids=[]), SECTION)
    run_steps(ctx, Fit().task(), SECTION)
    other = replace(Fit().task(), module=torch.nn.Linear(3, 1, bias=False))
    with pytest.raises(CheckpointError, match=r"fit: the checkpoint at .* is of another model"):
        run_steps(ctx, other, SECTION)


def test_a_trainee_is_the_whole_model_or_an_adapter_on_a_frozen_one(tmp_path, base):
    full = load_trainee(
        make_context(tmp_path / "a", base, model={"base": str(base), "dtype": "bfloat16"}).recipe, "cpu", "x"
    )
    assert all(p.requires_grad and p.dtype == torch.float32 for p in full.parameters())
    section = {"base": str(base), "dtype": "bfloat16", "tuning": "lora"}
    lora = load_trainee(make_context(tmp_path / "b", base, model=section).recipe, "cpu", "sft")
    for name, parameter in lora.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
