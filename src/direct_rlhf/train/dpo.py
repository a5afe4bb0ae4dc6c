"""Direct preference optimisation on the preference pairs: the base is policy and reference.

Legend: B pairs, n pairs of a whole data set.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import Tokens, load_tokens
from direct_rlhf.data.types import PreferenceData
from direct_rlhf.maths.losses import dpo
from direct_rlhf.models.batches import BATCH_TOKENS
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.loading import autocast
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.sharded import gathered
from direct_rlhf.run.context import StageContext
from direct_rlhf.train.loop import HELD_OUT_ITEMS, Task, load_trainee, run_steps, save_arm
from direct_rlhf.train.pairs import EncodedPair, PairBatch, encode_pairs, pair_batches
from direct_rlhf.train.parallel import Cut, Layout, spread, to_measure, to_train

STATISTICS = ("loss", "accuracy", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob")


def train_dpo(ctx: StageContext, data: PreferenceData, *, tokens: Tokens | None = None, arm: str = "dpo") -> Path:
    """Train the base with DPO and save it under ``models/ARM``.

    The reference's log-probabilities are computed once, before the first step, by the model itself.
    """
    recipe, section = ctx.recipe, ctx.recipe.dpo
    dialogue = DialogueFormat(recipe.dialogue, tokens or load_tokens(recipe.model.base, revision=recipe.model.revision))
    train = encode_pairs(data.train, dialogue, recipe.data)
    held_out = encode_pairs(data.held_out, dialogue, recipe.data)[:HELD_OUT_ITEMS]
    layout = Layout.of(ctx)
    model = layout.trained(load_trainee(recipe, layout.loads_on, arm))
    training, measuring = to_train(ctx.world), to_measure(ctx.world)
    reference_train = _reference(ctx, model, train, "DPO reference, training pairs")
    reference_held_out = _reference(ctx, model, held_out, "DPO reference, held-out pairs")

    def accumulate(rows: list[int], slots: int) -> dict[str, float]:
        picked = tuple(reference[rows] for reference in reference_train)
        pairs = [train[row] for row in rows]
        trained = float(sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs))
        values = ctx.world.sum(pair_loss(pairs, picked, slots, training, backward=True))
        return {**values, "answer_tokens": trained}

    def evaluate(slots: int) -> dict[str, float]:
        if not held_out:
            return {}
        with gathered(model):
            share = ctx.world.together(
                lambda: pair_loss(held_out, reference_held_out, slots, measuring, backward=False)
            )
        return {f"held_out_{name}": value for name, value in ctx.world.sum(share).items()}

    def pair_loss(
        pairs: Sequence[EncodedPair], reference: tuple[Tensor, ...], slots: int, cut: Cut, *, backward: bool
    ) -> dict[str, float]:
        """This process's share of mean loss and statistics over ``pairs``; with ``backward`` its gradient is added."""
        n = len(pairs)
        sums = dict.fromkeys(STATISTICS, 0.0)
        with torch.set_grad_enabled(backward), autocast(ctx.device, recipe.model.dtype):
            for batch in pair_batches(pairs, ctx.device, slots, cut):
                if not backward:
                    ctx.check_stop()
                chosen_B, rejected_B = answer_logprobs(model, batch)
                reference_chosen_B, reference_rejected_B = (part[batch.rows].to(ctx.device) for part in reference)
                term = dpo(
                    chosen_B, rejected_B, reference_chosen_B, reference_rejected_B, beta=section.beta, denominator=n
                )
                if backward:
                    (term.loss if batch.counts else 0.0 * term.loss).backward()
                if not batch.counts:
                    continue
                sums["loss"] += float(term.loss.detach())
                sums["accuracy"] += float(term.accuracy)
                sums["chosen_reward"] += float(term.chosen_reward)
                sums["rejected_reward"] += float(term.rejected_reward)
                sums["chosen_logprob"] += float(chosen_B.detach().sum()) / n
                sums["rejected_logprob"] += float(rejected_B.detach().sum()) / n
        return {**sums, "reward_margin": sums["chosen_reward"] - sums["rejected_reward"]}

    steps = run_steps(
        ctx,
        Task(
            stage=arm,
            title=f"DPO ({arm})",
            ids=[pair.pair.id for pair in train],
            lengths=[pair.length for pair in train],
            module=model,
            accumulate=accumulate,
            evaluate=evaluate,
        ),
        section,
    )
    what = f"Direct preference optimisation (beta {section.beta:g}) on {len(train)} pairs, {steps} steps."
    return save_arm(ctx, model, dialogue, arm, what)


def answer_logprobs(model: Any, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """log P of each whole answer (EOS included), nats: (chosen [B], rejected [B])."""
    logprob_BL = token_logprobs(model, batch.ids_BL, batch.mask_BL, batch.answer_BL).logprob_BL
    chosen_B, rejected_B = logprob_BL.sum(dim=1).chunk(2)
    return chosen_B, rejected_B


@torch.no_grad()
def _reference(ctx: StageContext, model: Any, pairs: Sequence[EncodedPair], title: str) -> tuple[Tensor, Tensor]:
    """The untrained model's log-probabilities (chosen [n], rejected [n]), on the CPU."""
    chunk = ChunkSize(title, BATCH_TOKENS, ctx.say)

    def attempt(mine: list[EncodedPair], slots: int) -> Tensor:
        both_n2 = torch.zeros(len(mine), 2)
        with ctx.progress(title, total=len(mine)) as bar, autocast(ctx.device, ctx.recipe.model.dtype):
            for batch in pair_batches(mine, ctx.device, slots):
                ctx.check_stop()
                both_n2[batch.rows] = torch.stack(answer_logprobs(model, batch), dim=1).cpu()
                bar.advance(len(batch.rows))
        return both_n2

    with gathered(model):
        lengths = [pair.length for pair in pairs]
        both_n2 = spread(ctx.world, lengths, lambda rows: chunk.run(partial(attempt, [pairs[row] for row in rows])))
    return both_n2[:, 0], both_n2[:, 1]
