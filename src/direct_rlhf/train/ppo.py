"""PPO directly on the base model: one iteration is sample, score, estimate, update.

    rollout    = sample(policy, prompts)
    scored     = score(rollout, judges, reference, critics)
    experience = estimate(scored)
    stats      = update(policy, critics, experience)

Around them: the KL weight, the cost multiplier, held-out evaluation, the capability guard, the best checkpoint under a
KL bound, collapse detectors, the KL stop rule. A stop keeps what the iteration has done so far (`progress.Work`) and a
crash goes back to the last checkpoint; either way the run continues as if nothing had happened, because nothing here
draws from a global random state. Conventions are those of the maths room.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import Tokens
from direct_rlhf.data.types import Prompt, PromptData
from direct_rlhf.errors import ConfigError, DataError, DivergenceError, Interrupted
from direct_rlhf.maths import kl
from direct_rlhf.maths.lagrangian import Multiplier
from direct_rlhf.models.batches import SCORE_FACTOR
from direct_rlhf.models.loading import save_causal_lm
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.peaks import phase
from direct_rlhf.models.roles import COST_CRITIC, CRITIC, POLICY, Roles
from direct_rlhf.models.sharded import gathered, whole_on_cpu
from direct_rlhf.randomness import cycle
from direct_rlhf.recipe.schema import KLSection, OptimiserSection, PpoSection
from direct_rlhf.rollout.native import SAMPLERS, sample, sampler_path
from direct_rlhf.rollout.types import Rollout, SampleKey, SamplingSettings
from direct_rlhf.run.checkpoints import CheckpointStore
from direct_rlhf.run.context import StageContext
from direct_rlhf.run.points import point
from direct_rlhf.train import guard, progress
from direct_rlhf.train.experience import Judges, Scored, estimate, old_values, rollout_statistics, score
from direct_rlhf.train.health import detect, fault_alert
from direct_rlhf.train.loop import note_processes
from direct_rlhf.train.progress import Progress, Work
from direct_rlhf.train.prompts import HELD_OUT, encode_prompts, sampled_together, sampling_settings
from direct_rlhf.train.rehearsal import rehearse
from direct_rlhf.train.sampler import VllmSampler
from direct_rlhf.train.start import Sources, start
from direct_rlhf.train.step import Optimiser, Step
from direct_rlhf.train.update import Learner, Position, TextWindows, update

KL_STOP_WINDOW = 5
LEAST_KL = 0.01  # the weight that the guard's first raise starts from, if the recipe's is smaller


@dataclass(frozen=True)
class Inputs:
    """What a PPO arm is made from, beside the recipe."""

    arm: str
    init: str  # checkpoint to start from
    tokens: Tokens
    sources: Sources
    texts: Sequence[str] = ()  # for the ptx loss
    probe: guard.Probe | None = None  # for the capability guard


@dataclass
class Trainer:
    """Everything a PPO run holds; built once by `train_ppo`."""

    ctx: StageContext
    inputs: Inputs
    settings: SamplingSettings
    prompts: Sequence[tuple[Prompt, list[int]]]
    held_out: Sequence[tuple[Prompt, list[int]]]
    judges: Judges
    learner: Learner
    chunks: dict[str, ChunkSize]
    store: CheckpointStore
    best_store: CheckpointStore
    progress: Progress
    work: Work
    vllm: VllmSampler | None = None  # None: this package samples

    @property
    def arm(self) -> str:
        return self.inputs.arm

    @property
    def section(self) -> PpoSection:
        return self.learner.section

    @property
    def roles(self) -> Roles:
        return self.learner.roles

    @phase("save")
    def save(self, *, later: bool = False) -> None:
        later = later and self.ctx.recipe.parallel.asynchronous_checkpoints
        progress.save(
            self.store, self.progress, self.work, self.roles, self.learner.optimisers, self.chunks, later=later
        )


def train_ppo(ctx: StageContext, data: PromptData, inputs: Inputs) -> Path:
    """Run PPO and save the best policy under ``models/ARM``.

    Errors: DataError if no prompt fits; ConfigError for a reward that does not fit the base; DivergenceError on a
    numeric fault; OutOfMemoryError for one answer that does not fit; Interrupted (resumable) on a signal.
    """
    trainer = _prepare(ctx, data, inputs)
    state, section = trainer.progress, trainer.section
    metrics = ctx.run.metrics(inputs.arm)
    metrics.rewind(state.iteration)
    try:
        if state.iteration < section.iterations and not state.stopped:
            with phase("update"):
                rehearse(
                    trainer.learner,
                    trainer.judges,
                    trainer.prompts,
                    inputs.tokens,
                    trainer.settings,
                    ctx.check_stop_together,
                )
            _first_probe(trainer)
        with ctx.progress(f"PPO ({inputs.arm})", total=section.iterations) as bar:
            bar.advance(state.iteration)
            while state.iteration < section.iterations and not state.stopped:
                values = _iteration(trainer)
                metrics.log(state.iteration, values)
                shown = {name: values[name] for name in ("reward_mean", "kl_sequence", "length_mean") if name in values}
                bar.advance(1, **shown)
                done = state.iteration == section.iterations or bool(state.stopped)
                trainer.store.settle(wait=False)
                if state.iteration % section.checkpoint_every == 0 or done:
                    trainer.save(later=not done)
                point("ppo.iteration")
    except Interrupted:
        trainer.save()
        raise
    except DivergenceError:  # the last checkpoint stays as it was
        last = state.history[-1] if state.history else {}
        for row in trainer.work.alerts:
            ctx.run.alert(inputs.arm, state.iteration + 1, row | {"last": last})
        raise
    metrics.close()
    if trainer.vllm is not None:
        trainer.vllm.close()
    return _export(trainer)


def _iteration(trainer: Trainer) -> dict[str, float]:
    """One PPO iteration, or the rest of one that was broken off; returns its metrics."""
    ctx, section, state, work = trainer.ctx, trainer.section, trainer.progress, trainer.work
    number, learner = state.iteration, trainer.learner
    chosen = _pick_prompts(trainer, number)
    prompts = [prompt for prompt, _ in chosen]
    cap = rollout_cap(section, number)
    if work.rollout is None:
        work.rollout = _sample(trainer, chosen, number)
        point("ppo.rollout")
    if work.scored is None:
        work.scored = _score(trainer, work.rollout, prompts, cap)
        point("ppo.scored")
    weights = {"kl_coefficient": state.kl_coefficient, "multiplier": state.multiplier}
    weights["truncate"] = ctx.recipe.rollout.correction.truncate
    if not work.warmed:
        if number == 0 and section.critic.warmup:
            _warm_up(trainer, weights)
        work.warmed, work.position = True, Position()
        point("ppo.warmed")
    experience = estimate(work.scored, section=section, **weights)
    if not work.values:
        with phase("update"):
            stats = update(
                experience, learner, iteration=number, position=work.position, check_stop=ctx.check_stop_together
            )
        work.values = ctx.world.main(lambda: rollout_statistics(experience, prompts)) | stats
        work.values |= {"kl_coefficient": state.kl_coefficient, "length_cap": float(cap)}
        if section.lagrangian.enabled:
            work.values["multiplier"] = state.multiplier
        point("ppo.updated")
    values = dict(work.values)
    if (number + 1) % section.evaluate_every == 0 or number + 1 == section.iterations:
        values |= _evaluate(trainer, number + 1)
        point("ppo.evaluated")
    # Nothing below is broken off by a stop.
    values |= _steer(section, state, values["kl_sequence"], work.scored)
    state.history = [*state.history, dict(work.values)][-200:]
    state.iteration, trainer.work = number + 1, Work()
    for row in work.alerts:
        ctx.run.alert(trainer.arm, state.iteration, row)
    _write_samples(trainer, state.iteration, prompts, work.rollout, work.scored.raw_score_B.tolist())
    _watch(trainer, values, cap)
    return values


@phase("update")
def _warm_up(trainer: Trainer, weights: dict[str, float]) -> None:
    """Critic-only updates before the policy moves for the first time; then the values are those of the new critics."""
    work, learner, ctx = trainer.work, trainer.learner, trainer.ctx
    assert work.scored is not None
    update(
        estimate(work.scored, section=trainer.section, **weights),
        learner,
        iteration=0,
        position=work.position,
        check_stop=ctx.check_stop_together,
        critic_only_steps=trainer.section.critic.warmup,
    )
    values = {
        role: old_values(
            work.scored.rollout,
            role,
            roles=learner.roles,
            chunk=trainer.chunks["score"],
            check_stop=ctx.check_stop,
            world=ctx.world,
        )
        for role in learner.roles.trained[1:]
    }
    work.scored = replace(work.scored, value_BT=values[CRITIC], cost_value_BT=values.get(COST_CRITIC))


def _steer(section: PpoSection, state: Progress, kl_sequence: float, scored: Scored) -> dict[str, float]:
    """The KL weight and the cost multiplier of the next iteration; what to log about the costs."""
    following = next_coefficient(section.kl, state.kl_coefficient, kl_sequence, len(scored.rollout))
    state.kl_coefficient = max(following, state.kl_floor)
    lagrangian = section.lagrangian
    if not lagrangian.enabled or scored.cost_B is None:
        return {}
    state.costs = [*state.costs, *scored.cost_B.tolist()][-lagrangian.window :]
    mean_cost = sum(state.costs) / len(state.costs)
    multiplier = Multiplier(state.multiplier, lagrangian.learning_rate, lagrangian.bound, lagrangian.max_multiplier)
    state.multiplier = multiplier.update(mean_cost).value
    return {"cost_window_mean": mean_cost}


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


@phase("sample")
def _sample(trainer: Trainer, chosen: Sequence[tuple[Prompt, list[int]]], iteration: int) -> Rollout:
    each = trainer.section.samples_per_prompt if iteration != HELD_OUT else 1
    seed = trainer.ctx.recipe.seed
    keys = [SampleKey(seed, prompt.id, iteration, row % each) for row, (prompt, _) in enumerate(chosen)]
    settings = trainer.settings
    if iteration != HELD_OUT:
        settings = replace(settings, max_new_tokens=rollout_cap(trainer.section, iteration))
    version = trainer.learner.policy_version
    if trainer.vllm is not None:
        prompts = [ids for _, ids in chosen]
        return trainer.vllm.sample(prompts, keys, settings, policy_version=version, each=each)

    with trainer.roles.acting() as policy, gathered(policy):

        def draw(rows: list[int]) -> Rollout:
            return trainer.chunks["sample"].run(
                lambda size: sample(
                    policy,
                    trainer.inputs.tokens,
                    [chosen[row][1] for row in rows],
                    [keys[row] for row in rows],
                    settings,
                    policy_version=version,
                    batch_size=size,
                    should_stop=trainer.ctx.should_stop,
                ).cpu()
            )

        return sampled_together(trainer.ctx.world, len(chosen), draw, each=each)


@phase("score")
def _score(trainer: Trainer, rollout: Rollout, prompts: Sequence[Prompt], cap: int) -> Scored:
    return score(
        rollout,
        prompts,
        roles=trainer.roles,
        judges=trainer.judges,
        section=trainer.section,
        cap=cap,
        check_stop=trainer.ctx.check_stop,
        chunk=trainer.chunks["score"],
        world=trainer.ctx.world,
    )


@phase("evaluate")
def _evaluate(trainer: Trainer, iteration: int) -> dict[str, float]:
    """Held-out reward, KL and general skill of the current policy; the guard acts, and the best policy is kept."""
    section, state = trainer.section, trainer.progress
    values: dict[str, float] = {}
    if trainer.held_out:
        rollout = _sample(trainer, trainer.held_out, HELD_OUT)
        prompts = [prompt for prompt, _ in trainer.held_out]
        scored = _score(trainer, rollout, prompts, section.sampling.max_new_tokens)
        gap = torch.where(rollout.action_mask_BT, rollout.logprob_BT - scored.reference_BT, 0.0).sum(1)
        values = _interval("held_out_reward", scored.score_B) | {
            "held_out_kl": float(gap.mean()),
            "held_out_length": float(rollout.action_mask_BT.sum(1).float().mean()),
        }
        if scored.raw_cost_B is not None:
            values |= _interval("held_out_cost", scored.raw_cost_B)
    verdict = _probe(trainer)
    # Nothing below is broken off by a stop.
    if verdict is not None:
        values |= verdict.metrics()
        _guard(trainer, verdict, iteration)
    merit = _merit(section, state, values, verdict, iteration)
    if merit is not None and (state.best is None or merit > state.best["merit"]):
        held_out = {name: value for name, value in values.items() if name in ("held_out_reward", "held_out_kl")}
        state.best = {"iteration": float(iteration), **held_out, "merit": merit}
        trainer.best_store.save(iteration, {POLICY: trainer.roles.state(POLICY)}, {"best": state.best})
    return values


def _merit(
    section: PpoSection, state: Progress, values: dict[str, float], verdict: guard.Verdict | None, iteration: int
) -> float | None:
    """What the best policy is chosen by; None for one that must not be it."""
    if verdict is not None and not verdict.within:
        return None
    if "held_out_reward" not in values:
        return None if verdict is None else float(iteration)  # the last one that kept its general skill
    if values["held_out_kl"] > (section.best_kl_limit or 2 * section.kl.target):
        return None
    if not section.lagrangian.enabled:
        return values["held_out_reward"]
    over = max(values["held_out_cost"] - section.lagrangian.bound, 0.0)
    return values["held_out_reward"] - state.multiplier * over


def _interval(name: str, x_B: torch.Tensor) -> dict[str, float]:
    """Mean with a 95 % normal interval, for the metrics."""
    mean, spread = float(x_B.mean()), 1.96 * float(x_B.std(correction=0)) / max(len(x_B), 1) ** 0.5
    return {name: mean, f"{name}_low": mean - spread, f"{name}_high": mean + spread}


@phase("evaluate")
def _first_probe(trainer: Trainer) -> None:
    """What later probes are compared with: the general skill of the policy as it starts."""
    if trainer.section.guard.action != "off" and trainer.progress.probe_start is None:
        trainer.progress.probe_start = _look(trainer)
        # what is saved if no later policy keeps its general skill
        trainer.best_store.save(0, {POLICY: trainer.roles.state(POLICY)}, {"best": None})


def _probe(trainer: Trainer) -> guard.Verdict | None:
    start = trainer.progress.probe_start
    return None if start is None else guard.compare(start, _look(trainer), trainer.section.guard)


def _look(trainer: Trainer) -> dict[str, list[float]]:
    probe = trainer.inputs.probe
    if probe is None:
        raise ConfigError(f"ppo.guard.action = {trainer.section.guard.action}: needs a probe of general skill")

    def look() -> dict[str, list[float]]:
        scores = probe(policy, should_stop=trainer.ctx.should_stop)
        return {task: list(map(float, values)) for task, values in scores.items()}

    with trainer.roles.acting() as policy, gathered(policy):
        return trainer.ctx.world.main(look)


def _guard(trainer: Trainer, verdict: guard.Verdict, iteration: int) -> None:
    """Raise the KL weight, or stop the run, where general skill has dropped beyond the bound."""
    section, state = trainer.section.guard, trainer.progress
    state.probes += 1
    state.worst = verdict.difference if state.worst is None else min(state.worst, verdict.difference)
    if not verdict.dropped:
        return
    if section.action == "raise_kl" and state.raises < section.max_raises:
        state.raises += 1
        state.kl_coefficient = state.kl_floor = max(state.kl_coefficient, LEAST_KL) * section.kl_factor
        done = f"The KL weight was raised to {state.kl_coefficient:.3g} ({state.raises} of {section.max_raises})."
    else:
        done = "The run was stopped."
        state.stopped = (
            f"general skill dropped by {-verdict.difference:.1%} [{-verdict.high:.1%}, {-verdict.low:.1%}], over the "
            f"bound of {section.max_drop:.1%} (ppo.guard.max_drop); the best checkpoint is kept"
        )
    row = guard.alert(verdict, section, done)
    trainer.work.alerts.append(row)
    trainer.ctx.say(f"[{trainer.arm}, iteration {iteration}] {row['seen']} {done}")


def _watch(trainer: Trainer, values: dict[str, float], cap: int) -> None:
    """Say each new alert once, and apply the KL stop rule."""
    section, state = trainer.section, trainer.progress
    apart = trainer.ctx.recipe.rollout.correction.alert_above
    for alert in detect(state.history, cap=cap, kl_target=section.kl.target, mismatch_limit=apart):
        values[f"alert_{alert.name}"] = 1.0
        if alert.name not in state.alerts:
            state.alerts.append(alert.name)
            trainer.ctx.run.alert(trainer.arm, state.iteration, asdict(alert))
            trainer.ctx.say(f"[{trainer.arm}, iteration {state.iteration}] {alert}")
    recent = [row["kl_sequence"] for row in state.history[-KL_STOP_WINDOW:]]
    limit = section.kl.stop_factor * section.kl.target
    if not state.stopped and len(recent) == KL_STOP_WINDOW and sum(recent) / len(recent) > limit:
        state.stopped = (
            f"the mean KL of {KL_STOP_WINDOW} iterations is {sum(recent) / len(recent):.1f} nats, over the limit of "
            f"{limit:g} (ppo.kl.stop_factor x target); the best checkpoint is kept"
        )
    if state.stopped:
        trainer.ctx.say(f"[{trainer.arm}] stopped: {state.stopped}")


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


@phase("load")
def _prepare(ctx: StageContext, data: PromptData, inputs: Inputs) -> Trainer:
    recipe, section, tokens = ctx.recipe, ctx.recipe.ppo, inputs.tokens
    dialogue = DialogueFormat(recipe.dialogue, tokens)
    settings = sampling_settings(section, dialogue)
    prompts = encode_prompts(data.train, dialogue, recipe.data.max_prompt_tokens)
    if not prompts:
        raise DataError(
            f"PPO ({inputs.arm}): none of {len(data.train)} training prompts fits into data.max_prompt_tokens = "
            f"{recipe.data.max_prompt_tokens}; raise it or give other prompts"
        )
    roles, judges = start(
        ctx, init=inputs.init, tokens=tokens, prompts=prompts, settings=settings, sources=inputs.sources
    )
    sizes = {
        "sample": section.rollouts,
        "score": SCORE_FACTOR * section.micro_batch_tokens,
        "update": section.micro_batch_tokens,
    }
    together = ctx.world.size > 1
    chunks = {
        name: ChunkSize(f"{inputs.arm}, {name}", size, ctx.say, fixed=together and name == "update")
        for name, size in sizes.items()
    }
    trainer = Trainer(
        ctx=ctx,
        inputs=inputs,
        settings=settings,
        prompts=prompts,
        held_out=encode_prompts(data.held_out, dialogue, recipe.data.max_prompt_tokens)[: section.evaluate_prompts],
        judges=judges,
        learner=Learner(
            roles=roles,
            section=section,
            optimisers=_optimisers(section, roles),
            text=_text_windows(section, tokens, inputs.texts),
            seed=recipe.seed,
            chunk=chunks["update"],
            report=lambda step, batch: _note_fault(trainer, step, batch),
            world=ctx.world,
        ),
        chunks=chunks,
        store=ctx.run.checkpoints(inputs.arm, keep=section.keep_checkpoints),
        best_store=ctx.run.checkpoints(f"{inputs.arm}-best", keep=1),
        progress=Progress(kl_coefficient=section.kl.coefficient, multiplier=section.lagrangian.multiplier),
        work=Work(),
    )
    _settle_sampler(trainer)
    checkpoint = trainer.store.latest()
    if checkpoint is not None:
        note_processes(ctx, checkpoint, inputs.arm)
    trainer.work = progress.restore(checkpoint, trainer.progress, roles, trainer.learner.optimisers, chunks)
    return trainer


def _settle_sampler(trainer: Trainer) -> None:
    """Who samples: this package, or vLLM, which is reached or started now."""
    ctx, arm, roles = trainer.ctx, trainer.arm, trainer.roles
    if ctx.recipe.rollout.engine == "vllm":
        longest = max(len(ids) for _, ids in [*trainer.prompts, *trainer.held_out]) + trainer.settings.max_new_tokens
        trainer.vllm = VllmSampler.start(
            ctx, trainer.inputs.tokens, roles, trainer.inputs.init, longest, trainer.chunks["score"]
        )
        sampler, words = "vllm", trainer.vllm.engine.name
    else:
        with gathered(roles.policy):
            path = sampler_path(roles.policy)
        sampler, words = path, SAMPLERS[path]
    ctx.run.note(arm, {"sampler": sampler})
    ctx.say(f"[{arm}] answers are sampled by {words}")


def _optimisers(section: PpoSection, roles: Roles) -> dict[str, Optimiser]:
    """One for each trained role; the critics also step in the warm-up."""
    steps = section.iterations * section.epochs * section.rollouts // section.minibatch_size

    def one(role: str) -> Optimiser:
        settings: OptimiserSection = section.optimiser if role == POLICY else section.critic.optimiser
        extra = 0 if role == POLICY else section.critic.warmup
        return Optimiser(roles.parameters(role), settings, total_steps=steps + extra)

    return {role: one(role) for role in roles.trained}


def _note_fault(trainer: Trainer, step: Step, batch: list[str]) -> None:
    trainer.work.alerts.append(fault_alert(step.fault, step.seen, batch))
    trainer.ctx.say(f"[{trainer.arm}] {step.seen}")


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


def _export(trainer: Trainer) -> Path:
    """Save the best policy as a plain checkpoint; where none was fit to be kept, the last one, with a word."""
    ctx, state, section = trainer.ctx, trainer.progress, trainer.section
    kept = trainer.best_store.latest()
    if kept is not None:
        trainer.roles.load_state(POLICY, kept.tensors(POLICY, like=trainer.roles.named(POLICY)))
    if (trainer.held_out or kept is not None) and state.best is None:
        saved = "the one PPO started from" if kept is not None else "the last one"
        skill = " and kept its general skill" if kept is not None else ""
        ctx.say(f"[{trainer.arm}] no evaluated policy stayed under the KL bound{skill}; {saved} is saved")
    facts: dict[str, Any] = {
        "iterations": state.iteration,
        "best": state.best,
        "stopped": state.stopped,
        "alerts": state.alerts,
        "tuning": ctx.recipe.model.tuning,
        "prompts": len(trainer.prompts),
        "reward": trainer.judges.reward.name,
        "chunk_halvings": {name: chunk.halvings for name, chunk in trainer.chunks.items() if chunk.halvings},
    }
    if section.guard.action != "off":
        facts["guard"] = {
            "action": section.guard.action,
            "max_drop": section.guard.max_drop,
            "probes": state.probes,
            "raises": state.raises,
            "worst": state.worst,
            "stopped": "general skill" in state.stopped,
        }
    if trainer.judges.cost is not None:
        facts["lagrangian"] = {"cost": trainer.judges.cost.name, "multiplier": state.multiplier}
    ctx.run.note(trainer.arm, facts)
    folder: Path = ctx.run.path / "models" / trainer.arm
    with whole_on_cpu(trainer.roles.policy, keep=ctx.world.is_main):
        ctx.world.main(
            lambda: save_causal_lm(
                trainer.roles.policy,
                trainer.inputs.tokens,
                folder,
                stop_strings=list(trainer.settings.stop_strings),
                adapter=POLICY if ctx.recipe.model.tuning == "lora" else None,
                card=f"# {trainer.arm}\n\nMade by direct-rlhf from `{ctx.recipe.model.base}`.\n",
            )
        )
    return folder
