"""Supervised fine-tuning on the chosen answers.

Legend: B dialogues, L slots.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from direct_rlhf.data.dialogue import DialogueFormat, EncodedDialogue
from direct_rlhf.data.tokens import Tokens, load_tokens
from direct_rlhf.data.types import PreferenceData, PreferencePair
from direct_rlhf.maths.losses import nll
from direct_rlhf.models.batches import padded
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.loading import autocast
from direct_rlhf.models.sharded import gathered
from direct_rlhf.recipe.schema import DataSection
from direct_rlhf.run.context import StageContext
from direct_rlhf.train.loop import HELD_OUT_ITEMS, Task, load_trainee, run_steps, save_arm
from direct_rlhf.train.parallel import Cut, Layout, to_measure, to_train


def train_sft(ctx: StageContext, data: PreferenceData, *, tokens: Tokens | None = None, arm: str = "sft") -> Path:
    """Train the base on the chosen answers and save it under ``models/ARM``.

    The loss is the mean over all answer tokens (EOS included) of a step; prompts are context only.
    """
    recipe = ctx.recipe
    dialogue = DialogueFormat(recipe.dialogue, tokens or load_tokens(recipe.model.base, revision=recipe.model.revision))
    train = encode_chosen(data.train, dialogue, recipe.data)
    held_out = [encoded for _, encoded in encode_chosen(data.held_out, dialogue, recipe.data)[:HELD_OUT_ITEMS]]
    layout = Layout.of(ctx)
    model = layout.trained(load_trainee(recipe, layout.loads_on, arm))
    training, measuring = to_train(ctx.world), to_measure(ctx.world)

    def accumulate(rows: list[int], slots: int) -> dict[str, float]:
        batch = [train[row][1] for row in rows]
        trained = float(sum(len(item.answer_ids) for item in batch))
        loss = ctx.world.sum({"loss": answer_loss(batch, slots, training, backward=True)})
        return {**loss, "answer_tokens": trained}

    def evaluate(slots: int) -> dict[str, float]:
        if not held_out:
            return {}
        with gathered(model):
            share = ctx.world.together(lambda: answer_loss(held_out, slots, measuring, backward=False))
        return ctx.world.sum({"held_out_loss": share})

    def answer_loss(batch: Sequence[EncodedDialogue], slots: int, cut: Cut, *, backward: bool) -> float:
        """This process's share of the token mean over ``batch``, nats; with ``backward`` its gradient is added too."""
        answer_tokens = float(sum(len(item.answer_ids) for item in batch))
        lengths = [length(item) for item in batch]
        total = 0.0
        with torch.set_grad_enabled(backward), autocast(ctx.device, recipe.model.dtype):
            for rows, counts in cut(lengths, range(len(batch)), slots):
                if not backward:
                    ctx.check_stop()
                chunk = [batch[row] for row in rows]
                ids_BL, mask_BL = padded([item.prompt_ids + item.answer_ids for item in chunk], ctx.device)
                prompt_B1 = torch.tensor([[len(item.prompt_ids)] for item in chunk], device=ctx.device)
                answer_BL = mask_BL & (torch.arange(ids_BL.shape[1], device=ctx.device) >= prompt_B1)
                logprob_BL = token_logprobs(model, ids_BL, mask_BL, answer_BL).logprob_BL
                loss = nll(logprob_BL, answer_BL, denominator=answer_tokens)
                loss = loss if counts else 0.0 * loss
                if backward:
                    loss.backward()
                total += float(loss.detach())
        return total

    steps = run_steps(
        ctx,
        Task(
            stage=arm,
            title=f"SFT ({arm})",
            ids=[pair.id for pair, _ in train],
            lengths=[length(item) for _, item in train],
            module=model,
            accumulate=accumulate,
            evaluate=evaluate,
        ),
        recipe.sft,
    )
    what = f"Supervised fine-tuning on {len(train)} chosen answers, {steps} steps."
    return save_arm(ctx, model, dialogue, arm, what)


def length(item: EncodedDialogue) -> int:
    """Tokens of prompt and answer."""
    return len(item.prompt_ids) + len(item.answer_ids)


def encode_chosen(
    pairs: Sequence[PreferencePair], dialogue: DialogueFormat, section: DataSection
) -> list[tuple[PreferencePair, EncodedDialogue]]:
    """Pairs with their prompt and chosen answer as ids; those that do not fit are left out."""
    encoded = [
        (
            pair,
            dialogue.encode_dialogue(
                pair.prompt,
                pair.chosen,
                max_prompt_tokens=section.max_prompt_tokens,
                max_answer_tokens=section.max_answer_tokens,
            ),
        )
        for pair in pairs
    ]
    return [(pair, item) for pair, item in encoded if item is not None]
