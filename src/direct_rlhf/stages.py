"""The order of the stages, and what makes a stage done.

    data -> reward_model -> fitness -> sft, dpo -> direct_ppo, sft_ppo -> evaluation -> report

PPO-Lagrangian has a cost_model and its cost_fitness after those of the reward. With a data mixture (`data.mixture`) the
stages train on the pairs that `mixture` chose, after `data`; a mixture by reward models has its `objectives` before it.

`data` runs every time: it reads all sources, counts and lists what is not used, and fixes their fingerprints. A later
stage is done when its record in the run directory carries the fingerprint of all that it depends on: its own recipe
sections, the data, and the stages before it. Rooms are imported inside the functions that need them, so that a verb
loads only what it runs.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from direct_rlhf.attempt import attempt, device_of, processes, run_directory
from direct_rlhf.errors import ConfigError, DirectRLHFError
from direct_rlhf.recipe.load import LoadedRecipe
from direct_rlhf.recipe.needs import require_libraries
from direct_rlhf.recipe.references import resolve_model, resolve_reference, test_data_folder
from direct_rlhf.recipe.schema import ModelReward, Recipe, ScoredMixture, TrainedReward
from direct_rlhf.run.context import NoBars, ProgressBars, StageContext
from direct_rlhf.run.directory import RunDirectory
from direct_rlhf.run.signals import StopFlag
from direct_rlhf.run.world import World, launched

if TYPE_CHECKING:
    from direct_rlhf.data.dialogue import DialogueFormat
    from direct_rlhf.data.tokens import Tokens
    from direct_rlhf.data.types import PreferenceData, PreferencePair, PromptData, RejectedRow
    from direct_rlhf.evaluate.probe import CapabilityProbe
    from direct_rlhf.recipe.schema import RewardSection, RewardSource
    from direct_rlhf.train.mixture import Objective

STAGES = (
    *("objectives", "mixture"),
    *("reward_model", "fitness", "cost_model", "cost_fitness", "sft", "dpo", "direct_ppo", "sft_ppo"),
    *("evaluation", "report"),
)
THREE_H_STAGES = ("train", "merge", "evaluation", "report")


def run(loaded: LoadedRecipe, *, root: Path, resume: bool, overwrite: bool, only: str | None = None) -> Path:
    """Every stage of the recipe that is not done yet (or the one stage ``only``); returns the run directory.

    Raises ConfigError for an unknown stage or an occupied directory, Interrupted (exit code 75, resumable) on a signal:
    after one with all work kept, after a second one with what the last checkpoint holds.
    """
    three_h = loaded.recipe.three_h is not None
    stages = THREE_H_STAGES if three_h else STAGES
    if only is not None and only not in stages:
        raise ConfigError(f"--only {only}: no such stage; choose one of {', '.join(stages)}")
    require_libraries(loaded.recipe)
    me = launched()
    if three_h and me.size > 1:
        raise ConfigError("a three_h study runs in one process: start it without --nproc or torchrun")
    with StopFlag(launched=me.size > 1, quiet=not me.is_main) as stop, processes(me, loaded.recipe, stop) as world:
        directory = run_directory(root, loaded, world, resume=resume, overwrite=overwrite)
        with attempt(directory, stop):
            if three_h:
                from direct_rlhf.study.three_h import ThreeH

                ThreeH(loaded, directory, stop).run(only)
            else:
                Study(loaded, directory, stop).run(only)
    return directory.path


def evaluate_models(
    models: Sequence[str],
    loaded: LoadedRecipe,
    *,
    root: Path,
    suites: Sequence[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """The recipe's evaluation of any models; the first one is what the others are compared with.

    Beside the report each model gets a page of its results, evaluation/NAME/README.md, fit for its model card.
    """
    from direct_rlhf.report.card import results_page
    from direct_rlhf.run.atomic import write_atomic

    if launched().size > 1:
        raise ConfigError("evaluate measures in one process: start it without torchrun")
    evaluation = loaded.recipe.evaluation
    if suites:
        evaluation = evaluation.model_validate(evaluation.model_dump() | {"suites": list(suites)})
    names = _names(models)
    measured = loaded.recipe.model.model_copy(update={"base": models[0]})  # what the report calls the base
    recipe = loaded.recipe.model_copy(
        update={"evaluation": evaluation, "name": f"evaluation-{names[0]}", "model": measured}
    )
    with StopFlag() as stop:
        directory = RunDirectory.open(root, loaded.with_recipe(recipe), resume=resume, overwrite=overwrite)
        with attempt(directory, stop):
            study = Study(loaded.with_recipe(recipe), directory, stop)
            study.check_judge()
            study.evaluate({name: str(resolve_model(model)) for name, model in zip(names, models, strict=True)})
            study.report()
            for name in names:
                page = results_page(directory.path, name)
                write_atomic(directory.path / "evaluation" / name / "README.md", page)
    return directory.path


def report(runs: Sequence[Path], out: Path | None = None, *, redact_samples: bool = False) -> Path:
    """The HTML report of one run, or the comparison of several; ``redact_samples`` leaves all model text out."""
    from direct_rlhf.report.html import write_report
    from direct_rlhf.report.results import write_results

    for path in runs:
        write_results(path)
    return write_report(runs, out, redact_samples=redact_samples)


def _names(models: Sequence[str]) -> list[str]:
    """Short distinct names for model references: the last part of each, numbered where two are equal."""
    names: list[str] = []
    for model in models:
        stem = model.rstrip("/").rsplit("/", 1)[-1].replace(":", "-") or "model"
        names.append(stem if stem not in names else f"{stem}-{len(names) + 1}")
    return names


def _kept(found: Any, fit: Callable[[Any], tuple[list[Any], list["RejectedRow"]]]) -> Any:
    """``found`` without the rows that do not fit; its counts and its list of rejected rows say so."""
    train, dropped_train = fit(found.train)
    held_out, dropped_held_out = fit(found.held_out)
    dropped = list({row.source: row for row in [*dropped_train, *dropped_held_out]}.values())
    reasons = Counter(row.reason for row in dropped)
    counts = Counter(found.counts) + reasons
    counts["kept"] -= len(dropped)
    return replace(
        found,
        train=tuple(train),
        held_out=tuple(held_out),
        rejected=(*found.rejected, *dropped),
        counts=dict(counts),
    )


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=lambda section: section.model_dump(mode="json"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Study:
    """One run of a recipe: its inputs, loaded when first needed, and its stages."""

    loaded: LoadedRecipe
    directory: RunDirectory
    stop: StopFlag
    fingerprints: dict[str, str] = field(default_factory=dict)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe with a base folder that was given relative to it made absolute."""
        recipe = self.loaded.recipe
        place = resolve_model(recipe.model.base, self.loaded.folder, revision=recipe.model.revision)
        if not isinstance(place, Path) or recipe.model.base.startswith("world:"):
            return recipe
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(place.absolute())})})

    def run(self, only: str | None) -> None:
        training = self._training()
        wanted = [*training, ("evaluation", lambda: self.evaluate(self.models())), ("report", self.report)]
        if training:
            self.data()
            wanted = [*self._mixing(), *wanted]
        if only is not None:
            wanted = [(name, stage) for name, stage in wanted if name == only]
            if not wanted:
                arms = ", ".join(self.recipe.arms)
                raise ConfigError(f"--only {only}: this recipe's arms ({arms}) do not need that stage")
        if any(name == "evaluation" for name, _ in wanted):
            self.check_judge()
        self.check_sampler([name for name, _ in wanted])
        for _, stage in wanted:
            stage()

    def train(self, only: Sequence[str] | None = None) -> None:
        """The stages that make models, or those of them that ``only`` names."""
        self.data()
        for name, stage in [*self._mixing(), *self._training()]:
            if only is None or name in only:
                stage()

    def _training(self) -> list[tuple[str, Callable[[], Any]]]:
        arms = self.recipe.arms
        wanted: list[tuple[str, Callable[[], Any]]] = []
        if isinstance(self.recipe.ppo.reward, TrainedReward) and {"direct_ppo", "sft_ppo"} & set(arms):
            wanted += [("reward_model", self.reward_model), ("fitness", self.fitness)]
        if self._trains_costs and {"direct_ppo", "sft_ppo"} & set(arms):
            wanted += [("cost_model", self.cost_model), ("cost_fitness", self.cost_fitness)]
        if {"sft", "sft_ppo"} & set(arms):
            wanted.append(("sft", self.sft))
        return [*wanted, *((arm, getattr(self, arm)) for arm in ("dpo", "direct_ppo", "sft_ppo") if arm in arms)]

    @property
    def world(self) -> World:
        return self.directory.world

    # The stages, in order

    def data(self) -> None:
        self.world.main(self._data)

    def _data(self) -> None:
        from direct_rlhf.data.load import fingerprints, write_rejected
        from direct_rlhf.evaluate.contamination import evaluation_texts, write_overlap

        start = time.monotonic()
        self.directory.check_sources(fingerprints(self.recipe.data, self.data_folder))
        facts: dict[str, Any] = {}
        rejected: list[RejectedRow] = []
        inputs: list[tuple[str, PreferenceData | PromptData]] = [("prompts", self.prompts)]
        if self.recipe.data.preferences:
            inputs.insert(0, ("preferences", self.preferences))
        for name, found in inputs:
            split = {"train": len(found.train), "held_out": len(found.held_out)}
            facts[name] = {**found.counts, **split, "formats": dict(found.formats)}
            if name == "preferences" or self.recipe.data.prompts:
                rejected += found.rejected
        write_rejected(self.directory.path / "rejected.jsonl", rejected)
        read = sum(fact["read"] for name, fact in facts.items() if name == "preferences" or self.recipe.data.prompts)
        asked = evaluation_texts(self.recipe, self.dialogue, self.loaded.folder)
        rows = [row for _, found in inputs for row in found.train]
        overlap = write_overlap(self.directory.path, rows, asked)
        facts["overlap"] = overlap
        self.directory.finish_stage("data", self.sources, time.monotonic() - start, facts)
        self.context.say(
            f"data: {read} rows read, {len(rejected)} not used (each with its reason in rejected.jsonl)"
            + "".join(f"; {n} {reason}" for reason, n in sorted(Counter(row.reason for row in rejected).items()))
        )
        if overlap["rows"]:
            self.context.say(
                f"data: what {overlap['items']} of {overlap['compared']} evaluation items ask stands in "
                f"{overlap['rows']} training rows too (overlap.jsonl), so their results show less"
            )

    def objectives(self) -> "list[Objective]":
        """A reward model for each kind of pair, given or trained here, each with its fitness card."""
        from direct_rlhf.data.mixture import check_mixture

        section = self.recipe.data.mixture
        if not isinstance(section, ScoredMixture):
            return []
        kinds = check_mixture(section, self.preferences.train, self.preferences.held_out)
        return [self._objective(section, kind) for kind in kinds]

    def mixture(self) -> None:
        """Chooses the training pairs; by the margins of the objectives' models where the mixture needs them."""
        from direct_rlhf.data.mixture import objective_name
        from direct_rlhf.train.mixture import make_mixture

        recipe, objectives = self.recipe, self.objectives()
        names = [objective_name(one.kind) for one in objectives]
        names += [objective_name(one.kind, second=True) for one in objectives if one.second]
        fingerprint = _digest(
            *(recipe.seed, recipe.model, recipe.dialogue, recipe.data, recipe.ppo.sampling, self.sources),
            *(self._after(f"{name}_model") for name in names),
        )
        self._stage(
            "mixture",
            fingerprint,
            lambda: make_mixture(self.context, self.preferences, objectives, tokens=self.tokens, key=fingerprint),
            alone=True,
        )

    def _mixing(self) -> list[tuple[str, Callable[[], Any]]]:
        """The stages of the recipe's mixture, if it has one."""
        mixture = self.recipe.data.mixture
        chosen = [("mixture", self.mixture)] if mixture.type != "none" else []
        return [("objectives", self.objectives), *chosen] if isinstance(mixture, ScoredMixture) else chosen

    def _objective(self, section: ScoredMixture, kind: str) -> "Objective":
        from direct_rlhf.data.mixture import objective_name
        from direct_rlhf.train.mixture import Objective

        recipe, name = self.recipe, objective_name(kind)
        training = recipe.reward.model_copy(update={"kinds": [kind]})
        held_out = tuple(pair for pair in self.preferences.held_out if pair.kind == kind)
        data = replace(self.preferences, held_out=held_out)  # normalised on the prompts of all kinds
        given, second = kind in section.models, None
        if given:
            folder = self._given_model(section.models[kind], f"data.mixture.models.{kind}")
            parts = [folder / "reward.json", folder / "head.safetensors"]
            hashes = [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts if part.is_file()]
            self.fingerprints[f"{name}_model"] = _digest(str(folder.absolute()), *hashes)
        else:
            folder = self._train_reward_model(name, training, data)
            if section.second_seed:
                again, seed = objective_name(kind, second=True), (recipe.seed + 1) % 2**32
                second = self._train_reward_model(again, training, data, seed=seed)
        self._check_fitness(name, f"{name}_fitness", folder, training, held_out)
        return Objective(kind, folder, given, second)

    def reward_model(self) -> None:
        self._train_reward_model("reward", self.recipe.reward, self.training, mixed=self._mixed)

    def fitness(self) -> None:
        self._check_fitness("reward", "fitness", self.reward_folder, self.recipe.reward, self.preferences.held_out)

    def cost_model(self) -> None:
        self._train_reward_model("cost", self.recipe.cost, self.training, mixed=self._mixed)

    def cost_fitness(self) -> None:
        self._check_fitness("cost", "cost_fitness", self.cost_folder, self.recipe.cost, self.preferences.held_out)

    def _train_reward_model(
        self,
        which: str,
        section: "RewardSection",
        data: "PreferenceData",
        *,
        mixed: Sequence[str] = (),
        seed: int | None = None,
    ) -> Path:
        """The model in the folder ``WHICH_model``; ``seed`` is another one than the recipe's."""
        from direct_rlhf.train.reward import train_reward_model

        recipe = self.recipe
        seed = recipe.seed if seed is None else seed
        parts = (recipe.model, recipe.dialogue, recipe.data, section, recipe.ppo.sampling, self.sources, *mixed)

        def train() -> None:
            context = replace(self.context, recipe=self.context.recipe.model_copy(update={"seed": seed}))
            train_reward_model(context, data, tokens=self.tokens, which=which, section=section)

        self._stage(f"{which}_model", _digest(seed, *parts), train)
        return self.directory.path / f"{which}_model"

    def _check_fitness(
        self, which: str, name: str, folder: Path, section: "RewardSection", held_out: "Sequence[PreferencePair]"
    ) -> None:
        from direct_rlhf.train.fitness import check_reward_model

        self._stage(
            name,
            _digest(self._after(f"{which}_model"), section.fitness),
            lambda: check_reward_model(self.context, folder, held_out, which=which, section=section),
            phase="check",
            alone=True,
        )

    def sft(self) -> None:
        from direct_rlhf.train.supervised import train_sft

        recipe, data = self.recipe, self.training
        fingerprint = _digest(
            recipe.seed, recipe.model, recipe.dialogue, recipe.data, recipe.sft, self.sources, *self._mixed
        )
        self._stage("sft", fingerprint, lambda: train_sft(self.context, data, tokens=self.tokens))

    def dpo(self) -> None:
        from direct_rlhf.train.dpo import train_dpo

        recipe, data = self.recipe, self.training
        fingerprint = _digest(
            recipe.seed, recipe.model, recipe.dialogue, recipe.data, recipe.dpo, self.sources, *self._mixed
        )
        self._stage("dpo", fingerprint, lambda: train_dpo(self.context, data, tokens=self.tokens))

    def direct_ppo(self) -> None:
        self._ppo("direct_ppo", self.base)

    def sft_ppo(self) -> None:
        self._ppo("sft_ppo", str(self._made("sft")))

    def _ppo(self, arm: str, init: str) -> None:
        from direct_rlhf.data.load import load_texts
        from direct_rlhf.train.ppo import Inputs, train_ppo
        from direct_rlhf.train.start import Sources

        recipe, prompts = self.recipe, self.asked
        fingerprint = _digest(
            recipe.seed,
            recipe.model,
            recipe.dialogue,
            recipe.data,
            recipe.ppo,
            self.sources,
            self._after("reward_model") if isinstance(recipe.ppo.reward, TrainedReward) else "",
            self._after("sft") if arm == "sft_ppo" else "",
            self._after("cost_model") if self._trains_costs else "",
            recipe.evaluation.general if recipe.ppo.guard.action != "off" else "",
            *self._mixed,
            *([recipe.rollout.engine, recipe.rollout.correction] if recipe.rollout.engine != "native" else []),
        )

        def train() -> None:
            texts = load_texts(recipe.data, folder=self.data_folder) if recipe.ppo.ptx.weight else []
            sources = Sources(self.reward_folder, self.loaded.folder, self.cost_folder)
            train_ppo(self.context, prompts, Inputs(arm, init, self.tokens, sources, texts, self._probe()))

        self._stage(arm, fingerprint, train)

    def _probe(self) -> "CapabilityProbe | None":
        """What PPO's capability guard looks with."""
        from direct_rlhf.evaluate.probe import CapabilityProbe

        recipe = self.recipe
        if recipe.ppo.guard.action == "off":
            return None
        general = recipe.evaluation.general
        return CapabilityProbe(
            self.tokens,
            general.model_copy(update={"tasks": recipe.ppo.guard.tasks or general.tasks}),
            items=recipe.ppo.guard.items,
            seed=recipe.seed,
            batch_size=recipe.evaluation.batch_size,
            folder=self.loaded.folder,
            data=test_data_folder(recipe.evaluation.data, self.loaded.folder),
            report=self.context.say,
        )

    def check_judge(self) -> None:
        """What is wrong with a judge or its files is said before anything is trained or loaded."""
        from direct_rlhf.evaluate.judging import Judging

        if "conversation" in self.recipe.evaluation.suites:
            self.world.main(lambda: Judging(self.context, self.loaded.folder).check())

    def check_sampler(self, stages: Sequence[str]) -> None:
        """A vLLM server that PPO will ask is reached before anything is trained, where ``stages`` still need it."""
        section = self.recipe.rollout
        asked = [name for name in stages if name.endswith("ppo") and self.directory.stage_record(name) is None]
        if section.engine != "vllm" or section.vllm.mode != "server" or not asked:
            return
        from direct_rlhf.rollout.vllm_server import Server

        server, least = Server(section.vllm), self.recipe.ppo.sampling.max_new_tokens + 1  # prompts are known later
        self.world.main(lambda: server.connect(least, self.stop))

    def evaluate(self, models: dict[str, str], *, compared: bool = True) -> None:
        """Measures the models, by name; ``compared``: any two of them too."""
        from direct_rlhf.evaluate.suite import compare, evaluate_arm

        evaluation = self.recipe.evaluation
        for name, model in models.items():
            fingerprint = _digest(self.recipe.seed, self.recipe.dialogue, evaluation, model, self._after(name))
            self._stage(
                f"evaluation-{name}",
                fingerprint,
                partial(evaluate_arm, self.context, name, model, folder=self.loaded.folder),
                phase="evaluate",
                alone=True,
            )
        if compared and len(models) > 1:
            self.world.main(
                lambda: compare(self.context, list(models), against=next(iter(models)), folder=self.loaded.folder)
            )

    def report(self) -> None:
        self.world.main(self._report)

    def _report(self) -> None:
        from direct_rlhf.report.card import model_card
        from direct_rlhf.run.atomic import write_atomic

        start = time.monotonic()
        for arm in self.recipe.arms:
            folder = self.directory.path / "models" / arm
            if folder.is_dir():
                write_atomic(folder / "README.md", model_card(self.directory.path, arm))
        report([self.directory.path])
        self.directory.finish_stage("report", "", time.monotonic() - start, {})

    # What the stages are given

    @cached_property
    def context(self) -> StageContext:
        import torch

        from direct_rlhf.precision import settled

        recipe = self.recipe
        world, device = self.world, device_of(recipe)
        torch.set_num_threads(recipe.threads or max(len(os.sched_getaffinity(0)) // world.local_size, 1))
        bars = ProgressBars() if world.is_main else NoBars()
        context = StageContext(settled(recipe, device), self.directory, device, self.stop, bars, world)
        if context.recipe.model.dtype != recipe.model.dtype:
            context.say("This processor has no bfloat16 arithmetic: float32 is computed in (model.dtype = bfloat16).")
        return context

    @cached_property
    def tokens(self) -> "Tokens":
        from direct_rlhf.data.tokens import load_tokens

        model = self.recipe.model
        return load_tokens(self.base, revision=model.revision, trust_remote_code=model.trust_remote_code)

    @property
    def base(self) -> str:
        return self.recipe.model.base

    @property
    def data_folder(self) -> Path | None:
        path = self.recipe.data.path
        return Path(path) if path is not None else self.loaded.folder

    @cached_property
    def sources(self) -> str:
        from direct_rlhf.data.load import fingerprint

        return fingerprint(self.recipe.data, self.data_folder)

    @cached_property
    def dialogue(self) -> "DialogueFormat":
        from direct_rlhf.data.dialogue import DialogueFormat

        return DialogueFormat(self.recipe.dialogue, self.tokens)

    @cached_property
    def preferences(self) -> "PreferenceData":
        """Pairs that fit; the others are among `rejected`."""
        from direct_rlhf.data.load import fits, load_preferences

        recipe = self.recipe
        found = load_preferences(recipe.data, folder=self.data_folder, seed=recipe.seed, dialogue=recipe.dialogue)
        return _kept(found, lambda pairs: fits(pairs, self.dialogue, recipe.data))

    @cached_property
    def prompts(self) -> "PromptData":
        """Prompts that fit; the others are among `rejected`."""
        from direct_rlhf.data.load import fits_prompts, load_prompts

        recipe = self.recipe
        found = load_prompts(recipe.data, folder=self.data_folder, seed=recipe.seed, dialogue=recipe.dialogue)
        return _kept(found, lambda prompts: fits_prompts(prompts, self.dialogue, recipe.data))

    @cached_property
    def training(self) -> "PreferenceData":
        """What models are trained on: all pairs, or those of the mixture, which is made where it is not there yet."""
        from direct_rlhf.data.mixture import FILE, mixed_data, read_times

        if self.recipe.data.mixture.type == "none":
            return self.preferences
        self.mixture()
        times = self.world.main(lambda: read_times(self.directory.path / FILE))
        return mixed_data(self.preferences, times)

    @cached_property
    def asked(self) -> "PromptData":
        """What PPO samples answers to: all prompts, or those of the mixture's pairs."""
        from direct_rlhf.data.mixture import prompts_of

        if self.recipe.data.mixture.type == "none":
            return self.prompts
        return replace(self.prompts, train=prompts_of(self.training.train))

    @property
    def _mixed(self) -> list[str]:
        """What a stage's fingerprint has of the mixture, which is made first; nothing without one."""
        return [self._after("mixture")] if self.training is not self.preferences else []

    @property
    def reward_folder(self) -> Path:
        return self._model_folder(self.recipe.ppo.reward, "reward", "ppo.reward")

    @property
    def cost_folder(self) -> Path:
        return self._model_folder(self.recipe.ppo.lagrangian.cost, "cost", "ppo.lagrangian.cost")

    def _model_folder(self, source: "RewardSource", which: str, key: str) -> Path:
        """Where the model of a reward source is, or will be."""
        if not isinstance(source, ModelReward):
            return self.directory.path / f"{which}_model"
        return self._given_model(source.path, f"{key}.path")

    def _given_model(self, ref: str, key: str) -> Path:
        place = resolve_reference(ref, self.loaded.folder)
        if not isinstance(place, Path):
            raise ConfigError(f"{key} = {ref}: a reward model must be a local folder")
        return place

    @property
    def _trains_costs(self) -> bool:
        lagrangian = self.recipe.ppo.lagrangian
        return lagrangian.enabled and isinstance(lagrangian.cost, TrainedReward)

    def models(self) -> dict[str, str]:
        """Arm to checkpoint, base first."""
        order = sorted(self.recipe.arms, key=lambda arm: arm != "base")
        return {arm: self.base if arm == "base" else str(self._made(arm)) for arm in order}

    # How a stage is run and remembered

    def _stage(
        self, name: str, fingerprint: str, work: Callable[[], Any], *, phase: str = "rest", alone: bool = False
    ) -> None:
        """``phase`` is how to call, in the record of peak memory, what is in no phase of its own.

        ``alone``: of several processes the first one does it, and the others wait.
        """
        self.fingerprints[name] = fingerprint
        if self.world.main(lambda: self.directory.stage_done(name, fingerprint)):
            return

        def by_itself() -> None:
            work()

        with self.stop.at_borders():
            self.context.check_stop_together()
            start = time.monotonic()
            with self._measured(name, phase):
                if alone:
                    self.world.main(by_itself)
                else:
                    work()
            self.directory.finish_stage(name, fingerprint, time.monotonic() - start, {"device": self.context.device})
            self.context.check_stop_together()

    @contextmanager
    def _measured(self, name: str, rest: str) -> Iterator[None]:
        """Peak memory by phase, for the screen and the stage's record; what broken-off attempts saw counts too."""
        from direct_rlhf.models.peaks import recording
        from direct_rlhf.run.atomic import read_json, write_json

        file, known = self.directory.path / "memory.json", {}
        with suppress(DirectRLHFError, OSError):  # to measure must not fail a run
            known = read_json(file)
        with recording(self.context.device, known.get(name), rest) as peaks:
            try:
                yield
            finally:
                with suppress(DirectRLHFError, OSError):
                    if self.world.is_main:
                        write_json(file, known | {name: peaks.facts})
        self.directory.note(name, peaks.facts)
        self.context.say(f"[{name}] {peaks.line()}")

    def _after(self, name: str) -> str:
        """Fingerprint of an earlier stage, from this attempt or from its record; empty for a model made elsewhere."""
        record = self.directory.stage_record(name)
        return self.fingerprints.get(name) or (record["fingerprint"] if record else "")

    def _made(self, arm: str) -> Path:
        folder = self.directory.path / "models" / arm
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder}: the {arm} model is not there yet; run that stage first (--only {arm})")
        return folder
