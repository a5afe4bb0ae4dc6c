import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import make_context, pair, write_checkpoint

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import PreferenceData
from direct_rlhf.errors import ConfigError, DataError, Interrupted
from direct_rlhf.maths.intervals import wilson
from direct_rlhf.models.loading import base_sha256, load_causal_lm, parameters_sha256
from direct_rlhf.models.reward_model import RewardModel
from direct_rlhf.rollout.types import SamplingSettings
from direct_rlhf.train.prompts import sampling_settings
from direct_rlhf.train.reward import statistics, train_reward_model


def word_pairs(numbers, margin=None):
    """Pairs whose chosen answer has the special word, among other words."""
    fill = ["yes", "no", "one", "tell me"]
    return tuple(
        replace(pair(i, f"{fill[i % 4]} good {fill[i % 3]}", f"{fill[i % 3]} bad {fill[i % 4]}"), margin=margin)
        for i in numbers
    )


DATA = PreferenceData(train=word_pairs(range(64)), held_out=word_pairs(range(64, 96)), rejected=())
REWARD = {"batch_size": 16, "epochs": 5, "normalisation_prompts": 16, "optimiser": {"learning_rate": 5e-3}}
PPO = {"sampling": {"max_new_tokens": 6}}


def metrics(ctx):
    return [json.loads(line) for line in (ctx.run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base")


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_reward_model_learns_a_toy_preference_and_is_normalised_for_this_base(tmp_path, base, tuning, capsys):
    before = parameters_sha256(load_causal_lm(base))
    ctx = make_context(tmp_path / "runs", base, model={"base": str(base), "tuning": tuning}, reward=REWARD, ppo=PPO)
    folder = train_reward_model(ctx, DATA)
    lines = metrics(ctx)
    assert lines[0]["held_out_loss"] == pytest.approx(math.log(2), abs=0.05)
    assert lines[-1]["held_out_accuracy"] > 0.9
    assert lines[-1]["held_out_accuracy_low"] == pytest.approx(wilson(32 * lines[-1]["held_out_accuracy"], 32)[0])
    assert "reward model: held-out accuracy" in capsys.readouterr().err

    model = RewardModel.load(folder)
    right = [(p.prompt, p.chosen, True) for p in DATA.held_out]
    wrong = [(p.prompt, p.rejected, True) for p in DATA.held_out]
    assert (model.score(right) > model.score(wrong)).float().mean() == pytest.approx(lines[-1]["held_out_accuracy"])
    settings = sampling_settings(ctx.recipe.ppo, DialogueFormat(ctx.recipe.dialogue, load_tokens(str(base))))
    model.check_fits(base_sha256(load_causal_lm(base)), settings)
    with pytest.raises(ConfigError, match="another base"):
        model.check_fits(base_sha256(load_causal_lm(write_checkpoint(tmp_path / "other", seed=9))), settings)
    assert model.normalisation.count == 16
    assert not model.normalisation.finished_only
    assert parameters_sha256(load_causal_lm(base)) == before


def test_too_few_finished_samples_are_said_and_recorded(tmp_path, base, capsys):
    ctx = make_context(tmp_path / "runs", base, reward=REWARD | {"max_steps": 1}, ppo=PPO)
    folder = train_reward_model(ctx, DATA)
    assert "ended by themselves (wanted: 64), so cut ones are used" in capsys.readouterr().err
    assert json.loads((folder / "reward.json").read_text())["normalisation"]["finished_only"] is False


@pytest.mark.promise("K6")
def test_a_reward_model_interrupted_in_training_and_in_sampling_ends_the_same(tmp_path, base):
    def run(ctx, stop_after):
        asked = iter(range(10**6))
        with pytest.raises(Interrupted):
            train_reward_model(replace(ctx, should_stop=lambda: next(asked) >= stop_after), DATA)

    settings = {"reward": REWARD | {"epochs": 1.5}, "ppo": PPO}
    whole, broken = (make_context(tmp_path / name, base, **settings) for name in ("whole", "broken"))
    train_reward_model(whole, DATA)
    run(broken, 4)  # after the third step; the loop asks twice a step
    assert not (broken.run.path / "reward_model").exists()
    run(broken, 6)
    train_reward_model(broken, DATA)
    one, other = (RewardModel.load(ctx.run.path / "reward_model") for ctx in (whole, broken))
    assert parameters_sha256(one.scalar) == parameters_sha256(other.scalar)
    assert one.normalisation == other.normalisation
    clean = lambda ctx: [{k: v for k, v in line.items() if k != "time"} for line in metrics(ctx)]
    assert clean(whole) == clean(broken)


def test_the_first_forward_serves_both_sides_and_the_margin_enters_the_loss(tmp_path, base):
    losses = []
    for margin, on in ((0.0, True), (2.0, True), (2.0, False)):
        ctx = make_context(
            tmp_path / f"runs{margin}{on}",
            base,
            reward=REWARD | {"max_steps": 1, "margin": on, "centring": 0.0},
            ppo=PPO,
        )
        train_reward_model(ctx, PreferenceData(word_pairs(range(16), margin), (), ()))
        losses.append(metrics(ctx)[1]["loss"])
    assert losses[0] == losses[2] == pytest.approx(math.log(2), abs=0.05)
    assert losses[1] == pytest.approx(math.log(1 + math.exp(2)), abs=0.05)


def test_margins_that_are_missing_are_named(tmp_path, base):
    ctx = make_context(tmp_path / "runs", base, reward=REWARD | {"margin": True}, ppo=PPO)
    with pytest.raises(
        DataError, match=r"reward.margin is on, but 64 of 64 pairs have no margin \(the first: toy.jsonl:0"
    ):
        train_reward_model(ctx, DATA)


def test_statistics_are_the_population_ones_and_equal_scores_are_refused():
    score_n = torch.tensor([0.0, 1.0, 2.0, 5.0])
    made = statistics(
        score_n, finished_only=True, base_identity="b", settings=SamplingSettings(4), prompts=[[1, 2], [3]]
    )
    assert made.mean == 2.0
    assert made.std == pytest.approx(math.sqrt(14 / 4))
    assert made.quantiles == pytest.approx({"0.01": 0.03, "0.05": 0.15, "0.1": 0.3, "0.5": 1.5})
    other = statistics(
        score_n, finished_only=True, base_identity="b", settings=SamplingSettings(4), prompts=[[1], [2, 3]]
    )
    assert other.prompts_sha256 != made.prompts_sha256
    with pytest.raises(DataError, match="all the same"):
        statistics(torch.ones(9), finished_only=True, base_identity="b", settings=SamplingSettings(4), prompts=[])
