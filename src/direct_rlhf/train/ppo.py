"""PPO directly on the base model: one iteration is sample, score, estimate, update.

    rollout    = sample(policy, prompts)
    scored     = score(rollout, reward, reference, critic)
    experience = estimate(scored)
    stats      = update(policy, critic, experience)

Around them: adaptive KL weight, held-out evaluation, best checkpoint under a KL bound, collapse detectors, the KL stop
rule, checkpoints at iteration borders. Conventions are those of the maths room. Nothing here draws from a global random
state, so a resumed run needs only weights, optimisers, the KL weight and the counters.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import Tokens
from direct_rlhf.data.types import Prompt, PromptData
from direct_rlhf.errors import DataError, Interrupted
from direct_rlhf.maths import kl
from direct_rlhf.models.loading import save_causal_lm
from direct_rlhf.models.roles import CRITIC, POLICY, Roles
from direct_rlhf.randomness import cycle
from direct_rlhf.recipe.schema import KLSection, PpoSection
from direct_rlhf.rollout.native import sample
from direct_rlhf.rollout.types import Rollout, SampleKey, SamplingSettings
from direct_rlhf.run.checkpoints import CheckpointStore, pack, unpack
from direct_rlhf.run.context import StageContext
from direct_rlhf.train.experience import estimate, old_values, rollout_statistics, score
from direct_rlhf.train.health import detect
from direct_rlhf.train.prompts import HELD_OUT, encode_prompts, sampling_settings
from direct_rlhf.train.reward_sources import Reward
from direct_rlhf.train.start import start
from direct_rlhf.train.step import Optimiser
from direct_rlhf.train.update import TextWindows, update

KL_STOP_WINDOW = 5


@dataclass
class Progress:
    """What a PPO run remembers from iteration to iteration, beside weights and optimisers."""

    iteration: int = 0  # iterations done
    policy_version: int = 0  # updates the policy has taken
    kl_coefficient: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)  # the metrics that detectors and the stop rule read
    alerts: list[str] = field(default_factory=list)  # names already said
    best: dict[str, float] | None = None  # iteration, held_out_reward, held_out_kl
    stopped: str = ""  # why the run ended before its last iteration


@dataclass(frozen=True)
class Trainer:
    """Everything a PPO run holds; built once by `train_ppo`."""

    ctx: StageContext
    arm: str
    section: PpoSection
    tokens: Tokens
    settings: SamplingSettings
    prompts: Sequence[tuple[Prompt, list[int]]]
    held_out: Sequence[tuple[Prompt, list[int]]]
    roles: Roles
    reward: Reward
    text: TextWindows | None
    policy_optimiser: Optimiser
    critic_optimiser: Optimiser
    store: CheckpointStore
    best_store: CheckpointStore
    progress: Progress


def train_ppo(
    ctx: StageContext,
    data: PromptData,
    *,
    arm: str,
    init: str,
    tokens: Tokens,
    reward_folder: Path,
    recipe_folder: Path,
    texts: Sequence[str] = (),
) -> Path:
    """Run PPO from the checkpoint ``init`` and save the best policy under ``models/ARM``.

    ``reward_folder`` holds the reward model where the recipe asks for one; a Python reward is looked up beside the
    recipe. Raises DataError if no prompt fits, ConfigError for a reward that does not fit the base, DivergenceError on
    a numeric fault, Interrupted (resumable) on a signal.
    """
    trainer = _prepare(ctx, data, arm, init, tokens, reward_folder, recipe_folder, texts)
    progress, section = trainer.progress, trainer.section
    metrics = ctx.run.metrics(arm)
    metrics.rewind(progress.iteration)
    with ctx.progress(f"PPO ({arm})", total=section.iterations) as bar:
        bar.advance(progress.iteration)
        while progress.iteration < section.iterations and not progress.stopped:
            try:
                values = _iteration(trainer)
            except Interrupted:
                _save(trainer)  # the weights are those of the iteration's start: it will be sampled again
                raise
            metrics.log(progress.iteration, values)
            shown = {name: values[name] for name in ("reward_mean", "kl_sequence", "length_mean") if name in values}
            bar.advance(1, **shown)
            if progress.iteration % section.checkpoint_every == 0 or progress.iteration == section.iterations:
                _save(trainer)
    metrics.close()
    return _export(trainer)


def _iteration(trainer: Trainer) -> dict[str, float]:
    """One PPO iteration; returns its metrics and moves `progress`."""
    ctx, section, progress = trainer.ctx, trainer.section, trainer.progress
    number = progress.iteration
    chosen = _pick_prompts(trainer, number)
    rollout = _sample(trainer, chosen, number)
    prompts = [prompt for prompt, _ in chosen]
    cap = rollout_cap(section, number)

    scored = score(
        rollout,
        prompts,
        roles=trainer.roles,
        reward=trainer.reward,
        section=section,
        cap=cap,
        check_stop=ctx.check_stop,
    )
    updater: dict[str, Any] = {
        "roles": trainer.roles,
        "policy_optimiser": trainer.policy_optimiser,
        "critic_optimiser": trainer.critic_optimiser,
        "section": section,
        "text": trainer.text,
        "seed": ctx.recipe.seed,
        "iteration": number,
    }
    if number == 0 and section.critic.warmup:
        experience = estimate(scored, section=section, kl_coefficient=progress.kl_coefficient)
        update(experience, critic_only_steps=section.critic.warmup, **updater)
        scored = replace(scored, value_BT=old_values(rollout, roles=trainer.roles, section=section))
    experience = estimate(scored, section=section, kl_coefficient=progress.kl_coefficient)
    stats = update(experience, **updater)

    values = rollout_statistics(experience, prompts) | stats
    values |= {"kl_coefficient": progress.kl_coefficient, "length_cap": float(cap)}
    _write_samples(trainer, number + 1, prompts, rollout, scored.raw_score_B.tolist())
    progress.kl_coefficient = next_coefficient(section.kl, progress.kl_coefficient, values["kl_sequence"], len(rollout))
    progress.iteration += 1
    progress.policy_version += 1
    progress.history = [*progress.history, values][-200:]
    if progress.iteration % section.evaluate_every == 0 or progress.iteration == section.iterations:
        values |= _evaluate(trainer)
    _watch(trainer, values, cap)
    return values


def rollout_cap(section: PpoSection, iteration: int) -> int:
    """Tokens an answer may have at ``iteration``, by the cap schedule."""
    caps = [cap for start, cap in sorted(section.length.cap_schedule) if start <= iteration]
    return caps[-1] if caps else section.sampling.max_new_tokens


def next_coefficient(section: KLSection, coefficient: float, mean_sequence_kl: float, episodes: int) -> float:
    """beta for the next iteration."""
    controller: kl.FixedKL | kl.AdaptiveKL = kl.FixedKL(coefficient)
    if section.controller == "adaptive":
        controller = kl.AdaptiveKL(coefficient=coefficient, target=section.target, horizon=section.horizon)
    return controller.update(mean_sequence_kl, episodes).coefficient


def _pick_prompts(trainer: Trainer, iteration: int) -> list[tuple[Prompt, list[int]]]:
    each = trainer.section.samples_per_prompt
    count = trainer.section.rollouts // each
    picked = cycle(len(trainer.prompts), iteration * count, count, trainer.ctx.recipe.seed, "prompts")
    return [trainer.prompts[i] for i in picked for _ in range(each)]


def _sample(trainer: Trainer, chosen: Sequence[tuple[Prompt, list[int]]], iteration: int) -> Rollout:
    each = trainer.section.samples_per_prompt if iteration != HELD_OUT else 1
    seed = trainer.ctx.recipe.seed
    keys = [SampleKey(seed, prompt.id, iteration, row % each) for row, (prompt, _) in enumerate(chosen)]
    settings = trainer.settings
    if iteration != HELD_OUT:
        settings = replace(settings, max_new_tokens=rollout_cap(trainer.section, iteration))
    with trainer.roles.acting() as policy:
        return sample(
            policy,
            trainer.tokens,
            [ids for _, ids in chosen],
            keys,
            settings,
            policy_version=trainer.progress.policy_version,
            # an evaluation is not broken off: it stands between an update and its line in the metrics
            should_stop=trainer.ctx.should_stop if iteration != HELD_OUT else None,
        )


def _evaluate(trainer: Trainer) -> dict[str, float]:
    """Held-out reward and KL of the current policy; keeps it if it is the best under the KL bound."""
    if not trainer.held_out:
        return {}
    section, progress = trainer.section, trainer.progress
    rollout = _sample(trainer, trainer.held_out, HELD_OUT)
    prompts = [prompt for prompt, _ in trainer.held_out]
    scored = score(
        rollout,
        prompts,
        roles=trainer.roles,
        reward=trainer.reward,
        section=section,
        cap=section.sampling.max_new_tokens,
        check_stop=lambda: None,
    )
    gap = torch.where(rollout.action_mask_BT, rollout.logprob_BT - scored.reference_BT, 0.0).sum(1)
    reward, divergence = float(scored.score_B.mean()), float(gap.mean())
    limit = section.best_kl_limit or 2 * section.kl.target
    if divergence <= limit and (progress.best is None or reward > progress.best["held_out_reward"]):
        progress.best = {
            "iteration": float(progress.iteration),
            "held_out_reward": reward,
            "held_out_kl": divergence,
        }
        trainer.best_store.save(progress.iteration, {POLICY: trainer.roles.state(POLICY)}, {"best": progress.best})
    spread = 1.96 * float(scored.score_B.std(correction=0)) / max(len(rollout), 1) ** 0.5
    return {
        "held_out_reward": reward,
        "held_out_reward_low": reward - spread,
        "held_out_reward_high": reward + spread,
        "held_out_kl": divergence,
        "held_out_length": float(rollout.action_mask_BT.sum(1).float().mean()),
    }


def _watch(trainer: Trainer, values: dict[str, float], cap: int) -> None:
    """Say each new alert once, and apply the KL stop rule."""
    section, progress = trainer.section, trainer.progress
    for alert in detect(progress.history, cap=cap, kl_target=section.kl.target):
        values[f"alert_{alert.name}"] = 1.0
        if alert.name not in progress.alerts:
            progress.alerts.append(alert.name)
            trainer.ctx.run.alert(trainer.arm, progress.iteration, asdict(alert))
            trainer.ctx.say(f"[{trainer.arm}, iteration {progress.iteration}] {alert}")
    recent = [row["kl_sequence"] for row in progress.history[-KL_STOP_WINDOW:]]
    limit = section.kl.stop_factor * section.kl.target
    if len(recent) == KL_STOP_WINDOW and sum(recent) / len(recent) > limit:
        progress.stopped = (
            f"the mean KL of {KL_STOP_WINDOW} iterations is {sum(recent) / len(recent):.1f} nats, over the limit of "
            f"{limit:g} (ppo.kl.stop_factor x target); the best checkpoint is kept"
        )
        trainer.ctx.say(f"[{trainer.arm}] stopped: {progress.stopped}")


def _write_samples(
    trainer: Trainer, step: int, prompts: Sequence[Prompt], rollout: Rollout, scores: Sequence[float]
) -> None:
    rows = [
        {
            "prompt": [{"role": turn.role, "content": turn.text} for turn in prompts[i].turns],
            "answer": rollout.texts[i],
            "score": scores[i],
            "finish": str(rollout.finish[i]),
            "kind": prompts[i].kind,
        }
        for i in range(min(trainer.ctx.recipe.logging.samples, len(rollout)))
    ]
    trainer.ctx.run.sample(trainer.arm, step, rows)


def _prepare(
    ctx: StageContext,
    data: PromptData,
    arm: str,
    init: str,
    tokens: Tokens,
    reward_folder: Path,
    recipe_folder: Path,
    texts: Sequence[str],
) -> Trainer:
    recipe, section = ctx.recipe, ctx.recipe.ppo
    dialogue = DialogueFormat(recipe.dialogue, tokens)
    settings = sampling_settings(section, dialogue)
    prompts = encode_prompts(data.train, dialogue, recipe.data.max_prompt_tokens)
    if not prompts:
        raise DataError(
            f"PPO ({arm}): none of {len(data.train)} training prompts fits into data.max_prompt_tokens = "
            f"{recipe.data.max_prompt_tokens}; raise it or give other prompts"
        )
    roles, reward = start(
        ctx,
        init=init,
        tokens=dialogue.tokens,
        prompts=prompts,
        settings=settings,
        reward_folder=reward_folder,
        recipe_folder=recipe_folder,
    )
    steps = section.iterations * section.epochs * section.rollouts // section.minibatch_size
    trainer = Trainer(
        ctx=ctx,
        arm=arm,
        section=section,
        tokens=dialogue.tokens,
        settings=settings,
        prompts=prompts,
        held_out=encode_prompts(data.held_out, dialogue, recipe.data.max_prompt_tokens)[: section.evaluate_prompts],
        roles=roles,
        reward=reward,
        text=_text_windows(section, tokens, texts),
        policy_optimiser=Optimiser(roles.policy_parameters(), section.optimiser, total_steps=steps),
        critic_optimiser=Optimiser(
            roles.critic_parameters(),
            section.critic.optimiser,
            total_steps=steps + section.critic.warmup,
        ),
        store=ctx.run.checkpoints(arm, keep=section.keep_checkpoints),
        best_store=ctx.run.checkpoints(f"{arm}-best", keep=1),
        progress=Progress(kl_coefficient=section.kl.coefficient),
    )
    _restore(trainer)
    return trainer


def _text_windows(section: PpoSection, tokens: Tokens, texts: Sequence[str]) -> TextWindows | None:
    if section.ptx.weight == 0:
        return None
    window = section.ptx.window
    ids = [tokens.encode(text, bos=True)[:window] for text in texts]
    windows = [row for row in ids if len(row) >= 2]
    if len(windows) < section.ptx.batch_size:
        raise DataError(
            f"ppo.ptx.weight is {section.ptx.weight:g}, but data.text holds {len(windows)} usable texts for batches of "
            f"{section.ptx.batch_size}; name a text source under data.text, or set ppo.ptx.weight=0"
        )
    return TextWindows(windows, section.ptx.weight, section.ptx.batch_size)


def _save(trainer: Trainer) -> None:
    """One checkpoint at an iteration border: weights, optimisers, counters."""
    roles, progress = trainer.roles, trainer.progress
    policy_tensors, policy_state = pack(trainer.policy_optimiser.state())
    critic_tensors, critic_state = pack(trainer.critic_optimiser.state())
    trainer.store.save(
        progress.iteration,
        {
            POLICY: roles.state(POLICY),
            CRITIC: roles.state(CRITIC),
            "policy_optimiser": policy_tensors,
            "critic_optimiser": critic_tensors,
        },
        {"progress": asdict(progress), "policy_optimiser": policy_state, "critic_optimiser": critic_state},
    )


def _restore(trainer: Trainer) -> None:
    checkpoint = trainer.store.latest()
    if checkpoint is None:
        return
    for role in (POLICY, CRITIC):
        trainer.roles.load_state(role, checkpoint.tensors(role))
    for name, optimiser in (
        ("policy_optimiser", trainer.policy_optimiser),
        ("critic_optimiser", trainer.critic_optimiser),
    ):
        optimiser.load_state(unpack(checkpoint.tensors(name), checkpoint.state[name]))
    for name, value in checkpoint.state["progress"].items():
        setattr(trainer.progress, name, value)


def _export(trainer: Trainer) -> Path:
    """Save the best policy (the last one, with a word, where none stayed under the KL bound) as a plain checkpoint."""
    ctx, progress = trainer.ctx, trainer.progress
    kept = trainer.best_store.latest()
    if kept is not None:
        trainer.roles.load_state(POLICY, kept.tensors(POLICY))
    elif trainer.held_out:
        ctx.say(f"[{trainer.arm}] no evaluated policy stayed under the KL bound; the last one is saved")
    facts = {
        "iterations": progress.iteration,
        "best": progress.best,
        "stopped": progress.stopped,
        "alerts": progress.alerts,
        "tuning": ctx.recipe.model.tuning,
        "prompts": len(trainer.prompts),
        "reward": trainer.reward.name,
    }
    ctx.run.note(trainer.arm, facts)
    folder: Path = ctx.run.path / "models" / trainer.arm
    save_causal_lm(
        trainer.roles.policy,
        trainer.tokens,
        folder,
        stop_strings=list(trainer.settings.stop_strings),
        adapter=POLICY if ctx.recipe.model.tuning == "lora" else None,
        card=f"# {trainer.arm}\n\nMade by direct-rlhf from `{ctx.recipe.model.base}`.\n",
    )
    return folder
