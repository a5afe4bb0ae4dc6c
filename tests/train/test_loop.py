import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import make_context, write_checkpoint

from direct_rlhf.errors import CheckpointError, DataError, DivergenceError, Interrupted
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
    """Least squares on ITEMS points, with a record of the rows it was given."""

    def __init__(self, poison_at: int | None = None):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(ITEMS, 3, generator=generator), torch.randn(ITEMS, generator=generator)
        self.module = torch.nn.Linear(3, 1)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.fill_(0.1)
        self.rows, self.rehearsed = [], False
        self.poison_at = poison_at

    def loss(self, rows):
        return (self.module(self.x[rows]).squeeze(-1) - self.y[rows]).square().mean()

    def accumulate(self, rows, slots):
        if not self.rehearsed:  # the longest batch, tried before the first step
            self.rehearsed = True
            self.loss(rows).backward()
            return {"loss": 0.0}
        self.rows.append(rows)
        loss = self.loss(rows) * (float("nan") if len(self.rows) == self.poison_at else 1.0)
        loss.backward()
        return {"loss": float(loss.detach())}

    def evaluate(self, slots):
        with torch.no_grad():
            return {"held_out_loss": float(self.loss(list(range(ITEMS))))}

    def task(self):
        ids = [f"item{i}" for i in range(ITEMS)]
        return Task("fit", "fit", ids, self.module, [3] * ITEMS, self.accumulate, self.evaluate)


def metric_lines(ctx):
    lines = [json.loads(line) for line in (ctx.run.path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


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
    assert torch.equal(weights(resumed), weights(whole))
    assert part.rows + resumed.rows == whole.rows
    assert metric_lines(part_ctx) == metric_lines(whole_ctx)
    one, other = (ctx.run.checkpoints("fit", keep=1).latest() for ctx in (whole_ctx, part_ctx))
    assert one.state == other.state
    for group in ("model", "optimiser"):
        for name, tensor in one.tensors(group).items():
            assert torch.equal(tensor, other.tensors(group)[name]), name


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
    fit = Fit(poison_at=3)
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


def test_checkpoints_come_every_so_many_steps(tmp_path, base, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 3)
    saved = []
    ctx = make_context(tmp_path / "runs", base)
    store = ctx.run.checkpoints("fit", keep=1)
    monkeypatch.setattr(type(store), "save", lambda self, step, tensors, state: saved.append(step))
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
