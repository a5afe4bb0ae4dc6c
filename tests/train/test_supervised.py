import json

import pytest
import torch
from tiny_models import make_context, pair, write_checkpoint

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import PreferenceData
from direct_rlhf.models.loading import load_causal_lm
from direct_rlhf.train.supervised import encode_chosen, train_sft

ANSWERS = ["good", "yes yes", "one good one", "no"]
DATA = PreferenceData(
    train=tuple(pair(i, ANSWERS[i % 4], "bad") for i in range(16)),
    held_out=tuple(pair(i, ANSWERS[i % 4], "bad") for i in range(16, 20)),
    rejected=(),
)
SFT = {"batch_size": 8, "epochs": 10, "optimiser": {"learning_rate": 1e-2}}


def metrics(ctx, stage):
    lines = [json.loads(line) for line in (ctx.run.path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base")


@pytest.mark.parametrize(("tuning", "share"), [("full", 0.7), ("lora", 0.95)])  # a random head, frozen, limits LoRA
def test_sft_lowers_the_loss_and_saves_a_model_that_says_so(tmp_path, base, tuning, share):
    ctx = make_context(tmp_path / "runs", base, model={"base": str(base), "tuning": tuning}, sft=SFT)
    folder = train_sft(ctx, DATA)
    assert folder == ctx.run.path / "models" / "sft"
    lines = metrics(ctx, "sft")
    assert lines[-1]["held_out_loss"] < share * lines[0]["held_out_loss"]
    assert lines[-1]["held_out_loss"] == pytest.approx(naive_loss(load_causal_lm(folder), base, ctx), abs=1e-4)
    assert lines[0]["held_out_loss"] == pytest.approx(naive_loss(load_causal_lm(base), base, ctx), abs=1e-4)
    assert "16 chosen answers" in (folder / "README.md").read_text()
    assert json.loads((folder / "generation_config.json").read_text())["stop_strings"] == ["\n\nHuman:"]


def naive_loss(model, base, ctx):
    """Mean over all held-out answer tokens, EOS too, one dialogue at a time."""
    dialogue = DialogueFormat(ctx.recipe.dialogue, load_tokens(str(base)))
    total, count = 0.0, 0
    for one, encoded in encode_chosen(DATA.held_out, dialogue, ctx.recipe.data):
        text = f"\n\nHuman: {one.prompt[0].text}\n\nAssistant: {one.chosen}"
        ids = [*load_tokens(str(base)).encode(text), 2]
        assert ids == encoded.prompt_ids + encoded.answer_ids
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(len(encoded.prompt_ids), len(ids)):
            total, count = total - float(logp[place - 1, ids[place]]), count + 1
    return total / count


def test_micro_batches_change_neither_loss_nor_weights(tmp_path, base, monkeypatch):
    from direct_rlhf.train import loop, supervised

    results, passes = [], []
    real = supervised.token_logprobs
    monkeypatch.setattr(supervised, "token_logprobs", lambda *args: passes.append(1) or real(*args))
    for tokens in (loop.BATCH_TOKENS, 40):
        monkeypatch.setattr(loop, "BATCH_TOKENS", tokens)
        passes.clear()
        ctx = make_context(tmp_path / f"runs{tokens}", base, sft=SFT | {"max_steps": 3})
        folder = train_sft(ctx, DATA)
        results.append((metrics(ctx, "sft")[-1]["loss"], load_causal_lm(folder).state_dict(), len(passes)))
    assert results[1][2] > 2 * results[0][2]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], atol=2e-4, rtol=1e-3)


def test_answers_that_do_not_fit_are_left_out_whole(base):
    dialogue = DialogueFormat(make_recipe().dialogue, load_tokens(str(base)))
    section = make_recipe().data.model_copy(update={"max_answer_tokens": 4})
    kept = encode_chosen([pair(1, "good", "bad"), pair(2, "zzzzzzzzzzzz", "bad")], dialogue, section)
    assert [one.id for one, _ in kept] == ["p1"]
    assert kept[0][1].answer_ids[-1] == 2


def make_recipe():
    from direct_rlhf.recipe.schema import Recipe

    return Recipe()


def test_without_held_out_pairs_there_is_no_held_out_loss(tmp_path, base):
    ctx = make_context(tmp_path / "runs", base, sft=SFT | {"max_steps": 1})
    train_sft(ctx, PreferenceData(DATA.train, (), ()), arm="other")
    assert (ctx.run.path / "models" / "other" / "model.safetensors").exists()
    assert not any("held_out_loss" in line for line in metrics(ctx, "other"))
