"""The loop that SFT, DPO and reward training share: steps with metrics, held-out checks, checkpoints, resume and stop.

The batch of a step is a pure function of (seed, stage, step), nothing draws from a global random state and dropout is
off, so weights, optimiser and the step number are all that a resume needs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from direct_rlhf import __version__
from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.errors import CheckpointError, DataError, DivergenceError, Interrupted
from direct_rlhf.models import peaks
from direct_rlhf.models.batches import BATCH_TOKENS
from direct_rlhf.models.loading import add_lora, load_for, save_causal_lm
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.sharded import whole_on_cpu
from direct_rlhf.randomness import cycle
from direct_rlhf.recipe.schema import DpoSection, Recipe, RewardSection, SupervisedSection
from direct_rlhf.run.checkpoints import Checkpoint
from direct_rlhf.run.context import StageContext
from direct_rlhf.run.packing import pack, unpack
from direct_rlhf.run.points import point
from direct_rlhf.train.health import fault_alert
from direct_rlhf.train.step import Optimiser

CHECKPOINT_EVERY = 200  # steps
HELD_OUT_CHECKS = 5  # times within a training that the held-out data are looked at, beside its start
HELD_OUT_ITEMS = 512  # of them; the fitness card and the evaluation look at all
SHOWN = ("loss", "accuracy", "held_out_accuracy", "held_out_loss")
TRAINING, CHECKING = "training", "held-out check"  # phases, each with a chunk size of its own

StepsSection = SupervisedSection | DpoSection | RewardSection


@dataclass(frozen=True)
class Task:
    """What one training does; the loop knows nothing else of it."""

    stage: str  # names metrics, checkpoints and the order of the data
    title: str  # shown beside the progress bar
    ids: Sequence[str]  # names of the training items, for messages
    module: nn.Module  # its parameters that require gradients are trained
    lengths: Sequence[int]  # their lengths in tokens
    # The last argument of both is the number of padded slots that one forward pass may hold; it changes no result. Of
    # several processes each computes its share of both, and all return the metrics of the whole.
    accumulate: Callable[[list[int], int], dict[str, float]]  # gradients of the rows' mean loss; metrics with "loss"
    evaluate: Callable[[int], dict[str, float]]  # metrics on held-out data, {} if there are none


@dataclass(frozen=True)
class _Done:
    """What a step that was just done leaves to be written."""

    metrics: dict[str, float]
    alert: dict[str, Any] | None

    def state(self) -> dict[str, Any]:
        texts = {name: repr(value) for name, value in self.metrics.items()}  # the store refuses NaN, these may hold it
        return {"metrics": texts, "alert": self.alert}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "_Done":
        return cls({name: float(text) for name, text in state["metrics"].items()}, state["alert"])


def total_steps(section: StepsSection, items: int) -> int:
    """Optimiser steps for ``epochs`` passes over ``items``: full batches, the last one running into the next pass."""
    steps = max(math.ceil(section.epochs * items / section.batch_size - 1e-9), 1)
    return steps if section.max_steps is None else min(steps, section.max_steps)


def run_steps(ctx: StageContext, task: Task, section: StepsSection) -> int:
    """Train to the end, from the newest checkpoint if there is one; returns the number of steps.

    Before the first step the longest batch is tried. Where memory runs out, batches are cut finer from then on.
    Errors: DataError without training items; DivergenceError on a non-finite loss or gradient, weights as before that
    step; OutOfMemoryError for one item that does not fit; Interrupted, resumable, when asked to stop.
    """
    if not task.ids:
        raise DataError(f"{task.stage}: no training items are left. Look at rejected.jsonl and the limits in data.")
    steps = total_steps(section, len(task.ids))
    named = {name: parameter for name, parameter in task.module.named_parameters() if parameter.requires_grad}
    optimiser = Optimiser(named.values(), section.optimiser, steps)
    alone = ctx.world.size == 1
    chunks = {
        phase: ChunkSize(f"{task.stage}, {phase}", BATCH_TOKENS, ctx.say, fixed=not alone)
        for phase in (TRAINING, CHECKING)
    }
    store = ctx.run.checkpoints(task.stage, keep=1)
    checkpoint = store.latest()
    pending: _Done | None = None  # a step whose held-out check was broken off
    if checkpoint is not None:
        _restore(ctx, checkpoint, named, optimiser, task.stage)
        for phase, size in checkpoint.state["chunks"].items():
            chunks[phase].size = size
        kept = checkpoint.state["pending"]
        pending = None if kept is None else _Done.from_state(kept)
    metrics = ctx.run.metrics(task.stage)
    metrics.rewind(optimiser.steps - (pending is not None) if checkpoint else -1)

    @peaks.phase("save")
    def save(*, later: bool = False) -> None:
        tensors, state = pack(optimiser.state())
        sizes = {phase: chunk.size for phase, chunk in chunks.items()}
        kept = None if pending is None else pending.state()
        store.save(
            optimiser.steps,
            {"model": named, "optimiser": tensors},
            {"optimiser": state, "chunks": sizes, "pending": kept},
            later=later and ctx.recipe.parallel.asynchronous_checkpoints,
        )

    @peaks.phase("train")
    def gradients(rows: list[int]) -> dict[str, float]:
        def attempt(slots: int) -> dict[str, float]:
            optimiser.forget()  # those of an attempt that ran out of memory
            return task.accumulate(rows, slots)

        return chunks[TRAINING].run(attempt)

    @peaks.phase("check")
    def check() -> dict[str, float]:
        return chunks[CHECKING].run(task.evaluate)

    if optimiser.steps < steps:
        gradients(sorted(range(len(task.ids)), key=lambda row: -task.lengths[row])[: section.batch_size])
        optimiser.forget()
    if checkpoint is None:
        metrics.log(0, check())
    with ctx.progress(task.title, total=steps) as bar:
        bar.advance(optimiser.steps)
        while optimiser.steps < steps or pending is not None:
            if pending is None:
                pending = _step(ctx, task, section, optimiser, gradients)
            done = optimiser.steps
            point(f"{task.stage}.step")
            checks = {}
            if _checks_now(done, steps):
                try:
                    checks = check()
                except Interrupted:
                    save()
                    raise
            values, alert, pending = pending.metrics | checks, pending.alert, None
            if alert is not None:
                ctx.run.alert(task.stage, done, alert)
            metrics.log(done, values)
            bar.advance(1, **{name: values[name] for name in SHOWN if name in values})
            store.settle(wait=False)
            stop = ctx.stopping()
            if stop or done % CHECKPOINT_EVERY == 0 or done == steps:
                save(later=not stop and done < steps)
            if stop:
                ctx.stop()
    metrics.close()
    return steps


@peaks.phase("train")
def _step(
    ctx: StageContext,
    task: Task,
    section: StepsSection,
    optimiser: Optimiser,
    gradients: Callable[[list[int]], dict[str, float]],
) -> _Done:
    """One optimiser step on the batch that its number names. A batch with a fault becomes an alert."""
    step = optimiser.steps
    rows = cycle(len(task.ids), step * section.batch_size, section.batch_size, ctx.recipe.seed, task.stage)
    batch = [task.ids[row] for row in rows]
    rate = optimiser.learning_rate
    values = gradients(rows)
    try:
        taken = optimiser.step(values["loss"], where=f"{task.stage}, step {step + 1}, items {', '.join(batch[:8])}")
    except DivergenceError as error:
        ctx.run.alert(task.stage, step + 1, fault_alert("diverged", str(error), batch) | {"last": values})
        raise
    alert = None
    if taken.fault:
        alert = fault_alert(taken.fault, taken.seen, batch)
        ctx.say(f"[{task.stage}] {taken.seen}")
    passes = (step + 1) * section.batch_size / len(task.ids)
    facts = {"grad_norm": taken.norm, "learning_rate": rate, "epoch": passes, "skipped": float(not taken.taken)}
    return _Done(values | facts, alert)


def note_processes(ctx: StageContext, checkpoint: Checkpoint, stage: str) -> None:
    """Says so where a checkpoint comes from another number of processes."""
    if checkpoint.processes != ctx.world.size:
        ctx.say(
            f"[{stage}] goes on with {ctx.world.size} process(es) from a checkpoint of {checkpoint.processes}; the "
            "batches stay as they are"
        )


def load_trainee(recipe: Recipe, device: str, adapter: str) -> Any:
    """The base model ready to be trained: float32 master weights, or a frozen trunk under a fresh LoRA adapter."""
    section = recipe.model
    full = section.tuning == "full"
    model = load_for(section, section.base, dtype="float32" if full else section.dtype, device=device)
    return model.requires_grad_(True) if full else add_lora(model, section.lora, adapter, seed=recipe.seed)


def save_arm(ctx: StageContext, model: Any, dialogue: DialogueFormat, arm: str, what: str) -> Path:
    """Save a trained arm under ``models/ARM`` with its card; ``what`` says in a sentence how it was made."""
    folder: Path = ctx.run.path / "models" / arm
    card = model_card(ctx.recipe, arm, what, dialogue.stop_strings)
    with whole_on_cpu(model, keep=ctx.world.is_main):
        ctx.world.main(
            lambda: save_causal_lm(model, dialogue.tokens, folder, stop_strings=dialogue.stop_strings, card=card)
        )
    return folder


def model_card(recipe: Recipe, arm: str, what: str, stop_strings: Sequence[str]) -> str:
    """README.md of a trained arm: what it is, from what, how it is to be used."""
    stops = ", ".join(f"`{stop!r}`" for stop in stop_strings) or "none"
    return (
        f"# {arm}\n\n{what}\n\n"
        f"- base model: `{recipe.model.base}`, tuning: {recipe.model.tuning}\n"
        f"- recipe: `{recipe.name}`, seed {recipe.seed}, direct-rlhf {__version__}\n"
        f"- an answer ends with EOS or one of these stop strings: {stops}\n\n"
        "It is a plain transformers checkpoint. `generate` reads the stop strings from `generation_config.json` and "
        "needs `tokenizer=` for them.\n"
    )


def _checks_now(step: int, steps: int) -> bool:
    """True HELD_OUT_CHECKS times, evenly spread, the last one at the end."""
    return step * HELD_OUT_CHECKS // steps > (step - 1) * HELD_OUT_CHECKS // steps


def _restore(
    ctx: StageContext, checkpoint: Checkpoint, named: dict[str, nn.Parameter], optimiser: Optimiser, stage: str
) -> None:
    note_processes(ctx, checkpoint, stage)
    tensors = checkpoint.tensors("model", like=named)
    if tensors.keys() != named.keys():
        odd = sorted(tensors.keys() ^ named.keys())[:3]
        raise CheckpointError(f"{stage}: the checkpoint at {checkpoint.path} is of another model: {odd} do not match")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])
    optimiser.load_state(unpack(checkpoint.tensors("optimiser", like=optimiser.like()), checkpoint.state["optimiser"]))
