"""The stage that makes a data mixture: margins of all training pairs under every kind's reward model, then a choice.

Scores are kept chunk by chunk in mixture_scores.jsonl while the stage runs, so that a resume scores none twice and ends
with the same bits. The choice itself is `data.mixture`.

Legend: n pairs, K kinds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.mixture import (
    FILE,
    Floats,
    Mixed,
    agreement,
    facts,
    kinds_of,
    learn_gates,
    mix,
    objective_name,
    select,
)
from direct_rlhf.data.tokens import Tokens, load_tokens
from direct_rlhf.data.types import PreferenceData, PreferencePair
from direct_rlhf.errors import ConfigError
from direct_rlhf.models import peaks
from direct_rlhf.models.loading import base_identity
from direct_rlhf.models.reward_model import RewardModel
from direct_rlhf.recipe.schema import LowConflictMixture, RewardSelectedMixture, ScoredMixture
from direct_rlhf.run.atomic import append_jsonl, read_json, read_jsonl, write_jsonl
from direct_rlhf.run.context import StageContext
from direct_rlhf.run.points import point
from direct_rlhf.train.pairs import EncodedPair, encode_pairs
from direct_rlhf.train.prompts import sampling_settings
from direct_rlhf.train.reward_sources import Answer, check_finite

SCORES = "mixture_scores.jsonl"
CHUNK = 64  # pairs that are scored between two looks for a stop


@dataclass(frozen=True)
class Objective:
    """One kind's reward model, and the one with another seed where that was asked for."""

    kind: str
    model: Path
    given: bool = False  # made by an earlier run
    second: Path | None = None


def make_mixture(
    ctx: StageContext,
    data: PreferenceData,
    objectives: Sequence[Objective] = (),
    *,
    tokens: Tokens | None = None,
    key: str = "",
) -> Path:
    """Choose the mixture of the recipe's ``data.mixture`` among the training pairs; writes mixture.jsonl.

    ``objectives`` are needed for the scored types. ``key`` names all that the scores depend on: those of another key
    are not used again.
    Errors: those of `data.mixture.mix`; ConfigError for a model of another base or with a failed card; DivergenceError
    for a score that is not finite.
    """
    recipe, section = ctx.recipe, ctx.recipe.data.mixture
    assert section.type != "none"
    dialogue = DialogueFormat(recipe.dialogue, tokens or load_tokens(recipe.model.base, revision=recipe.model.revision))
    encoded = encode_pairs(sorted(data.train, key=lambda pair: pair.id), dialogue, recipe.data)
    pairs = [one.pair for one in encoded]
    described: dict[str, Any] = {}
    if isinstance(section, ScoredMixture):
        mixed, described = _scored(ctx, section, pairs, data.held_out, objectives, dialogue, key)
    else:
        mixed = mix(section, pairs, recipe.seed)
    path: Path = ctx.run.path / FILE
    write_jsonl(path, mixed.lines())
    (ctx.run.path / SCORES).unlink(missing_ok=True)
    found = facts(mixed, section, [_lengths(one) for one in encoded]) | described
    ctx.run.note("mixture", found)
    kinds = ", ".join(f"{one['total']:,} {kind}" for kind, one in found["kinds"].items())
    ctx.say(f"mixture: {found['pairs']['after']:,} pairs of {found['pairs']['before']:,} ({kinds})")
    return path


def _scored(
    ctx: StageContext,
    section: RewardSelectedMixture | LowConflictMixture,
    pairs: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    objectives: Sequence[Objective],
    dialogue: DialogueFormat,
    key: str,
) -> tuple[Mixed, dict[str, Any]]:
    """The mixture by margins, and what is to be recorded of the models."""
    kinds = kinds_of(section, pairs)
    by_kind = {objective.kind: objective for objective in objectives}
    objectives = [by_kind[kind] for kind in kinds]
    cards = {objective.kind: _card(ctx, objective) for objective in objectives}
    scorer = _Scorer(ctx, dialogue, key)
    margin_nK = scorer.margins([objective.model for objective in objectives], pairs, "train")
    gates = None
    if isinstance(section, RewardSelectedMixture) and section.gate == "learnt":
        held_out = [one.pair for one in encode_pairs(held_out, dialogue, ctx.recipe.data)]
        held_out_mK = scorer.margins([objective.model for objective in objectives], held_out, "held_out")
        gates = learn_gates(held_out, kinds, held_out_mK)
    mixed = mix(section, pairs, ctx.recipe.seed, margin_nK=margin_nK, gates=gates)
    described: dict[str, Any] = {"objectives": cards}
    if section.second_seed:
        models = [objective.second or objective.model for objective in objectives]
        second_nK = scorer.margins(models, pairs, "train")
        second = select(section, mixed.pairs, kinds, second_nK, gates)
        described["agreement"] = agreement(section, mixed, second_nK, second)
    return mixed, described


def _card(ctx: StageContext, objective: Objective) -> dict[str, Any]:
    """What is recorded of an objective's model: its place, and its fitness card in short."""
    folder = ctx.run.path / f"{objective_name(objective.kind)}_model"
    place = objective.model
    found: dict[str, Any] = {"model": place.name if place == folder else str(place), "given": objective.given}
    file = folder / "fitness.json"
    if not file.is_file():
        return found | {"verdict": None, "accuracy": None, "ci": None, "n": None}
    card = read_json(file)
    fitness = ctx.recipe.reward.fitness
    if card["verdict"] == "fail" and fitness.on_fail == "stop":
        reasons = "; ".join(str(reason) for reason in card["reasons"])
        raise ConfigError(
            f"{place}: the reward model of {objective.kind} pairs is not fit to choose pairs by: {reasons}. Train a "
            "better one, or set reward.fitness.on_fail=continue to go on all the same."
        )
    return found | {name: card[name] for name in ("verdict", "accuracy", "ci", "n")}


@dataclass(frozen=True)
class _Scorer:
    """Scores pairs with one model after the other, from where an earlier attempt was cut off."""

    ctx: StageContext
    dialogue: DialogueFormat
    key: str

    def margins(self, models: Sequence[Path], pairs: Sequence[PreferencePair], what: str) -> Floats:
        """D [n, K]: the normalised score of the chosen minus that of the rejected answer, float64."""
        columns = [self._column(model, pairs, what) for model in models]
        return np.array(columns, dtype=np.float64).reshape(len(models), len(pairs)).T.copy()

    def _column(self, folder: Path, pairs: Sequence[PreferencePair], what: str) -> list[float]:
        name = {"key": self.key, "model": str(folder), "pairs": what}
        known = self._known(name)
        starts = range(0, len(pairs), CHUNK)
        model = None
        margins: list[float] = []
        with self.ctx.progress(f"margins of {folder.name}", total=len(pairs)) as bar:
            for start in starts:
                chunk = pairs[start : start + CHUNK]
                found = known.get(start)
                if found is None:
                    self.ctx.check_stop()
                    model = model or self._load(folder)
                    found = self._score(model, folder, chunk)
                    append_jsonl(self.ctx.run.path / SCORES, {**name, "start": start, "margins": found})
                    point("mixture.chunk")
                margins += found
                bar.advance(len(chunk))
        return margins

    def _known(self, name: Mapping[str, str]) -> dict[int, list[float]]:
        """Margins of finished chunks of this model and these pairs, by their first pair."""
        path = self.ctx.run.path / SCORES
        rows = read_jsonl(path) if path.is_file() else []
        return {row["start"]: row["margins"] for row in rows if all(row[key] == name[key] for key in name)}

    def _load(self, folder: Path) -> RewardModel:
        recipe = self.ctx.recipe
        identity = self._base_sha256  # before a second model is in memory
        model = RewardModel.load(folder, dtype=recipe.model.dtype, device=self.ctx.device)
        model.check_fits(identity, sampling_settings(recipe.ppo, self.dialogue))
        return model

    @cached_property
    def _base_sha256(self) -> str:
        return base_identity(self.ctx.recipe.model)

    @peaks.phase("score")
    def _score(self, model: RewardModel, folder: Path, pairs: Sequence[PreferencePair]) -> list[float]:
        items = [(pair, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
        scores = model.score([(pair.prompt, text, True) for pair, text in items])
        answers = [Answer(pair.prompt, text, True, pair.kind, f"of pair {pair.id}") for pair, text in items]
        score_n2 = check_finite(scores, answers, folder.name).double().reshape(-1, 2)
        return [float(margin) for margin in score_n2[:, 0] - score_n2[:, 1]]


def _lengths(encoded: EncodedPair) -> tuple[int, int]:
    return len(encoded.chosen_ids), len(encoded.rejected_ids)
