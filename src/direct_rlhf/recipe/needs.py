"""What a recipe's arms need and the recipe does not give: found before anything is loaded."""

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.schema import Recipe, TrainedReward


def missing_inputs(recipe: Recipe) -> list[str]:
    """One sentence for each input that some arm needs and no source supplies."""
    ppo_arms = [arm for arm in recipe.arms if arm.endswith("ppo")]
    pair_users: list[str] = [arm for arm in recipe.arms if arm in ("sft", "sft_ppo", "dpo")]
    if ppo_arms and isinstance(recipe.ppo.reward, TrainedReward):
        pair_users += ["the reward model"]
    lagrangian = recipe.ppo.lagrangian
    if ppo_arms and lagrangian.enabled and isinstance(lagrangian.cost, TrainedReward):
        pair_users += ["the cost model"]
    problems = []
    if pair_users and not recipe.data.preferences:
        problems.append(
            f"data.preferences: no source, but {', '.join(pair_users)} learns from preference pairs. "
            "Name at least one, such as {path: world:helpful.jsonl}."
        )
    if ppo_arms and not recipe.data.prompts and not recipe.data.preferences:
        problems.append(
            f"data.prompts: no source, and no data.preferences to take prompts from; {ppo_arms[0]} needs them."
        )
    if ppo_arms and recipe.ppo.ptx.weight > 0 and not recipe.data.text:
        problems.append(
            f"ppo.ptx.weight = {recipe.ppo.ptx.weight:g}: needs text, but data.text names no source. "
            "Name one, such as {path: world:text.jsonl.gz}, or set the weight to 0."
        )
    return problems


def require_inputs(recipe: Recipe) -> None:
    """Errors: ConfigError with one line per missing input."""
    if problems := missing_inputs(recipe):
        raise ConfigError("\n".join(problems))
