"""The study of helpful, honest and harmless: mixing the data against merging the models, from the same pairs.

    objectives    a reward model for each kind of pair                        parts/objectives/
    experts       a model for each kind, by each paradigm (DPO, direct PPO)   parts/PARADIGM-KIND/
    mixtures      a model for each data mixture, on as many pairs             parts/PARADIGM-mix-NAME/
    merges        the experts merged; settings chosen on validation questions search/NAME/, models/
    evaluation    all of them on the test questions and the general tasks     evaluation/NAME/
    three_h.json  the balance of each model, paired differences, the task vectors, what each route cost

A part is a run of its own, with its own record and checkpoints, so that all is resumed as any run is. Experts share the
pairs, steps and rollouts of a mixture between them: all routes train on equally much.
"""

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from direct_rlhf.errors import ConfigError
from direct_rlhf.evaluate.chats import digest
from direct_rlhf.recipe.load import LoadedRecipe
from direct_rlhf.recipe.merge import merge_of
from direct_rlhf.recipe.merge_methods import PARAMETERS
from direct_rlhf.recipe.references import resolve_model
from direct_rlhf.recipe.schema import (
    Arm,
    HeuristicMixture,
    LowConflictMixture,
    MergeSearch,
    Mixture,
    ModelReward,
    Recipe,
    ScoredMixture,
    ThreeHSection,
)
from direct_rlhf.run.atomic import read_json, write_json
from direct_rlhf.run.context import NoBars
from direct_rlhf.run.directory import RunDirectory
from direct_rlhf.stages import Study
from direct_rlhf.study.entries import Entry, Route
from direct_rlhf.study.search import Maker, Measured, Tried, best, combinations, merger, search, with_settings

MASK_SEEDS = 3  # draws of a random method's masks that are measured
TABLE = "three_h.json"


class ThreeH:
    """One run of the study; `stages.run` holds its directory and its stop flag."""

    def __init__(self, loaded: LoadedRecipe, directory: RunDirectory, stop: Any) -> None:
        if loaded.recipe.three_h is None:
            raise ConfigError("three_h: this recipe has no such section")
        self.section: ThreeHSection = loaded.recipe.three_h
        self.loaded, self.directory, self.stop = loaded, directory, stop
        self.study = Study(loaded, directory, stop)

    @property
    def recipe(self) -> Recipe:
        return self.study.recipe

    def run(self, only: str | None) -> None:
        """Everything that is not done yet. ConfigError for what cannot be, before anything is trained."""
        self.check()
        stages = {"train": self.train, "merge": self.merge, "evaluation": self.evaluate, "report": self.report}
        for name, stage in stages.items():
            if only in (None, name):
                stage()

    def check(self) -> None:
        """Merges, mixtures and questions, as far as they can be seen without a model."""
        for name, one in {**self.section.merges, **self.section.ablation}.items():
            if one.method not in PARAMETERS:
                raise ConfigError(
                    f"three_h.merges.{name}.method = {one.method}: no such method. {', '.join(PARAMETERS)}"
                )
            for settings in combinations(one.grid):
                content = self._merge_content(one, [f"{self._base}#{kind}" for kind in self.section.kinds])
                merge_of(with_settings(content, settings), self.loaded.folder)
        self.study.check_judge()

    # Training

    def train(self) -> None:
        self.objectives()
        for paradigm in self.section.paradigms:
            for kind in self.section.kinds:
                self._train(self.expert_name(paradigm, kind), self._expert(paradigm, kind))
            for name, mixture in self.section.mixtures.items():
                self._train(self.mixture_name(paradigm, name), self._mixture(paradigm, mixture))

    def objectives(self) -> None:
        """The kinds' reward models, which PPO experts and the scored mixtures need."""
        scored = any(isinstance(mixture, ScoredMixture) for mixture in self.section.mixtures.values())
        if scored or "direct_ppo" in self.section.paradigms:
            mixture = LowConflictMixture(type="low_conflict")
            self._train("objectives", self._part("dpo", mixture), stages=("objectives",))

    def objective(self, kind: str) -> Path:
        from direct_rlhf.data.mixture import objective_name

        return self.parts / "objectives" / f"{objective_name(kind)}_model"

    @property
    def parts(self) -> Path:
        return self.directory.path / "parts"

    @staticmethod
    def expert_name(paradigm: str, kind: str) -> str:
        return f"{paradigm}-{kind}"

    @staticmethod
    def mixture_name(paradigm: str, name: str) -> str:
        return f"{paradigm}-mix-{name}"

    @cached_property
    def pairs_by_kind(self) -> dict[str, int]:
        """Training pairs of each kind that a study uses: all, or `pairs` shared out equally."""
        found = {kind: sum(pair.kind == kind for pair in self.study.preferences.train) for kind in self.section.kinds}
        missing = [kind for kind, n in found.items() if not n]
        if missing:
            raise ConfigError(f"three_h.kinds: no training pair is of the kind {' or '.join(missing)}")
        if self.section.pairs is None:
            return found
        share = self.section.pairs // len(found)
        return {kind: min(n, share) for kind, n in found.items()}

    def _expert(self, paradigm: str, kind: str) -> Recipe:
        n = self.pairs_by_kind[kind]
        shares = {one: float(one == kind) for one in self.section.kinds}
        part = self._part(paradigm, HeuristicMixture(type="heuristic", shares=shares, pairs=n))
        if paradigm != "direct_ppo":
            return part
        share = n / sum(self.pairs_by_kind.values())
        reward = ModelReward(type="model", path=str(self.objective(kind).absolute()))
        iterations = max(1, round(part.ppo.iterations * share))
        return part.model_copy(update={"ppo": part.ppo.model_copy(update={"reward": reward, "iterations": iterations})})

    def _mixture(self, paradigm: str, mixture: Mixture) -> Recipe:
        filled: dict[str, Any] = {"pairs": sum(self.pairs_by_kind.values())}
        if isinstance(mixture, ScoredMixture):
            filled["models"] = {kind: str(self.objective(kind).absolute()) for kind in self.section.kinds}
        return self._part(paradigm, mixture.model_copy(update=filled))

    def _part(self, paradigm: str, mixture: Mixture) -> Recipe:
        recipe = self.recipe
        arms: list[Arm] = ["base", cast(Arm, paradigm)]
        data = recipe.data.model_copy(update={"mixture": mixture})
        return recipe.model_copy(update={"three_h": None, "arms": arms, "data": data, "description": ""})

    def _train(self, name: str, recipe: Recipe, stages: Sequence[str] | None = None) -> None:
        """A run of its own, without evaluation and report."""
        loaded = self.loaded.with_recipe(recipe.model_copy(update={"name": name}))
        directory = RunDirectory.open(self.parts, loaded, resume=True, overwrite=False)
        with directory.locked():
            Study(loaded, directory, self.stop).train(stages)

    # Merging

    def merge(self) -> list[Entry]:
        """Every way of merging with the settings that did best on the validation questions."""
        return [self._searched(paradigm, route, name) for paradigm, route, name in self._merges()]

    def _merges(self) -> Iterator[tuple[str, Route, str]]:
        for paradigm in self.section.paradigms:
            for name in self.section.merges:
                yield paradigm, "merge", name
            for name in self.section.ablation:
                yield paradigm, "ablation", name

    def _searched(self, paradigm: str, route: Route, name: str) -> Entry:
        one = (self.section.merges if route == "merge" else self.section.ablation)[name]
        model = f"{paradigm}-{route}-{name}"
        tried = self._search(paradigm, one, self.directory.path / "search" / model)
        chosen = best(tried)
        path = self._merged(model, paradigm, one, self._content(paradigm, one, chosen.settings))
        settings = {**one.settings, **chosen.settings}
        return Entry(model, route, paradigm, name, path, {"method": one.method, **settings}, chosen.score)

    def _merged(self, name: str, paradigm: str, one: MergeSearch, content: Mapping[str, Any]) -> Path:
        """The model, merged unless it is there and was merged from just this."""
        path = self.directory.path / "models" / name
        if not (path / "config.json").is_file() or digest(self._merged_from(name)) != digest(content):
            self._make(paradigm, one)(content, path)
            write_json(self._record_of(name), content)
        return path

    def _merged_from(self, name: str) -> dict[str, Any]:
        """The merge file of a model as it lies there; empty for one that is no merge."""
        record = self._record_of(name)
        return dict(read_json(record)) if record.is_file() else {}

    def _record_of(self, name: str) -> Path:
        return self.directory.path / "search" / name / "chosen.json"

    def _search(self, paradigm: str, one: MergeSearch, place: Path) -> list[Tried]:
        return search(
            self._content(paradigm, one, {}),
            combinations(one.grid),
            folder=self.directory.path,
            place=place,
            make=self._make(paradigm, one),
            measure=self.validate,
            key=self._validation_key,
            say=self.study.context.say,
        )

    def experts(self, paradigm: str) -> dict[str, Path]:
        folders = {
            kind: self.parts / self.expert_name(paradigm, kind) / "models" / paradigm for kind in self.section.kinds
        }
        missing = [str(folder) for folder in folders.values() if not (folder / "config.json").is_file()]
        if missing:
            raise ConfigError(
                f"{missing[0]}: the expert is not there yet; run the study without --only, or --only train"
            )
        return folders

    def _content(self, paradigm: str, one: MergeSearch, settings: Mapping[str, Any]) -> dict[str, Any]:
        # named from the run directory: random masks are drawn by the name, and a run repeats wherever it lies
        experts = [str(path.relative_to(self.directory.path)) for path in self.experts(paradigm).values()]
        return with_settings(self._merge_content(one, experts), settings)

    @property
    def _base(self) -> str:
        """As a merge file names it, from any folder."""
        model = self.recipe.model
        found = resolve_model(model.base, self.loaded.folder, revision=model.revision)
        if isinstance(found, Path):
            return str(found.absolute())
        return f"{found.name}@{found.revision}" if found.revision else found.name

    def _merge_content(self, one: MergeSearch, experts: Sequence[str]) -> dict[str, Any]:
        return {
            "merge_method": one.method,
            "base_model": self._base,
            "models": [{"model": expert} for expert in (experts[:2] if self._folds(one) else experts)],
            "parameters": dict(one.settings),
        }

    @staticmethod
    def _folds(one: MergeSearch) -> bool:
        """Whether the method takes two models: the experts are then merged one after the other."""
        return PARAMETERS[one.method].experts == (2, 2)

    def _make(self, paradigm: str, one: MergeSearch) -> Maker:
        """How the content of a merge file becomes a model."""
        if not self._folds(one):
            return self._merge_once
        later = [str(path.absolute()) for path in list(self.experts(paradigm).values())[2:]]

        def fold(content: Mapping[str, Any], out: Path) -> None:
            """slerp(slerp(e1, e2, 1/2), e3, 1/3) and so on: every expert has the same share."""
            steps = [content, *({**content, "models": [None, {"model": expert}]} for expert in later)]
            done = out.with_name(f".{out.name}.folding")
            for number, step in enumerate(steps, 2):
                models = [{"model": str(done)}, step["models"][1]] if number > 2 else step["models"]
                parameters = {**step["parameters"], "t": 1 / number}
                last = number == len(steps) + 1
                target = out if last else done.with_name(f"{done.name}.{number}")
                self._merge_once({**step, "models": models, "parameters": parameters}, target)
                shutil.rmtree(done, ignore_errors=True)
                if not last:
                    target.rename(done)

        return fold

    @property
    def _merge_once(self) -> Maker:
        return merger(self.directory.path, self.stop)

    @property
    def _validating(self) -> Recipe:
        """The recipe's evaluation, on the validation questions alone."""
        evaluation = self.recipe.evaluation
        conversation = evaluation.conversation.model_copy(update={"questions": self.section.validation})
        changed = evaluation.model_copy(update={"suites": ["conversation"], "conversation": conversation})
        return self.recipe.model_copy(update={"evaluation": changed, "three_h": None, "name": "validation"})

    @cached_property
    def _validation_run(self) -> RunDirectory:
        loaded = self.loaded.with_recipe(self._validating)
        return RunDirectory.open(self.directory.path, loaded, resume=True, overwrite=False)

    @property
    def _validation_key(self) -> str:
        evaluation = self._validating.evaluation.model_dump_json()
        return f"{evaluation} {self.recipe.dialogue.model_dump_json()} {self.recipe.seed} {self.section.kinds}"

    def validate(self, model: Path, name: str = "candidate") -> Measured:
        """The mean over the kinds on the validation questions."""
        from direct_rlhf.evaluate.suite import evaluate_arm

        run = self._validation_run
        context = replace(self.study.context, recipe=self._validating, run=run, progress=NoBars())
        evaluate_arm(context, name, str(model), folder=self.loaded.folder)
        found = self._balance(run.path / "evaluation" / name)
        return Measured(found.mean.mean, {kind: one.mean for kind, one in found.by_kind.items()})

    # Evaluation

    def evaluate(self) -> None:
        """Every model on the test questions; those of the routes on the general tasks too."""
        entries = self.entries
        self.study.fingerprints |= {one.name: digest(self._merged_from(one.name)) for one in entries}
        routes = {one.name: str(one.path) for one in entries if one.route != "ablation"}
        self.study.evaluate(routes, compared=False)
        ablation = {one.name: str(one.path) for one in entries if one.route == "ablation"}
        if ablation:
            suites = self.recipe.evaluation.model_copy(update={"suites": ["conversation"]})
            other = Study(
                self.loaded.with_recipe(self.recipe.model_copy(update={"evaluation": suites})),
                self.directory,
                self.stop,
            )
            other.fingerprints |= self.study.fingerprints
            other.evaluate(ablation, compared=False)

    @cached_property
    def entries(self) -> list[Entry]:
        """All models of the study, the base first. ConfigError for one that is not there yet."""
        base = Path(str(resolve_model(self.recipe.model.base, self.loaded.folder)))
        found = [Entry("base", "base", "", "base", base, {})]
        for paradigm in self.section.paradigms:
            for kind, path in self.experts(paradigm).items():
                found.append(Entry(self.expert_name(paradigm, kind), "expert", paradigm, kind, path, {}))
            found += [self._mixed(paradigm, name) for name in self.section.mixtures]
            for name in self.section.merges:
                merged = self._searched(paradigm, "merge", name)
                found += [merged, *self._other_masks(merged)]
            found += [self._searched(paradigm, "ablation", name) for name in self.section.ablation]
        return found

    def _mixed(self, paradigm: str, name: str) -> Entry:
        model = self.mixture_name(paradigm, name)
        path = self.parts / model / "models" / paradigm
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path}: the mixture is not there yet; run the study without --only, or --only train")
        return Entry(model, "mixture", paradigm, name, path, {}, self.validate(path, model).score)

    def _other_masks(self, merged: Entry) -> Iterable[Entry]:
        """A random method's merge again with other masks: its settings were chosen with the first ones."""
        one = self.section.merges[merged.title]
        if "seed" not in PARAMETERS[one.method].model_fields:
            return
        chosen = {key: value for key, value in merged.settings.items() if key in one.grid}
        for seed in range(1, MASK_SEEDS):
            content = {**self._content(merged.paradigm, one, chosen), "seed": seed}
            path = self._merged(f"{merged.name}-masks-{seed}", merged.paradigm, one, content)
            yield replace(merged, name=path.name, path=path, of=merged.name)

    def _balance(self, place: Path) -> Any:
        from direct_rlhf.evaluate.balance import balance, of_kinds
        from direct_rlhf.evaluate.records import read_items

        evaluation = self.recipe.evaluation
        items = of_kinds(read_items(place / "conversation.jsonl"), self.section.kinds)
        return balance(items, self.section.kinds, draws=evaluation.bootstrap_draws, seed=self.recipe.seed)

    # The tables

    def report(self) -> None:
        from direct_rlhf.stages import report
        from direct_rlhf.study.table import study_table

        start = time.monotonic()
        write_json(self.directory.path / TABLE, study_table(self.directory.path, self.recipe, self.entries))
        report([self.directory.path])
        self.directory.finish_stage("report", "", time.monotonic() - start, {})
