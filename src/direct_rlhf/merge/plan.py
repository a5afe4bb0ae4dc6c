"""From a merge file to all that is to be done: `plan_merge`. No weight is read, nothing is written. Torch-free."""

import copy
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from direct_rlhf.errors import ConfigError, MergeError
from direct_rlhf.merge import checks
from direct_rlhf.merge.checkpoints import DTYPES, FLOATS, Checkpoint, LowRank, TensorPlace
from direct_rlhf.merge.layout import Layout, Stored, lay_out
from direct_rlhf.merge.sources import Source, fetch_missing, open_sources
from direct_rlhf.merge.vocabularies import Vocabulary
from direct_rlhf.recipe.merge_file import LoadedMerge
from direct_rlhf.recipe.merge_methods import MethodParameters
from direct_rlhf.recipe.merge_settings import depths, layer_of
from direct_rlhf.run.atomic import free_bytes

MARGIN = 64 << 20  # bytes: tokenizer, configs, card


@dataclass(frozen=True)
class ModelTensor:
    """One model's part in a tensor of the result."""

    place: TensorPlace
    low_rank: LowRank | None = None  # added to it, in float32


@dataclass(frozen=True)
class Job:
    """One tensor of the result."""

    name: str
    stored: Stored
    shape: tuple[int, ...]  # of what is merged: with fewer rows than the stored tensor where `tail` has the rest
    base: ModelTensor | None
    experts: tuple[ModelTensor, ...]
    parameters: MethodParameters | None  # None: it is no weight, and must be equal in all models
    tail: ModelTensor | None = None  # rows that only some models have

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter is merged into it on the fly."""
        return any(tensor.low_rank for tensor in (self.base, *self.experts) if tensor)


@dataclass(frozen=True)
class MergePlan:
    """What is merged into what."""

    merge: LoadedMerge
    out: Path
    overwrite: bool  # what is in `out`
    sources: Mapping[str, Source]
    jobs: Sequence[Job]  # in the order of the frame's files
    ties: Sequence[tuple[str, TensorPlace, TensorPlace]]  # model, and two places whose bytes must be equal
    layout: Layout
    config: Mapping[str, Any]  # of the result
    tokenizer: Vocabulary | None
    notes: Sequence[str]  # what a user should know and may overlook

    @cached_property
    def n_input_bytes(self) -> int:
        return sum(t.place.end - t.place.start for job in self.jobs for t in (job.base, *job.experts) if t)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max((job.n_elements for job in self.jobs), default=0)


def plan_merge(merge: LoadedMerge, out: Path, *, overwrite: bool = False) -> MergePlan:
    """All checks, cheapest first.

    Errors: ConfigError if a model cannot be found, the output folder is not free, or parameters do not go together;
    MergeError, with a line for each problem, if the models do not fit together or the disk is too small.
    """
    _check_out(out, overwrite)
    opened = open_sources(merge)
    _check_inputs(out, opened)
    order = dict.fromkeys([merge.frame, *opened])
    sources = [opened[ref] for ref in order]
    _refuse([*checks.config_problems(sources), *checks.vocabulary_problems(sources, merge.file.vocabulary)])
    _check_slices(merge, opened)
    stored = checks.without_tables([source.checkpoint() for source in sources])
    ties = list(checks.tied_heads(stored))
    checkpoints = [c.without({head for other, head, _ in ties if other is c}) for c in stored]
    _refuse(list(checks.tensor_problems(checkpoints, merge.file.vocabulary)))
    by_ref = {checkpoint.ref: checkpoint for checkpoint in checkpoints}
    jobs = list(_jobs(merge, by_ref))
    layout = lay_out([job.stored for job in jobs], merge.shard_bytes)
    _check_disk(out, layout.n_bytes + MARGIN)
    tokenizer = opened[merge.tokenizer_source]
    return MergePlan(
        merge=merge,
        out=out,
        overwrite=overwrite,
        sources=opened,
        jobs=jobs,
        ties=[(c.ref, c.tensors[head], c.tensors[embeddings]) for c, head, embeddings in ties],
        layout=layout,
        config=_config(merge, by_ref, jobs),
        tokenizer=Vocabulary.find(tokenizer.ref, by_ref[tokenizer.ref].tokenizer_folders),
        notes=[*_file_notes(merge), *checks.config_notes(sources), *checks.vocabulary_notes(sources)],
    )


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise MergeError("\n".join(problems))


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise ConfigError(f"{out}: is a file. Name a folder.")
    parent = next(place for place in (out.parent, *out.parent.parents) if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{out}: {parent} cannot be written. Name another folder.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out}: exists already. Name another folder, or replace it with --overwrite.")
    if not (out / "config.json").is_file():
        raise ConfigError(
            f"{out}: holds something that is no model (no config.json), which --overwrite does not replace."
        )


def _check_inputs(out: Path, sources: Mapping[str, Source]) -> None:
    """The result may not take the place of a model it is made from, nor of a folder around one."""
    place = out.resolve()
    for source in sources.values():
        for folder in (source.folder, source.adapter):
            if folder is not None and (folder.resolve() == place or place in folder.resolve().parents):
                raise ConfigError(f"{out}: holds {source.ref}, which is merged. Name another folder.")


def _check_slices(merge: LoadedMerge, sources: Mapping[str, Source]) -> None:
    config = sources[merge.frame].config
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if any(given != (0, layers) for given in merge.layer_ranges):
        raise MergeError(
            f"slices: layer_range must be [0, {layers}] for every source, all their layers: layers are not moved, "
            "repeated or left out."
        )


def _check_disk(out: Path, needed: int) -> None:
    free = free_bytes(out.parent)
    if needed > free:
        raise MergeError(
            f"{out}: the disk has too little room: {needed} bytes needed, {free} free. Make room, name a folder "
            "on another disk, or store a smaller type (out_dtype)."
        )


def _jobs(merge: LoadedMerge, checkpoints: Mapping[str, Checkpoint]) -> Iterator[Job]:
    frame, rows_of = checkpoints[merge.frame], checkpoints[merge.tokenizer_source]
    depth = depths(frame.tensors)
    out_dtype = merge.file.out_dtype or merge.file.dtype
    for name, place in sorted(frame.tensors.items(), key=lambda item: (item[1].file.name, item[1].start)):
        is_weight = place.dtype in FLOATS and not checks.is_table(name, place)
        places = {ref: checkpoint.tensors[name] for ref, checkpoint in checkpoints.items()}
        common = min((p.shape[0] for p in places.values() if p.shape), default=0)
        shape = (common, *place.shape[1:]) if place.shape else ()
        whole = rows_of.tensors[name]
        extra = bool(whole.shape) and whole.shape[0] > common
        dtype = DTYPES[out_dtype] if out_dtype and is_weight else place.dtype

        def part(ref: str, name: str = name, common: int = common) -> ModelTensor:
            place = checkpoints[ref].tensors[name]
            short = place.rows(0, common) if place.shape and place.shape[0] > common else place
            return ModelTensor(short, checkpoints[ref].low_rank.get(name))

        yield Job(
            name=name,
            stored=Stored(name, dtype, whole.shape),
            shape=shape,
            base=part(merge.base) if merge.base else None,
            experts=tuple(part(expert.ref) for expert in merge.experts),
            parameters=_parameters(merge, name, depth[name]) if is_weight else None,
            tail=ModelTensor(whole.rows(common, whole.shape[0])) if extra else None,
        )


def _parameters(merge: LoadedMerge, name: str, depth: float) -> MethodParameters:
    try:
        return merge.parameters(name, depth)
    except ConfigError as error:
        layer = layer_of(name)
        where = name if layer is None else f"{name} (layer {layer})"
        raise ConfigError(f"{merge.name}: {merge.file.merge_method}: for {where}: {error}") from error


def _config(merge: LoadedMerge, checkpoints: Mapping[str, Checkpoint], jobs: Sequence[Job]) -> dict[str, Any]:
    """The frame's config, with the type that most of the result is stored in and the rows of its vocabulary."""
    config = copy.deepcopy(dict(checkpoints[merge.frame].config))
    for key in ("auto_map", "_name_or_path"):  # code that is not copied; a place that is not this one
        config.pop(key, None)
    sizes: Counter[str] = Counter()
    for job in jobs:
        sizes[job.stored.dtype] += job.stored.n_bytes if job.stored.dtype in FLOATS else 0
    if sizes:
        dtype = next(name for name, short in DTYPES.items() if short == sizes.most_common(1)[0][0])
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if any(job.tail or job.stored.shape != job.shape for job in jobs) or merge.tokenizer_source != merge.frame:
        rows = checkpoints[merge.tokenizer_source].config.get("vocab_size")
        if rows is not None and "vocab_size" in config:
            config["vocab_size"] = rows
    return config


def _file_notes(merge: LoadedMerge) -> Iterator[str]:
    fields = merge.parameters_class.model_fields
    if "seed" in merge.file.model_fields_set and "seed" not in fields:
        yield f"seed has no effect: {merge.file.merge_method} draws nothing"
    if merge.file.reference and "reference" not in fields:
        yield f"reference has no effect: {merge.file.merge_method} means the same everywhere"


def with_weights(plan: MergePlan, say: Callable[[str], None]) -> MergePlan:
    """The plan once all weights are here; those that are still at the hub are fetched."""
    return plan_merge(plan.merge, plan.out, overwrite=plan.overwrite) if fetch_missing(plan.sources, say) else plan


def summary(plan: MergePlan) -> list[tuple[str, str]]:
    """What a dry run shows."""
    merge = plan.merge
    dtypes = Counter(job.stored.dtype for job in plan.jobs)
    rows = [
        ("method", merge.file.merge_method),
        *([("base", merge.base)] if merge.base else []),
        *(("model", expert.ref) for expert in merge.experts),
        ("tokenizer", plan.tokenizer.ref if plan.tokenizer else "none"),
        ("tensors", f"{len(plan.jobs)} ({', '.join(f'{count} {dtype}' for dtype, count in dtypes.items())})"),
        ("parameters", f"{plan.layout.n_parameters:,}"),
        ("read", f"{plan.n_input_bytes / 1e6:,.0f} MB"),
        ("written", f"{plan.layout.n_bytes / 1e6:,.0f} MB in {len(plan.layout.shards)} files to {plan.out}"),
    ]
    return rows + [("note", note) for note in plan.notes]


def copy_tokenizer(plan: MergePlan, folder: Path) -> None:
    """Tokenizer and generation config, as their model has them."""
    if plan.tokenizer is not None:
        for file in plan.tokenizer.files:
            shutil.copyfile(file, folder / file.name)
    generation = plan.sources[plan.merge.tokenizer_source].folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
