"""A merge, streamed: inputs mapped, tensors merged by several threads, the result written as they become ready.

Memory, beside what a method itself takes:
* while a tensor can be cut (its method merges elements or rows for themselves, and no adapter is merged into it on the
  fly), each thread holds blocks of BLOCK elements (or of one row, if that is longer): one of the result in float32;
* otherwise the tensors in work at one time have together no more elements than LARGEST_AT_ONCE of the largest, and of
  each the result is held in float32, and so is each model with an adapter on it.
* pages of the inputs, which are mapped, are given back every MOMENT: what is read in that time, about 100 MB.

The result does not depend on shards, threads, blocks or order: every block is computed by one thread for itself.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from direct_rlhf.errors import ConfigError, Interrupted, MergeError
from direct_rlhf.merge.card import write_card
from direct_rlhf.merge.methods import METHODS
from direct_rlhf.merge.plan import Job, MergePlan, ModelTensor, copy_tokenizer, plan_merge, with_weights
from direct_rlhf.merge.threads import Part, at_most, one_thread_each
from direct_rlhf.merge.types import Block, Grain, Method, Survey
from direct_rlhf.merge.weights import DTYPES, Mapped, Output, is_finite
from direct_rlhf.recipe.merge_file import LoadedMerge
from direct_rlhf.run.atomic import full_disk_explained, replacing, sync_folder, write_json
from direct_rlhf.run.context import MakesBars, ProgressBars
from direct_rlhf.run.points import point

BLOCK = 1 << 18  # elements that are merged at once: in float32 they fit a processor's second-level cache
BLOCK_ON_GPU = 1 << 24
PART = 1 << 22  # elements that a thread takes from a tensor that can be cut
LARGEST_AT_ONCE = 2  # tensors of the largest size

Notes = dict[str, dict[str, float]]  # by tensor


@dataclass(frozen=True)
class Execution:
    """How a merge is executed; nothing here changes its result."""

    device: str = "auto"  # where it is computed; auto: a GPU if there is one
    threads: int | None = None  # None: one for each core
    block: int | None = None  # elements that are merged at once; None: BLOCK, or BLOCK_ON_GPU
    should_stop: Callable[[], bool] = lambda: False  # asked between parts of tensors
    progress: MakesBars = field(default_factory=ProgressBars)
    say: Callable[[str], None] = lambda text: None  # is told what a user should know
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)


def merge_models(merge: LoadedMerge, out: Path, *, overwrite: bool = False, how: Execution | None = None) -> Path:
    """Merge models as a file says, into the folder ``out``: `plan_merge`, then `execute`, whose errors it has."""
    return execute(plan_merge(merge, out, overwrite=overwrite), how)


def execute(plan: MergePlan, how: Execution | None = None) -> Path:
    """Do what a plan says; its folder appears when all is written.

    Errors: MergeError, with the tensor, for a result that is not finite; Interrupted, with nothing left, on request;
    DirectRLHFError for a full disk.
    """
    how = how or Execution()
    plan = with_weights(plan, how.say)
    for note in plan.notes:
        how.say(f"Note: {note}")
    run = MergeRun(plan, how)
    with full_disk_explained(plan.out, plan.layout.n_bytes), replacing(plan.out) as temporary:
        notes = run.write_weights(temporary)
        point("merge: weights written")
        copy_tokenizer(plan, temporary)
        write_card(plan, run.method, notes, temporary)
        write_json(temporary / "config.json", plan.config)  # last: without it, nothing takes the folder for a model
        sync_folder(temporary)
        point("merge: folder written")
    return plan.out


class MergeRun:
    """One execution of a plan."""

    def __init__(self, plan: MergePlan, how: Execution) -> None:
        self.plan, self.how = plan, how
        self.method = how.methods[plan.merge.method]
        self.device = _device(how.device)
        self.threads = how.threads or len(os.sched_getaffinity(0))
        self.block = how.block or (BLOCK if self.device == "cpu" else BLOCK_ON_GPU)
        self.keys = tuple(expert.key for expert in plan.merge.experts)
        self.mapped = Mapped()
        self.survey: Survey | None = None
        self.notes: Notes = {}
        self._lock = threading.Lock()

    def write_weights(self, folder: Path) -> Notes:
        """All tensors of the result, with their index; what the method has to say of each."""
        with one_thread_each(), torch.inference_mode():
            self._check_ties()
            if self.method.survey is not None:
                self.survey = self.method.survey(self._passes)
            with Output.create(folder, self.plan.layout) as output:
                self._merge_all(output)
        if self.plan.layout.index is not None:
            write_json(folder / "model.safetensors.index.json", self.plan.layout.index)
        return {name: self.notes[name] for name in sorted(self.notes)}

    def _merge_all(self, output: Output) -> None:
        parts = [part for job in self.plan.jobs for part in self._parts(job)]
        with self.how.progress("merging", total=len(parts)) as bar:
            room = LARGEST_AT_ONCE * self.plan.largest
            for _ in at_most(parts, lambda part: self._do(part, output), self.threads, room, self._meanwhile):
                point("merge: part written")
                bar.advance()

    def _meanwhile(self) -> None:
        self.mapped.let_go()
        if self.how.should_stop():
            raise Interrupted(f"{self.plan.out}: stopped on request, nothing is left of it. Start the merge again.")

    def _parts(self, job: Job) -> Iterator[Part]:
        row = job.shape[-1] if job.shape else 1
        count = job.n_elements
        whole = job.parameters is None or job.is_adapted or self.method.grain(job.parameters) is Grain.TENSOR
        step = max(count, 1) if whole else max(1, PART // max(row, 1)) * max(row, 1)
        for start in range(0, max(count, 1), step):
            end = min(start + step, count)
            yield Part(job, start, end, held=end - start if whole else min(max(self.block, row), end - start))

    def _do(self, part: Part, output: Output) -> None:
        job = part.job
        if job.parameters is None:
            self._copy(job, output)
        else:
            self._merge(part, output)
        if job.tail is not None and part.end == job.n_elements:
            tail = self.mapped.tensor(job.tail.place)
            self._store(job, part.end, tail if tail.dtype == DTYPES[job.stored.dtype] else tail.float(), output)

    def _copy(self, job: Job, output: Output) -> None:
        """What is no weight must be equal everywhere."""
        models = [tensor for tensor in (job.base, *job.experts) if tensor]
        first, *others = (self.mapped.tensor(tensor.place) for tensor in models)
        for tensor, other in zip(models[1:], others, strict=True):
            if not torch.equal(first, other.to(first.dtype)):
                raise MergeError(
                    f"{job.name}: is no weight and so is not merged, but it differs in {tensor.place.file.parent}. "
                    "Models must agree on it."
                )
        output.write(job.name, 0, first)

    def _merge(self, part: Part, output: Output) -> None:
        """All blocks of a part."""
        job, grain = part.job, self.method.grain(part.job.parameters)
        models = [self.mapped.read(tensor) if tensor else None for tensor in (job.base, *job.experts)]
        if grain is Grain.TENSOR:
            shape: tuple[int, ...] = job.shape
            row = step = max(job.n_elements, 1)
        else:
            row = max(job.shape[-1], 1) if job.shape and grain is Grain.ROW else 1
            shape = (-1, row) if grain is Grain.ROW else (-1,)
            step = max(1, self.block // row) * row
            models = [None if model is None else model.reshape(-1) for model in models]
        for start in range(part.start, part.end, step):
            end = min(start + step, part.end)
            pieces = models if grain is Grain.TENSOR else [None if m is None else m[start:end] for m in models]
            base, *experts = (None if p is None else p.reshape(shape).to(self.device) for p in pieces)
            block = Block(job.name, base, tuple(e for e in experts if e is not None), self.keys, job.shape, start)
            self._store(job, start, self.method.merge(block, job.parameters, self.survey), output)
            if block.notes:
                with self._lock:
                    self.notes[job.name] = dict(block.notes)

    def _store(self, job: Job, start: int, merged: Tensor, output: Output) -> None:
        dtype = DTYPES[job.stored.dtype]
        if not is_finite(merged, dtype):
            raise MergeError(self._why_not_finite(job, merged))
        output.write(job.name, start, merged.to(dtype).cpu())

    def _why_not_finite(self, job: Job, merged: Tensor) -> str:
        names = ["base_model", *self.keys]
        for name, tensor in zip(names, (job.base, *job.experts), strict=True):
            if tensor is not None and not is_finite(self.mapped.read(tensor), torch.float32):
                return f"{job.name}: holds NaN or infinity in {name}. That model is damaged: fetch it again."
        if is_finite(merged, torch.float32):
            return (
                f"{job.name}: the result is beyond the range of {DTYPES[job.stored.dtype]}. Store a wider type "
                "(out_dtype: bfloat16 or float32) or merge with smaller weights."
            ).replace("torch.", "")
        return f"{job.name}: the result holds NaN or infinity, though no model does. Merge with smaller weights."

    def _check_ties(self) -> None:
        for ref, head, embeddings in self.plan.ties:
            if not torch.equal(self.mapped.tensor(head), self.mapped.tensor(embeddings)):
                raise MergeError(
                    f"{ref}: its config ties the head to the embeddings (tie_word_embeddings), but its file has "
                    "another head. Set it to false in config.json if that head is meant, else save the model again."
                )

    def _passes(self) -> Iterator[tuple[Block, object]]:
        """Every weight as one block, in order."""
        for job in self.plan.jobs:
            if job.parameters is None:
                continue
            self._meanwhile()
            base, *experts = (self._whole(tensor) for tensor in (job.base, *job.experts))
            yield (
                Block(job.name, base, tuple(e for e in experts if e is not None), self.keys, job.shape),
                job.parameters,
            )

    def _whole(self, tensor: ModelTensor | None) -> Tensor | None:
        return None if tensor is None else self.mapped.read(tensor).to(self.device)


def _device(name: str) -> str:
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device {name}: must be auto, cpu or cuda.")
    if name == "cuda" and not has_gpu:
        raise ConfigError("device cuda: torch finds no GPU here. Use auto or cpu.")
    return name
