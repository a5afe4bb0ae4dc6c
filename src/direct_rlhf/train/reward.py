"""The reward model: Bradley-Terry on the preference pairs, then normalised on the base model's own samples.

Legend: B pairs.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import Tokens, load_tokens
from direct_rlhf.data.types import PreferenceData, Prompt, prompt_hash
from direct_rlhf.errors import DataError
from direct_rlhf.maths.intervals import wilson
from direct_rlhf.maths.losses import bradley_terry
from direct_rlhf.models.batches import BATCH_TOKENS
from direct_rlhf.models.loading import autocast, base_identity, load_for
from direct_rlhf.models.reward_model import ADAPTER, QUANTILES, Facts, Normalisation, RewardModel
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.models.sharded import gathered, whole_on_cpu
from direct_rlhf.recipe.schema import Recipe, RewardSection
from direct_rlhf.rollout.types import SamplingSettings
from direct_rlhf.run.context import StageContext
from direct_rlhf.train.loop import HELD_OUT_ITEMS, Task, load_trainee, run_steps
from direct_rlhf.train.pairs import EncodedPair, encode_pairs, of_kinds, pair_batches
from direct_rlhf.train.parallel import Cut, Layout, spread, to_measure, to_train
from direct_rlhf.train.prompts import SAMPLED_AT_ONCE, base_answers, encode_prompts, sampling_settings
from direct_rlhf.train.reward_sources import Answer, check_finite

MIN_FINISHED = 64  # fewer finished samples of the base than this, and cut ones are used as well
ANSWER_SLACK = 3  # a sampled token that is not valid text can become three when its text is encoded again


def train_reward_model(
    ctx: StageContext,
    data: PreferenceData,
    *,
    tokens: Tokens | None = None,
    which: str = "reward",
    section: RewardSection | None = None,
) -> Path:
    """Train a reward model from the base, normalise it, and save it as ``reward_model`` (or ``cost_model``) of the run.

    ``which`` names the recipe's section; with a ``section`` given, metrics and the folder ``WHICH_model`` alone. A cost
    model is a reward model too: cost = -(its score).
    Errors: DataError if no pair fits, if margins are asked for and missing, or if all samples get the same score.
    """
    recipe = ctx.recipe
    section = section or getattr(recipe, which)
    title = f"{which.replace('_', ' ')} model"
    tokens = tokens or load_tokens(recipe.model.base, revision=recipe.model.revision)
    dialogue = DialogueFormat(recipe.dialogue, tokens)
    train = encode_pairs(of_kinds(data.train, section.kinds, which), dialogue, recipe.data)
    held_out = encode_pairs(of_kinds(data.held_out, section.kinds, which), dialogue, recipe.data)[:HELD_OUT_ITEMS]
    if section.margin:
        _check_margins(train)
    layout = Layout.of(ctx)
    trainee = load_trainee(recipe, layout.loads_on, ADAPTER)
    identity = ctx.world.main(lambda: base_identity(recipe.model, trainee))
    scalar = layout.trained(ScalarModel.from_base(trainee, seed=recipe.seed))
    training, measuring = to_train(ctx.world), to_measure(ctx.world)

    def accumulate(rows: list[int], slots: int) -> dict[str, float]:
        return ctx.world.sum(pair_loss([train[row] for row in rows], slots, training, backward=True))

    def evaluate(slots: int) -> dict[str, float]:
        values: dict[str, float] = {}
        if held_out:
            with gathered(scalar):
                share = ctx.world.together(lambda: pair_loss(held_out, slots, measuring, backward=False))
            values = ctx.world.sum(share)
        named = {f"held_out_{name}": value for name, value in values.items()}
        if held_out:
            low, high = wilson(values["accuracy"] * len(held_out), len(held_out)) or (0.0, 1.0)
            named |= {"held_out_accuracy_low": low, "held_out_accuracy_high": high}
        return named

    def pair_loss(pairs: Sequence[EncodedPair], slots: int, cut: Cut, *, backward: bool) -> dict[str, float]:
        """This process's share of mean loss and statistics over ``pairs``; with ``backward`` its gradient is added."""
        n = len(pairs)
        sums = dict.fromkeys(("loss", "accuracy", "margin", "chosen_score", "rejected_score"), 0.0)
        with torch.set_grad_enabled(backward), autocast(ctx.device, recipe.model.dtype):
            for batch in pair_batches(pairs, ctx.device, slots, cut):
                if not backward:
                    ctx.check_stop()
                chosen_B, rejected_B = scalar.scores(batch.ids_BL, batch.mask_BL).chunk(2)
                margin_B = margins([pairs[row] for row in batch.rows]).to(ctx.device) if section.margin else None
                loss = bradley_terry(chosen_B, rejected_B, margin_B, section.centring, denominator=n)
                if backward:
                    (loss if batch.counts else 0.0 * loss).backward()
                if not batch.counts:
                    continue
                chosen_B, rejected_B = chosen_B.detach(), rejected_B.detach()
                sums["loss"] += float(loss.detach())
                sums["accuracy"] += float((chosen_B > rejected_B).sum()) / n
                sums["margin"] += float((chosen_B - rejected_B).sum()) / n
                sums["chosen_score"] += float(chosen_B.sum()) / n
                sums["rejected_score"] += float(rejected_B.sum()) / n
        return sums

    run_steps(
        ctx,
        Task(
            stage=which,
            title=title,
            ids=[pair.pair.id for pair in train],
            lengths=[pair.length for pair in train],
            module=scalar,
            accumulate=accumulate,
            evaluate=evaluate,
        ),
        section,
    )
    if held_out:
        last = evaluate(BATCH_TOKENS)
        ctx.say(
            f"{title}: held-out accuracy {last['held_out_accuracy']:.1%} (95 % interval "
            f"{last['held_out_accuracy_low']:.1%} to {last['held_out_accuracy_high']:.1%}, {len(held_out)} pairs)"
        )
    model = RewardModel(
        scalar=scalar,
        tokens=tokens,
        facts=_facts(recipe, tokens, identity),
        normalisation=None,
        device=ctx.device,
        dtype=recipe.model.dtype,
    )
    model = model.with_normalisation(normalise(ctx, model, data, dialogue, section.normalisation_prompts))
    folder = ctx.run.path / f"{which}_model"
    with whole_on_cpu(scalar, keep=ctx.world.is_main):
        ctx.world.main(lambda: model.save(folder))
    return folder


def normalise(
    ctx: StageContext, model: RewardModel, data: PreferenceData, dialogue: DialogueFormat, n_prompts: int
) -> Normalisation:
    """Statistics of the raw scores of the base's own answers to ``n_prompts`` prompts, sampled with PPO's own settings.

    Finished answers count; all do if fewer than ``MIN_FINISHED`` ended (``finished_only`` is then False).
    """
    recipe = ctx.recipe
    settings = sampling_settings(recipe.ppo, dialogue)
    prompts = encode_prompts(_distinct_prompts(data)[:n_prompts], dialogue, recipe.data.max_prompt_tokens)
    answers = _sample_base(ctx, model, prompts, settings)
    finished = [answer for answer in answers if answer.finished]
    used = finished if len(finished) >= MIN_FINISHED else answers
    if used is answers:
        ctx.say(
            f"reward model: only {len(finished)} of the base's {len(answers)} samples ended by themselves (wanted: "
            f"{MIN_FINISHED}), so cut ones are used to normalise as well; add dialogue.stop_strings, raise "
            "ppo.sampling.max_new_tokens or reward.normalisation_prompts"
        )
    items = [(answer.turns, answer.text, answer.finished) for answer in used]
    with gathered(model.scalar):
        scores = spread(ctx.world, [len(item[1]) for item in items], lambda rows: model.raw([items[r] for r in rows]))
    scores = check_finite(scores, used, "reward model")
    return statistics(
        scores,
        finished_only=used is finished,
        base_identity=model.facts.base_sha256,
        settings=settings,
        prompts=[ids for _, ids in prompts],
    )


def statistics(
    score_n: Tensor,
    *,
    finished_only: bool,
    base_identity: str,
    settings: SamplingSettings,
    prompts: Iterable[Sequence[int]],
) -> Normalisation:
    """Mean, population standard deviation and quantiles of raw scores. DataError if they are all the same."""
    std = float(score_n.double().std(correction=0))
    if len(score_n) < 2 or std < 1e-8:
        raise DataError(
            f"reward model: its {len(score_n)} scores of the base's samples are all the same, so they cannot be "
            "normalised and PPO would learn nothing. Train it longer or on more pairs."
        )
    return Normalisation(
        mean=float(score_n.double().mean()),
        std=std,
        quantiles={str(share): float(torch.quantile(score_n, share)) for share in QUANTILES},
        count=len(score_n),
        finished_only=finished_only,
        base_sha256=base_identity,
        sampling=asdict(settings),
        prompts_sha256=hashlib.sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest(),
    )


def margins(pairs: Sequence[EncodedPair]) -> Tensor:
    """The pairs' margin column, float32 [B]."""
    return torch.tensor([pair.pair.margin or 0.0 for pair in pairs])


def _sample_base(
    ctx: StageContext, model: RewardModel, prompts: Sequence[tuple[Prompt, list[int]]], settings: SamplingSettings
) -> list[Answer]:
    """The base's answers. With LoRA the base is the reward model's trunk, adapter off; else it is loaded once more."""
    section = ctx.recipe.model
    trunk: Any = model.scalar.trunk
    shared = section.tuning == "lora"
    base = trunk
    if not shared:
        base = load_for(section, section.base, dtype=section.dtype, device=ctx.device)
    answers: list[Answer] = []
    at_once = SAMPLED_AT_ONCE * ctx.world.size
    with (
        gathered(model.scalar) if shared else nullcontext(),
        trunk.disable_adapter() if shared else nullcontext(),
        autocast(ctx.device, section.dtype),
        ctx.progress("normalisation: the base's answers", total=len(prompts)) as bar,
    ):
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            answers += base_answers(
                base,
                part,
                model.dialogue.tokens,
                settings,
                seed=ctx.recipe.seed,
                should_stop=ctx.should_stop,
                world=ctx.world,
            )
            bar.advance(len(part))
    return answers


def _facts(recipe: Recipe, tokens: Tokens, identity: str) -> Facts:
    base = recipe.model.base
    local = Path(base)
    return Facts(
        dialogue=recipe.dialogue,
        max_prompt_tokens=recipe.data.max_prompt_tokens,
        max_answer_tokens=max(recipe.data.max_answer_tokens, ANSWER_SLACK * recipe.ppo.sampling.max_new_tokens + 1),
        base=str(local.absolute()) if local.is_dir() else base,
        revision=recipe.model.revision,
        base_sha256=identity,
        tokenizer_sha256=tokens.sha256,
        tuning=recipe.model.tuning,
        quantise=recipe.model.quantise,
    )


def _distinct_prompts(data: PreferenceData) -> list[Prompt]:
    """The training pairs' prompts, each once, in order of their hash (which mixes the sources)."""
    prompts: dict[str, Prompt] = {}
    for pair in data.train:
        name = prompt_hash(pair.prompt)
        prompts.setdefault(name, Prompt(name, pair.prompt, pair.kind, pair.source))
    return [prompts[name] for name in sorted(prompts)]


def _check_margins(pairs: Sequence[EncodedPair]) -> None:
    missing = [pair.pair.source for pair in pairs if pair.pair.margin is None]
    if missing:
        raise DataError(
            f"reward.margin is on, but {len(missing)} of {len(pairs)} pairs have no margin (the first: {missing[0]}). "
            "Add the column, or set reward.margin=false."
        )
