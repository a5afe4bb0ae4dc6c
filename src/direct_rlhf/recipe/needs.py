"""What a recipe's arms need and the recipe or the installation does not give: found before anything is loaded."""

import importlib.util
from collections.abc import Iterator

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
    if ppo_arms and recipe.data.mixture.type != "none" and recipe.data.prompts:
        problems.append(
            "data.prompts: with data.mixture, PPO samples answers to the prompts of the mixture's pairs and would not "
            "use these. Set data.prompts=[]."
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


def missing_libraries(recipe: Recipe) -> list[str]:
    """One sentence for each setting that needs a library that is not installed. Nothing is imported."""
    wanted = [("bitsandbytes", "gpu", *setting) for setting in _few_bits(recipe)]
    if _colocates(recipe):
        wanted.append(("vllm", "vllm", "rollout.vllm.mode", "colocated", "server"))
    return [
        f'{key} = {value}: needs {library}, which is not installed. Run: pip install "direct-rlhf[{extra}]", or set '
        f"{key}={usual}"
        for library, extra, key, value, usual in wanted
        if importlib.util.find_spec(library) is None
    ]


def require_libraries(recipe: Recipe) -> None:
    """Errors: ConfigError with one line per setting whose library is not installed."""
    if problems := missing_libraries(recipe):
        raise ConfigError("\n".join(problems))


def _few_bits(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(key, value, the usual value) of each setting that stores numbers in fewer bits."""
    if recipe.model.quantise != "none":
        yield "model.quantise", recipe.model.quantise, "none"
    sections = {
        "reward.optimiser.kind": recipe.reward.optimiser,
        "cost.optimiser.kind": recipe.cost.optimiser,
        "sft.optimiser.kind": recipe.sft.optimiser,
        "dpo.optimiser.kind": recipe.dpo.optimiser,
        "ppo.optimiser.kind": recipe.ppo.optimiser,
        "ppo.critic.optimiser.kind": recipe.ppo.critic.optimiser,
    }
    yield from ((key, section.kind, "adamw") for key, section in sections.items() if section.kind != "adamw")


def require_processes(recipe: Recipe, processes: int) -> None:
    """Errors: ConfigError if the recipe cannot run in so many processes."""
    for key, value, usual in _few_bits(recipe) if processes > 1 else ():
        raise ConfigError(
            f"{key} = {value}: runs in one process, here are {processes}; weights and moments in parts are float32 or "
            f"bfloat16. Set {key}={usual}: {processes} processes share what it would have saved."
        )
    if _colocates(recipe) and processes > 1:
        raise ConfigError(
            f"rollout.vllm.mode = colocated: runs in one process, here are {processes}. Start vLLM as a server, which "
            "may use several GPUs, and set rollout.vllm.mode=server and rollout.vllm.url."
        )
    shared = recipe.parallel.shard_size
    if shared is not None and processes % shared:
        fitting = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
        raise ConfigError(
            f"parallel.shard_size = {shared}: must divide the number of processes, {processes} (so: {fitting})"
        )


def _colocates(recipe: Recipe) -> bool:
    """Whether vLLM runs beside the trainer."""
    section = recipe.rollout
    return section.engine == "vllm" and section.vllm.mode == "colocated" and any(a.endswith("ppo") for a in recipe.arms)


def idle_processes(recipe: Recipe, processes: int) -> list[str]:
    """One sentence for each stage whose optimiser steps have fewer rows than there are processes."""
    arms = set(recipe.arms)
    ppo = bool(arms & {"direct_ppo", "sft_ppo"})
    steps = [
        ("reward.batch_size", recipe.reward.batch_size, ppo and isinstance(recipe.ppo.reward, TrainedReward)),
        ("sft.batch_size", recipe.sft.batch_size, bool(arms & {"sft", "sft_ppo"})),
        ("dpo.batch_size", recipe.dpo.batch_size, "dpo" in arms),
        ("ppo.minibatch_size", recipe.ppo.minibatch_size, ppo),
    ]
    return [
        f"{key} = {rows}: {processes - rows} of {processes} processes idle in its steps"
        for key, rows, used in steps
        if used and rows < processes
    ]
