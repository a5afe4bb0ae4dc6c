import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import make_context, pair, write_checkpoint

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import PreferenceData
from direct_rlhf.errors import Interrupted
from direct_rlhf.models.loading import load_causal_lm, parameters_sha256
from direct_rlhf.train.dpo import answer_logprobs, train_dpo
from direct_rlhf.train.pairs import encode_pairs, pair_batches

DATA = PreferenceData(
    train=tuple(pair(i, "good yes", "bad no no") for i in range(16)),
    held_out=tuple(pair(i, "good", "bad") for i in range(16, 20)),
    rejected=(),
)
DPO = {"batch_size": 8, "epochs": 6, "beta": 0.5, "optimiser": {"learning_rate": 5e-3}}


def metrics(ctx):
    return [json.loads(line) for line in (ctx.run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_dpo_starts_at_log_2_and_learns_the_preference(tmp_path, tuning):
    base = write_checkpoint(tmp_path / "base")
    ctx = make_context(tmp_path / "runs", base, model={"base": str(base), "tuning": tuning}, dpo=DPO)
    folder = train_dpo(ctx, DATA)
    lines = metrics(ctx)
    assert lines[0]["held_out_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["loss"] < 0.4
    assert lines[-1]["accuracy"] == lines[-1]["held_out_accuracy"] == 1.0
    assert lines[-1]["reward_margin"] == pytest.approx(lines[-1]["chosen_reward"] - lines[-1]["rejected_reward"])
    assert folder == ctx.run.path / "models" / "dpo"
    trained, before = (held_out_logprobs(load_causal_lm(place), base, ctx) for place in (folder, base))
    margin = 0.5 * ((trained[0] - before[0]) - (trained[1] - before[1]))
    assert float(margin.mean()) == pytest.approx(lines[-1]["held_out_reward_margin"], abs=1e-3)


@torch.no_grad()
def held_out_logprobs(model, base, ctx):
    dialogue = DialogueFormat(ctx.recipe.dialogue, load_tokens(str(base)))
    (batch,) = pair_batches(encode_pairs(DATA.held_out, dialogue, ctx.recipe.data), "cpu")
    return answer_logprobs(model, batch)


def test_a_pair_of_which_one_side_does_not_fit_is_left_out(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    ctx = make_context(tmp_path / "runs", base, data={"max_answer_tokens": 4})
    dialogue = DialogueFormat(ctx.recipe.dialogue, load_tokens(str(base)))
    pairs = [pair(1, "good", "bad"), pair(2, "good", "zqzqzqzqzqzq"), pair(3, "zqzqzqzqzqzq", "bad")]
    assert [one.pair.id for one in encode_pairs(pairs, dialogue, ctx.recipe.data)] == ["p1"]


def test_batches_of_pairs_hold_every_pair_once_chosen_before_rejected(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    ctx = make_context(tmp_path / "runs", base)
    dialogue = DialogueFormat(ctx.recipe.dialogue, load_tokens(str(base)))
    pairs = encode_pairs(
        [pair(i, "yes " * (i % 5 + 1), "no " * (i % 3 + 1)) for i in range(200)], dialogue, ctx.recipe.data
    )
    batches = list(pair_batches(pairs, "cpu"))
    assert len(batches) > 1
    assert sorted(row for batch in batches for row in batch.rows) == list(range(200))
    for batch in batches:
        for place, row in enumerate(batch.rows):
            for at, answer in ((place, pairs[row].chosen_ids), (place + len(batch.rows), pairs[row].rejected_ids)):
                assert batch.ids_BL[at][batch.answer_BL[at]].tolist() == answer
                assert batch.ids_BL[at][batch.mask_BL[at]].tolist() == pairs[row].prompt_ids + answer


@pytest.mark.promise("K6")
def test_an_interrupted_dpo_ends_as_an_uninterrupted_one(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    whole, broken = (make_context(tmp_path / name, base, dpo=DPO) for name in ("whole", "broken"))
    train_dpo(whole, DATA)
    asked = iter(range(100))
    with pytest.raises(Interrupted):
        train_dpo(replace(broken, should_stop=lambda: next(asked) > 8), DATA)
    assert 0 < metrics(broken)[-1]["step"] < metrics(whole)[-1]["step"]
    train_dpo(broken, DATA)
    one, other = (parameters_sha256(load_causal_lm(ctx.run.path / "models" / "dpo")) for ctx in (whole, broken))
    assert one == other
    lines = [[{k: v for k, v in line.items() if k != "time"} for line in metrics(ctx)] for ctx in (whole, broken)]
    assert lines[0] == lines[1]
