"""What PPO starts from: the roles and the reward, matched to each other and to the base.

full  policy, critic and reference are models of their own; the critic continues the reward model in normalised units.
lora  one trunk; a reward model that was trained as an adapter on this very base joins it as one adapter more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.data.types import Prompt
from direct_rlhf.errors import ConfigError
from direct_rlhf.models.loading import base_sha256, load_for
from direct_rlhf.models.reward_model import ADAPTER, RewardModel
from direct_rlhf.models.roles import Roles, critic_from_adapter, full_roles, lora_roles
from direct_rlhf.recipe.schema import HttpReward, PythonReward
from direct_rlhf.rollout.types import SamplingSettings
from direct_rlhf.run.atomic import read_json, write_json
from direct_rlhf.run.context import StageContext
from direct_rlhf.train.prompts import base_answers
from direct_rlhf.train.reward_sources import CallableReward, ModelRewardSource, Reward, load_callable


def start(
    ctx: StageContext,
    *,
    init: str,
    tokens: Tokens,
    prompts: Sequence[tuple[Prompt, list[int]]],
    settings: SamplingSettings,
    reward_folder: Path,
    recipe_folder: Path,
) -> tuple[Roles, Reward]:
    """Roles from the checkpoint ``init``, and the recipe's reward in normalised units of the *base* model.

    Errors: ConfigError for a reward model of another base or other sampling settings, and for a failed fitness card.
    """
    recipe = ctx.recipe
    source = recipe.ppo.reward
    section = recipe.model
    if isinstance(source, PythonReward | HttpReward):
        raw = load_callable(source, recipe_folder)
        if section.tuning == "full":
            roles = full_roles(section, init, None, device=ctx.device)
        else:
            roles = lora_roles(section, init, device=ctx.device, seed=recipe.seed)
        return roles, _normalised(ctx, raw, tokens, prompts, settings)

    _check_fitness(ctx, reward_folder)
    from_reward = recipe.ppo.critic.init == "reward"
    if section.tuning == "full":
        model = RewardModel.load(reward_folder, dtype="float32", device=ctx.device)
        normalisation = _fitting(ctx, model, settings)
        critic = model.scalar.as_critic(normalisation.mean, normalisation.std) if from_reward else None
        model.scalar.trunk.to(getattr(torch, section.dtype))
        roles = full_roles(section, init, critic, device=ctx.device)
    else:
        roles = lora_roles(section, init, device=ctx.device, seed=recipe.seed)
        own_trunk = roles.policy if init == section.base and (reward_folder / "adapter").is_dir() else None
        model = RewardModel.load(reward_folder, dtype=section.dtype, device=ctx.device, trunk=own_trunk)
        normalisation = _fitting(ctx, model, settings)
        if own_trunk is not None and from_reward:
            critic_from_adapter(roles, ADAPTER, model.scalar.head, normalisation.mean, normalisation.std)
    name = f"reward model {reward_folder.name}"
    return roles, ModelRewardSource(model, name, normalisation.low_quantile)


def _fitting(ctx: StageContext, model: RewardModel, settings: SamplingSettings) -> Any:
    """The reward model's normalisation, after checking that it is of this base and these settings."""
    section = ctx.recipe.model
    base = load_for(section, section.base, dtype=section.dtype, device="cpu")
    model.check_fits(base_sha256(base), settings)
    return model.normalisation


def _check_fitness(ctx: StageContext, folder: Path) -> None:
    """ConfigError if the fitness card says fail and the recipe says stop; a card that was never made only warns."""
    card_path = folder / "fitness.json"
    if not card_path.is_file():
        ctx.say(f"{folder}: no fitness card; make one with `direct-rlhf reward check`")
        return
    card = read_json(card_path)
    if card["verdict"] == "fail" and ctx.recipe.reward.fitness.on_fail == "stop":
        reasons = "; ".join(str(reason) for reason in card["reasons"])
        raise ConfigError(
            f"{folder}: the reward model is not fit for PPO: {reasons}. Train a better one, or set "
            "reward.fitness.on_fail=continue to go on all the same."
        )


def _normalised(
    ctx: StageContext,
    raw: CallableReward,
    tokens: Tokens,
    prompts: Sequence[tuple[Prompt, list[int]]],
    settings: SamplingSettings,
) -> Reward:
    """The user's reward in units of the base's own samples; measured once a run and kept beside it."""
    path = ctx.run.path / "reward_normalisation.json"
    if path.is_file():
        kept = read_json(path)
        return CallableReward(raw.raw, raw.name, kept["mean"], kept["std"], kept["low_quantile"])
    section, recipe = ctx.recipe.model, ctx.recipe
    base = load_for(section, section.base, dtype=section.dtype, device=ctx.device)
    ordered = sorted(prompts, key=lambda pair: pair[0].id)[: recipe.reward.normalisation_prompts]
    answers = base_answers(base, ordered, tokens, settings, seed=recipe.seed)
    reward = raw.normalised_on(answers)
    facts = {"mean": reward.mean, "std": reward.std, "low_quantile": reward.low_quantile, "count": len(answers)}
    write_json(path, {"reward": reward.name, **facts})
    return reward
