"""What PPO starts from: the roles and the reward, matched to each other and to the base.

full  policy, critic and reference are models of their own; the critic continues the reward model in normalised units.
lora  one trunk; a reward model that was trained as an adapter on this very base joins it as one adapter more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.data.types import Prompt
from direct_rlhf.errors import ConfigError
from direct_rlhf.models.loading import base_identity, load_for
from direct_rlhf.models.reward_model import RewardModel
from direct_rlhf.models.roles import (
    COST_CRITIC,
    CRITIC,
    Roles,
    critic_from_adapter,
    full_roles,
    lora_roles,
    put_in_place,
)
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.recipe.schema import HttpReward, PythonReward, RewardSection, RewardSource
from direct_rlhf.rollout.types import SamplingSettings
from direct_rlhf.run.atomic import read_json, write_json
from direct_rlhf.run.context import StageContext
from direct_rlhf.train.experience import Judges
from direct_rlhf.train.pairs import Which
from direct_rlhf.train.parallel import Layout
from direct_rlhf.train.prompts import base_answers
from direct_rlhf.train.reward_sources import CallableReward, ModelRewardSource, RawReward, Reward, load_callable


@dataclass(frozen=True)
class Sources:
    """Where a PPO run's rewards come from: folders of reward models, and of Python code."""

    reward_folder: Path
    recipe_folder: Path
    cost_folder: Path | None = None  # of the cost model, for PPO-Lagrangian


def start(
    ctx: StageContext,
    *,
    init: str,
    tokens: Tokens,
    prompts: Sequence[tuple[Prompt, list[int]]],
    settings: SamplingSettings,
    sources: Sources,
) -> tuple[Roles, Judges]:
    """Roles from the checkpoint ``init``, and what rates answers, in normalised units of the *base* model.

    Errors: ConfigError for a reward model of another base or other sampling settings, and for a failed fitness card.
    """
    recipe, section = ctx.recipe, ctx.recipe.model
    lagrangian = recipe.ppo.lagrangian
    wanted: list[tuple[str, RewardSource, Path | None]] = [(CRITIC, recipe.ppo.reward, sources.reward_folder)]
    if lagrangian.enabled:
        wanted.append((COST_CRITIC, lagrangian.cost, sources.cost_folder))
    layout = Layout.of(ctx)
    roles = None
    if section.tuning == "lora":
        roles = lora_roles(section, init, device=layout.loads_on, seed=recipe.seed, with_cost=lagrangian.enabled)
    judges: list[Reward] = []
    critics: dict[str, ScalarModel] = {}
    for role, source, folder in wanted:
        if isinstance(source, PythonReward | HttpReward):
            raw = load_callable(source, sources.recipe_folder)
            if role == COST_CRITIC:  # the user's numbers are costs; a judge's are scores, higher is better
                raw = replace(raw, raw=partial(_negated, raw.raw))
            judges.append(_normalised(ctx, raw, tokens, prompts, settings, role))
            continue
        assert folder is not None, role
        model = _reward_model(ctx, layout, folder, role, roles, init, settings)
        if recipe.ppo.critic.init == "reward":
            critics |= _critic(model, role, roles, layout)
        if section.tuning == "full":
            model.scalar.trunk.to(getattr(torch, section.dtype))
        if roles is None or model.scalar.trunk is not roles.policy:
            layout.frozen(model.scalar)
        else:
            model.scalar.head.to(ctx.device)
        assert model.normalisation is not None
        low = model.normalisation.low_quantile
        judges.append(ModelRewardSource(model, f"reward model {folder.name}", low, ctx.world))
    if roles is None:
        roles = full_roles(
            section,
            init,
            critics.get(CRITIC),
            device=ctx.device,
            cost_critic=critics.get(COST_CRITIC),
            with_cost=lagrangian.enabled,
            place=layout,
        )
    else:
        roles = replace(roles, device=ctx.device)
        put_in_place(roles, layout)
    return roles, Judges(*judges)


def _reward_model(
    ctx: StageContext,
    layout: Layout,
    folder: Path,
    role: str,
    roles: Roles | None,
    init: str,
    settings: SamplingSettings,
) -> RewardModel:
    """The reward model in ``folder``, fit for PPO and for this base; on the policy's trunk where it can be.

    It is where models are loaded, and still to be put in place.
    """
    which: Which = "reward" if role == CRITIC else "cost"
    _check_fitness(ctx, folder, which)
    where = layout.loads_on
    if roles is None:
        model = RewardModel.load(folder, dtype="float32", device=where)
    else:
        shares = init == ctx.recipe.model.base and (folder / "adapter").is_dir()
        trunk = roles.policy if shares else None
        model = RewardModel.load(folder, dtype=ctx.recipe.model.dtype, device=where, trunk=trunk, adapter=which)
    _check_fits(ctx, model, settings)
    return replace(model, device=ctx.device)


def _critic(model: RewardModel, role: str, roles: Roles | None, layout: Layout) -> dict[str, ScalarModel]:
    """A critic that continues the reward model; of the cost it says the negative. With LoRA it is set in place."""
    facts = model.normalisation
    assert facts is not None
    sign = 1.0 if role == CRITIC else -1.0
    if roles is None:
        critic = model.scalar.as_critic(facts.mean, sign * facts.std)
        return {role: layout.trained(critic.requires_grad_(True))}
    if model.scalar.trunk is roles.policy:
        critic_from_adapter(roles, role, model.adapter, model.scalar.head, facts.mean, sign * facts.std)
    return {}


def _negated(costs: RawReward, items: list[dict[str, Any]]) -> list[float]:
    return [-float(cost) for cost in costs(items)]


def _check_fits(ctx: StageContext, model: RewardModel, settings: SamplingSettings) -> None:
    """ConfigError unless the reward model's normalisation is of this base and these settings."""
    model.check_fits(ctx.world.main(lambda: base_identity(ctx.recipe.model)), settings)


def _check_fitness(ctx: StageContext, folder: Path, which: Which) -> None:
    """ConfigError if the fitness card says fail and the recipe says stop; a card that was never made only warns."""
    card_path = folder / "fitness.json"
    if not card_path.is_file():
        ctx.say(f"{folder}: no fitness card; make one with `direct-rlhf reward check`")
        return
    card = read_json(card_path)
    section: RewardSection = getattr(ctx.recipe, which)
    if card["verdict"] == "fail" and section.fitness.on_fail == "stop":
        reasons = "; ".join(str(reason) for reason in card["reasons"])
        raise ConfigError(
            f"{folder}: the {which} model is not fit for PPO: {reasons}. Train a better one, or set "
            f"{which}.fitness.on_fail=continue to go on all the same."
        )


def _normalised(
    ctx: StageContext,
    raw: CallableReward,
    tokens: Tokens,
    prompts: Sequence[tuple[Prompt, list[int]]],
    settings: SamplingSettings,
    role: str,
) -> Reward:
    """The user's reward (or cost) in units of the base's own samples; measured once a run and kept beside it."""
    path = ctx.run.path / f"{'reward' if role == CRITIC else 'cost'}_normalisation.json"
    kept = ctx.world.main(lambda: read_json(path) if path.is_file() else None)
    if kept is not None:
        return CallableReward(raw.raw, raw.name, kept["mean"], kept["std"], kept["low_quantile"], ctx.world)
    section, recipe = ctx.recipe.model, ctx.recipe
    base = load_for(section, section.base, dtype=section.dtype, device=ctx.device)
    ordered = sorted(prompts, key=lambda pair: pair[0].id)[: recipe.reward.normalisation_prompts]
    answers = base_answers(
        base, ordered, tokens, settings, seed=recipe.seed, should_stop=ctx.should_stop, world=ctx.world
    )

    def measure() -> dict[str, float]:
        reward = raw.normalised_on(answers)
        facts = {"mean": reward.mean, "std": reward.std, "low_quantile": reward.low_quantile}
        write_json(path, {"reward": reward.name, **facts, "count": len(answers)})
        return facts

    return CallableReward(raw.raw, raw.name, **ctx.world.main(measure), world=ctx.world)
