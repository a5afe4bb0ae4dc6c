"""`direct-rlhf plan`: the memory of each stage, tokens, steps and disk, before anything is loaded or run.

No weights are read: the stages' own code runs on models whose tensors have no storage (`train.forecast`). Local data
are read, because their longest rows decide; for data on the hub the recipe's limits are taken. On a CPU this process
itself, with the same libraries and data in it, is measured and added.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from direct_rlhf.data.rows import locate
from direct_rlhf.data.types import PreferencePair, Prompt
from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.load import LoadedRecipe
from direct_rlhf.recipe.needs import require_inputs
from direct_rlhf.recipe.references import HubReference, resolve_model
from direct_rlhf.recipe.schema import DataSource, HeuristicMixture, Recipe, ScoredMixture, TrainedReward
from direct_rlhf.run.atomic import free_bytes

if TYPE_CHECKING:
    from direct_rlhf.data.tokens import Tokens
    from direct_rlhf.train.forecast import Forecast, Longest

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
KERNELS = 130 * 2**20  # half a megabyte each; 80 to 200 MiB were seen, more in the later phases of a run
TRANSIENT = 1.1  # while a checkpoint is written, the one that it replaces is still there; files have headers


@dataclass(frozen=True)
class Peak:
    """One phase of one stage, in bytes."""

    stage: str
    phase: str
    tensors: int
    process: int  # all that counts against the device: on a CPU with the process itself


@dataclass
class Plan:
    """What a run would need, and what there is."""

    recipe: Recipe
    device: str  # cpu or cuda
    process: int = 0  # bytes of the process itself, CPU only
    kernels: int = 0  # bytes of the kernels that it will make, CPU only
    available: int | None = None  # bytes for this run; None: not known here
    peaks: list[Peak] = field(default_factory=list)
    objectives: list[str] = field(default_factory=list)  # stages that train a mixture's reward models
    forecasts: "list[Forecast]" = field(default_factory=list)
    work: list[tuple[str, str]] = field(default_factory=list)  # tokens and steps, by stage
    disk: dict[str, int] = field(default_factory=dict)  # bytes, by what
    disk_free: int = 0
    assumed: list[str] = field(default_factory=list)

    @property
    def highest(self) -> Peak:
        return max(self.peaks, key=lambda peak: peak.process)

    @property
    def disk_needed(self) -> int:
        return sum(self.disk.values())

    def problems(self) -> list[str]:
        """What cannot fit, each with what to change."""
        found = []
        if self.available is not None and self.peaks and self.highest.process > self.available:
            peak = self.highest
            found.append(
                f"{peak.stage}, {peak.phase}: needs {size(peak.process)} of memory, {size(self.available)} are there "
                f"({self.device}). {self._remedy(peak.phase)}"
            )
        if self.disk_needed > self.disk_free:
            found.append(
                f"disk: {size(self.disk_needed)} needed, {size(self.disk_free)} free. Lower ppo.keep_checkpoints, "
                "choose another --root, or make room."
            )
        return found

    def _remedy(self, phase: str) -> str:
        model = self.recipe.model
        smaller = ["model.tuning=lora"] if model.tuning == "full" else []
        smaller += ["model.quantise=nf4"] if model.tuning == "lora" and model.quantise == "none" else []
        smaller += ["model.dtype=bfloat16"] if model.dtype == "float32" else []
        smaller += ["a smaller ppo.micro_batch_tokens"] if phase in ("update", "score") else []
        smaller += ["a smaller ppo.rollouts"] if phase in ("sample", "evaluate") else []
        smaller += ["shorter rows (data.max_prompt_tokens, ppo.sampling.max_new_tokens)", "a smaller model"]
        return f"Try {', '.join(smaller[:-1])}, or {smaller[-1]}."


def plan(loaded: LoadedRecipe, *, root: Path, memory: int | None = None) -> Plan:
    """Plan every stage of the recipe. ``memory``: bytes of a device that is not here.

    Errors: ConfigError and DataError for what the recipe names and is not there.
    """
    require_inputs(loaded.recipe)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    recipe = loaded.recipe
    made = Plan(recipe, _device(recipe), disk_free=free_bytes(root))
    inputs = _Inputs(loaded, made.assumed)
    if made.device == "cpu":
        made.process = _process(inputs)
        made.kernels = _kernels(recipe)
    made.available = memory if memory is not None else _available(made)
    _forecast(made, inputs)
    _disk(made)
    return made


class _Inputs:
    """Tokenizer, model config and data of a recipe; ``assumed`` gets a line for each thing that is not at hand."""

    def __init__(self, loaded: LoadedRecipe, assumed: list[str]) -> None:
        from direct_rlhf.data.dialogue import DialogueFormat
        from direct_rlhf.data.tokens import load_tokens

        self.recipe, self.folder = loaded.recipe, loaded.folder
        model = self.recipe.model
        self.tokens: Tokens = load_tokens(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code, folder=self.folder
        )
        self.dialogue = DialogueFormat(self.recipe.dialogue, self.tokens)
        self.config = self._config()
        path = self.recipe.data.path
        self.data_folder = Path(path) if path is not None else self.folder
        self.pairs: list[PreferencePair] | None = None  # what is trained on
        self.held_out: list[PreferencePair] = []
        self.objectives: dict[str, list[PreferencePair]] = {}  # stage -> pairs, for a mixture's reward models
        self.prompts: list[Prompt] | None = None
        data = self.recipe.data
        if self._all_here([*data.preferences, *data.prompts]):
            self._read()
            if data.mixture.type != "none" and data.preferences:
                self._mix(assumed)
        else:
            assumed.append(
                "data on the hub were not read: every row is taken to be as long as the recipe allows, and the steps "
                "of reward model, SFT and DPO are not known"
            )

    def longest(self) -> "Longest":
        """The longest rows of the data, or as long as may be."""
        from direct_rlhf.train.forecast import Longest
        from direct_rlhf.train.pairs import EncodedPair, encode_pairs
        from direct_rlhf.train.prompts import encode_prompts

        recipe, data = self.recipe, self.recipe.data
        count = max(recipe.reward.batch_size, recipe.cost.batch_size, recipe.sft.batch_size, recipe.dpo.batch_size)
        fill = [self.tokens.eos_id]
        if self.pairs is None or self.prompts is None:
            pair = PreferencePair("longest", (), "", "", "", "")
            answer = fill * data.max_answer_tokens
            encoded = [EncodedPair(pair, fill * data.max_prompt_tokens, answer, answer)] * count
            return Longest(fill * data.max_prompt_tokens, encoded)
        encoded = encode_pairs([*self.pairs, *chain(*self.objectives.values())], self.dialogue, data)
        prompts = encode_prompts(self.prompts, self.dialogue, data.max_prompt_tokens)
        return Longest(
            max((ids for _, ids in prompts), key=len, default=fill),
            sorted(encoded, key=lambda pair: -pair.length)[:count],
            self._sampled([len(ids) for _, ids in prompts]),
        )

    def training(self, stage: str, section: str) -> list[PreferencePair] | None:
        """The pairs that a stage trains on; None where they are not known."""
        from direct_rlhf.train.pairs import of_kinds

        if stage in self.objectives:
            return self.objectives[stage]
        kinds = getattr(getattr(self.recipe, section), "kinds", [])
        return None if self.pairs is None else of_kinds(self.pairs, kinds, section)

    def _sampled(self, lengths: list[int]) -> list[int]:
        """Of the prompts of each PPO iteration, those with the most tokens."""
        from direct_rlhf.randomness import cycle

        ppo = self.recipe.ppo
        count = ppo.rollouts // ppo.samples_per_prompt
        drawn = (
            cycle(len(lengths), iteration * count, count, self.recipe.seed, "prompts")
            for iteration in range(ppo.iterations if lengths else 0)
        )
        return max(([lengths[row] for row in rows] for rows in drawn), key=sum, default=[])

    def _config(self) -> Any:
        from transformers import AutoConfig

        section = self.recipe.model
        place = resolve_model(section.base, self.folder, revision=section.revision)
        options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
        if isinstance(place, HubReference):
            options["revision"] = place.revision or "main"
        try:
            return AutoConfig.from_pretrained(str(place), **options)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.base = {section.base}: its config.json cannot be had ({str(error).splitlines()[0]}). Check the "
                "name and the connection, or download the model and give its folder."
            ) from error

    def _all_here(self, sources: Sequence[DataSource]) -> bool:
        places = [locate(self.recipe.data, source.path, self.folder) for source in sources]
        return not any(isinstance(place, HubReference) for place in places)

    def _read(self) -> None:
        from direct_rlhf.data.load import fits, fits_prompts, load_preferences, load_prompts

        recipe = self.recipe
        options: dict[str, Any] = {"folder": self.data_folder, "seed": recipe.seed, "dialogue": recipe.dialogue}
        found = load_preferences(recipe.data, **options) if recipe.data.preferences else None
        pairs, held_out = (found.train, found.held_out) if found else ((), ())
        self.pairs, _ = fits(pairs, self.dialogue, recipe.data)
        self.held_out, _ = fits(held_out, self.dialogue, recipe.data)
        self.prompts, _ = fits_prompts(load_prompts(recipe.data, **options).train, self.dialogue, recipe.data)

    def _mix(self, assumed: list[str]) -> None:
        """The mixture's pairs in the place of all; where reward models choose them, as many as it can end with."""
        from direct_rlhf.data.mixture import check_mixture, mix, objective_name, prompts_of

        section, pairs = self.recipe.data.mixture, self.pairs or []
        kinds = check_mixture(section, pairs, self.held_out)
        if isinstance(section, ScoredMixture):
            for kind in kinds:
                for second in (False, True)[: 1 + section.second_seed]:
                    if kind not in section.models:
                        stage = f"{objective_name(kind, second=second)}_model"
                        self.objectives[stage] = [pair for pair in pairs if pair.kind == kind]
            if section.pairs is None:
                assumed.append(
                    "the mixture's pairs are known once they are scored: steps are those of all pairs, at most"
                )
            section = HeuristicMixture(type="heuristic", pairs=section.pairs)
        self.pairs = mix(section, pairs, self.recipe.seed).training
        self.prompts = list(prompts_of(self.pairs))


def _forecast(made: Plan, inputs: _Inputs) -> None:
    """Memory, tokens and steps of each stage, in the order of a run."""
    from direct_rlhf.models.footprint import Heap
    from direct_rlhf.train.forecast import forecast_pairs, forecast_ppo

    recipe, longest = made.recipe, inputs.longest()
    made.objectives = list(inputs.objectives)
    heap = None
    if made.device == "cpu" and Heap.here():
        forecast_pairs(recipe, inputs.config, longest.shortened(), "sft")  # the forecast's own libraries and caches
        heap = Heap()
    known: dict[str, Forecast] = {}
    for stage, section in _stages(made):
        if section not in known:
            known[section] = (
                forecast_pairs(recipe, inputs.config, longest, section, device=made.device, heap=heap)
                if section != "ppo"
                else forecast_ppo(recipe, inputs.config, inputs.tokens, longest, device=made.device, heap=heap)
            )
        found = known[section]
        made.forecasts.append(found)
        for phase, tensors in found.peaks.items():
            process = made.process + made.kernels + found.grown.get(phase, tensors)
            made.peaks.append(Peak(stage, phase, tensors, process))
        made.work += [(stage, text) for text in _work(recipe, section, inputs.training(stage, section), longest)]


def _stages(made: Plan) -> Iterator[tuple[str, str]]:
    """(stage, section of the recipe) of everything that trains."""
    arms, ppo = made.recipe.arms, made.recipe.ppo
    yield from ((stage, "reward") for stage in made.objectives)
    uses_ppo = any(arm.endswith("ppo") for arm in arms)
    if isinstance(ppo.reward, TrainedReward) and uses_ppo:
        yield "reward_model", "reward"
    if ppo.lagrangian.enabled and isinstance(ppo.lagrangian.cost, TrainedReward) and uses_ppo:
        yield "cost_model", "cost"
    if {"sft", "sft_ppo"} & set(arms):
        yield "sft", "sft"
    if "dpo" in arms:
        yield "dpo", "dpo"
    yield from ((arm, "ppo") for arm in ("direct_ppo", "sft_ppo") if arm in arms)


def _work(recipe: Recipe, section: str, pairs: Sequence[PreferencePair] | None, longest: "Longest") -> Iterator[str]:
    from direct_rlhf.train.loop import total_steps

    if section == "ppo":
        ppo = recipe.ppo
        cap = ppo.sampling.max_new_tokens
        steps = ppo.epochs * ppo.rollouts // ppo.minibatch_size
        sampled = ppo.rollouts * cap
        yield (
            f"{ppo.iterations} iterations; each samples up to {sampled:,} tokens ({ppo.rollouts} answers of {cap}) and "
            f"trains {ppo.epochs} times on them in {steps} steps"
        )
        yield (
            f"in all up to {ppo.iterations * sampled:,} tokens sampled, {ppo.iterations * ppo.epochs * sampled:,} "
            f"trained on, {ppo.iterations * steps:,} policy steps"
        )
        return
    settings = getattr(recipe, section)
    if pairs is None:
        known = f"at most {settings.max_steps:,}" if settings.max_steps else "not known"
        yield f"steps: {known} (the number of pairs is not known)"
        return
    if pairs:
        yield f"{total_steps(settings, len(pairs)):,} steps of {settings.batch_size}; {len(pairs):,} training pairs"


def _disk(made: Plan) -> None:
    """Files of a finished run, with what is there for a moment while a checkpoint is replaced."""
    by_stage = dict(zip((stage for stage, _ in _stages(made)), made.forecasts, strict=True))
    lora = made.recipe.model.tuning == "lora"
    models = checkpoints = largest = 0
    for stage, found in by_stage.items():
        trained = [role for role in found.roles if role.gradients]
        own = sum(role.gradients for role in trained)  # as many bytes as the trained weights
        once = own + sum(role.moments for role in trained)
        kept = 1
        if found.stage == "ppo":
            kept = made.recipe.ppo.keep_checkpoints
            checkpoints += trained[0].gradients  # the best policy
        checkpoints += kept * once
        largest = max(largest, once)
        whole = found.roles[0].weights
        if lora and found.stage == "ppo":
            whole += trained[0].gradients  # the adapter lies beside the merged model
        models += own if lora and stage.endswith("_model") else whole
    made.disk = {"checkpoints": checkpoints, "models": models, "while a checkpoint is replaced": largest}


# The machine


def _device(recipe: Recipe) -> str:
    import torch

    if recipe.device != "auto":
        return recipe.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _available(made: Plan) -> int | None:
    """Bytes that a run could have now."""
    import torch

    if made.device == "cuda":
        if torch.cuda.is_available():
            return int(torch.cuda.mem_get_info()[0])
        made.assumed.append("no GPU is here, so whether it fits is not known; give its memory with --memory 80GB")
        return None
    free = None
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        sizes = dict(re.findall(r"(\w+):\s+(\d+) kB", meminfo.read_text(encoding="ascii")))
        if "MemAvailable" in sizes:
            free = int(sizes["MemAvailable"]) * 1024 + made.process  # this process gives its own back
    if free is None:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [file.read_text().strip() for file in LIMITS if file.is_file()]
    return min([free, *(int(limit) for limit in limits if limit.isdigit())])


def _kernels(recipe: Recipe) -> int:
    """Bytes of the kernels for bfloat16 products, which a CPU makes as it meets their sizes."""
    import torch

    from direct_rlhf.precision import arithmetic, makes_kernels

    dtype = arithmetic("cpu", getattr(torch, recipe.model.dtype))
    return KERNELS if makes_kernels("cpu", dtype) else 0


def _process(inputs: _Inputs) -> int:
    """Bytes resident in this process once it holds what a run holds beside its tensors: libraries, kernels, data."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from direct_rlhf.evaluate.contamination import evaluation_texts
    from direct_rlhf.models.forward import token_logprobs
    from direct_rlhf.models.loading import autocast
    from direct_rlhf.models.peaks import resident
    from direct_rlhf.train import dpo, ppo, reward, supervised  # noqa: F401 (their libraries count)

    evaluation_texts(inputs.recipe, inputs.dialogue, inputs.folder)
    small = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(small)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    ids_BL = torch.ones(8, 32, dtype=torch.int64)
    mask_BL = ids_BL.bool()
    target_BL = mask_BL.clone()
    target_BL[:, 0] = False
    with autocast("cpu", inputs.recipe.model.dtype):
        token_logprobs(model, ids_BL, mask_BL, target_BL).logprob_BL.sum().backward()
    optimiser.step()
    return resident()


# Words


def parse_size(text: str) -> int:
    """Bytes of "80GB", "24GiB", "512M". ConfigError for anything else."""
    found = SIZE.fullmatch(text.strip())
    if not found:
        raise ConfigError(f"--memory {text}: give a size such as 80GB or 24GiB")
    number, prefix, binary = found.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** " KMGT".index(prefix.upper() or " "))


def size(n_bytes: float) -> str:
    """Three digits and a unit: 812 MiB, 14.5 GiB."""
    step = min(max(int(math.log(max(n_bytes, 1), 1024)), 2), 4)
    value = n_bytes / 1024**step
    return f"{value:,.{0 if value >= 100 or step == 2 else 1}f} {['', '', 'MiB', 'GiB', 'TiB'][step]}"


def show(made: Plan) -> None:
    """The tables, for a terminal of 80 columns."""
    from rich.console import Console
    from rich.table import Table

    from direct_rlhf.screen import show_pairs

    on_cpu = made.device == "cpu"
    memory = Table(title="Memory at its highest", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("stage", "phase"):
        memory.add_column(column, no_wrap=True)
    for column in ("tensors", "with the process") if on_cpu else ("GPU memory",):
        memory.add_column(column, justify="right", no_wrap=True)
    last = ""
    for peak in made.peaks:
        cells = [peak.stage if peak.stage != last else "", peak.phase, size(peak.tensors)]
        highest = "bold" if made.peaks and peak is made.highest else None
        memory.add_row(*cells, *([size(peak.process)] if on_cpu else []), style=highest)
        last = peak.stage
    roles = Table(title="What the roles hold", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("stage", "role", "weights", "gradients", "AdamW"):
        roles.add_column(column, justify="right" if column in ("weights", "gradients", "AdamW") else "left")
    for (stage, _), found in zip(_stages(made), made.forecasts, strict=True):
        for index, role in enumerate(found.roles):
            held = [size(part) if part else "-" for part in (role.weights, role.gradients, role.moments)]
            roles.add_row(stage if index == 0 else "", role.role, *held)
    out = Console()
    for table in (memory, roles):
        out.print(table)
        out.print()
    rows = list(made.work)
    rows.append(("disk", "; ".join(f"{what} {size(n)}" for what, n in made.disk.items())))
    rows.append(("", f"{size(made.disk_needed)} in all, {size(made.disk_free)} free"))
    if on_cpu:
        rows.append(("process", f"{size(made.process)} of libraries and data, measured in this process"))
        if made.kernels:
            rows.append(("", f"{size(made.kernels)} of bfloat16 kernels, made as their sizes are met"))
    if made.peaks:
        there = size(made.available) if made.available is not None else "not known"
        rows.append((f"memory ({made.device})", f"{size(made.highest.process)} needed, {there} available"))
    rows += [("assumed", text) for text in made.assumed]
    show_pairs("Work, disk and fit", rows)
