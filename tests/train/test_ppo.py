import json
from dataclasses import replace

import pytest
import torch

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import Prompt, PromptData, Turn
from direct_rlhf.errors import DataError, DivergenceError, Interrupted
from direct_rlhf.models.loading import load_causal_lm
from direct_rlhf.recipe.load import LoadedRecipe
from direct_rlhf.recipe.schema import PpoSection, Recipe
from direct_rlhf.run.context import StageContext
from direct_rlhf.run.directory import RunDirectory
from direct_rlhf.train import ppo as ppo_module
from direct_rlhf.train import update as update_module
from direct_rlhf.train.ppo import next_coefficient, rollout_cap, train_ppo
from toys import toy_folder

REWARD = "def reward(items):\n    return [sum('a' <= c <= 'z' for c in item['answer']) for item in items]\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("base"))


def prompts(n=24, held_out=8):
    made = [Prompt(f"p{i}", (Turn("human", f"Say {i}."),), "helpful", f"x:{i}") for i in range(n)]
    return PromptData(tuple(made[held_out:]), tuple(made[:held_out]), (), {})


def recipe(base, name="toy", seed=0, tuning="full", **ppo):
    section = {
        "iterations": 3,
        "rollouts": 16,
        "minibatch_size": 8,
        "micro_batch_size": 4,
        "epochs": 2,
        "evaluate_every": 2,
        "evaluate_prompts": 8,
        "checkpoint_every": 1,
        "critic": {"warmup": 3},
        "sampling": {"max_new_tokens": 8},
        "reward": {"type": "python", "target": "letter_reward:reward"},
        **ppo,
    }
    return Recipe.model_validate(
        {
            "name": name,
            "seed": seed,
            "model": {"base": str(base), "tuning": tuning, "lora": {"rank": 4}},
            "reward": {"normalisation_prompts": 16},
            "ppo": section,
        }
    )


def run(made, root, *, resume=False, should_stop=lambda: False, texts=(), data=None):
    (root / "letter_reward.py").write_text(REWARD)
    directory = RunDirectory.open(root / "runs", LoadedRecipe.of(made, root), resume=resume, overwrite=False)
    torch.set_num_threads(1)
    context = StageContext(made, directory, "cpu", should_stop)
    folder = train_ppo(
        context,
        data or prompts(),
        arm="direct_ppo",
        init=made.model.base,
        tokens=load_tokens(made.model.base),
        reward_folder=directory.path / "reward_model",
        recipe_folder=root,
        texts=texts,
    )
    return directory, folder


def metrics(directory):
    lines = (directory.path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def parameters(folder):
    return dict(load_causal_lm(folder).named_parameters())


def assert_same(one, other):
    assert metrics(one[0]) == metrics(other[0])
    theirs = parameters(other[1])
    for name, tensor in parameters(one[1]).items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_ppo_learns_to_write_the_letters_that_are_rewarded(base, tmp_path, tuning):
    rate, gain = {"full": (5e-3, 1.0), "lora": (3e-2, 0.4)}[tuning]  # the LoRA trunk and head are frozen noise
    made = recipe(
        base,
        tuning=tuning,
        iterations=12,
        rollouts=64,
        minibatch_size=32,
        micro_batch_size=32,
        optimiser={"learning_rate": rate},
        critic={"warmup": 4, "optimiser": {"learning_rate": rate}},
        kl={"controller": "fixed", "coefficient": 0.02, "inner_limit": 10, "target": 50},
        length={"unfinished": "subtract", "unfinished_penalty": 0},
    )
    directory, folder = run(made, tmp_path)
    rows = metrics(directory)
    assert rows[-1]["reward_mean"] > rows[0]["reward_mean"] + gain
    assert rows[0]["kl_sequence"] == pytest.approx(0, abs=1e-4)  # the policy starts as the reference
    assert rows[-1]["held_out_reward"] > 0.5
    assert (folder / "model.safetensors").is_file()


@pytest.mark.promise("K6")
@pytest.mark.parametrize(("tuning", "polls"), [("full", 3), ("full", 9), ("full", 15), ("lora", 9)])
def test_a_run_stopped_anywhere_and_resumed_equals_an_uninterrupted_one_bit_for_bit(base, tmp_path, tuning, polls):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(recipe(base, tuning=tuning), tmp_path / "a")
    asked = iter([False] * polls + [True] * 100)
    with pytest.raises(Interrupted):
        run(recipe(base, tuning=tuning), tmp_path / "b", should_stop=lambda: next(asked))
    metrics_file = tmp_path / "b/runs/toy/metrics.jsonl"
    assert not metrics_file.exists() or len(metrics_file.read_text().splitlines()) < 3
    assert_same(run(recipe(base, tuning=tuning), tmp_path / "b", resume=True), whole)


def test_the_micro_batch_size_changes_no_result_beyond_rounding(base, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = metrics(run(recipe(base, iterations=1), tmp_path / "a")[0])[-1]
    other = metrics(run(recipe(base, iterations=1, micro_batch_size=8), tmp_path / "b")[0])[-1]
    for name in ("policy_loss", "value_loss", "grad_norm_policy", "grad_norm_critic", "entropy", "clip_fraction"):
        assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def test_another_seed_gives_other_samples(base, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run(recipe(base, iterations=1), tmp_path / "a")
    run(recipe(base, iterations=1, seed=1), tmp_path / "b")
    answers = [
        [json.loads(line)["answer"] for line in (tmp_path / side / "runs/toy/samples.jsonl").read_text().splitlines()]
        for side in "ab"
    ]
    assert answers[0] != answers[1]


@pytest.mark.promise("N5")
def test_a_sampler_with_another_temperature_stops_the_run_before_any_update(base, tmp_path, monkeypatch):
    real = ppo_module.sample
    monkeypatch.setattr(
        ppo_module,
        "sample",
        lambda model, tokens, ids, keys, settings, **more: real(
            model, tokens, ids, keys, replace(settings, temperature=1.5), **more
        ),
    )
    with pytest.raises(DivergenceError, match="sampler and trainer disagree before any update"):
        run(recipe(base), tmp_path)


@pytest.mark.promise("N1")
def test_a_loss_that_is_not_finite_takes_no_step_and_says_where(base, tmp_path, monkeypatch):
    real = update_module.policy_loss

    def broken(*args, **kwargs):
        term = real(*args, **kwargs)
        return replace(term, loss=term.loss * float("nan"))

    monkeypatch.setattr(update_module, "policy_loss", broken)
    with pytest.raises(DivergenceError, match=r"policy, iteration 0, epoch 0, answers \["):
        run(recipe(base), tmp_path)


def test_a_kl_beyond_the_stop_limit_ends_the_run_and_keeps_a_checkpoint(base, tmp_path):
    made = recipe(
        base,
        iterations=12,
        optimiser={"learning_rate": 3e-2},
        kl={"target": 0.05, "stop_factor": 1.5, "inner_limit": 100},
    )
    directory, folder = run(made, tmp_path)
    assert len(metrics(directory)) < 12
    assert (folder / "config.json").is_file()
    directory.finish_stage("direct_ppo", "x", 0.0, {})
    record = directory.stage_record("direct_ppo")
    assert "over the limit of 0.075" in record["facts"]["stopped"]


def test_only_policies_under_the_kl_bound_can_be_the_best(base, tmp_path):
    made = recipe(base, iterations=4, evaluate_every=1, best_kl_limit=1e-9, optimiser={"learning_rate": 1e-2})
    directory, _ = run(made, tmp_path)
    assert not list((directory.path / "checkpoints").glob("direct_ppo-best/step_*"))


def test_the_ptx_loss_is_logged_and_needs_texts(base, tmp_path):
    made = recipe(base, iterations=1, ptx={"weight": 1.0, "batch_size": 2, "window": 16})
    directory, _ = run(made, tmp_path, texts=["The sky is blue.", "A cat sat.", "Ten men."])
    assert metrics(directory)[-1]["ptx_nll"] > 0
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"data.text holds 1 usable texts for batches of 2"):
        run(made, tmp_path / "b", texts=["only one"])


def test_prompts_that_all_pass_the_limit_are_an_error_not_an_empty_run(base, tmp_path):
    long = PromptData((Prompt("p", (Turn("human", "x" * 500),), "helpful", "x:1"),), (), (), {})
    with pytest.raises(DataError, match="none of 1 training prompts fits"):
        run(recipe(base), tmp_path, data=long)


def test_the_cap_schedule_holds_from_its_iteration_on():
    section = PpoSection.model_validate(
        {"sampling": {"max_new_tokens": 48}, "length": {"cap_schedule": [[0, 8], [5, 16]]}}
    )
    assert [rollout_cap(section, i) for i in (0, 4, 5, 99)] == [8, 8, 16, 16]
    assert rollout_cap(PpoSection(), 3) == 48


def test_the_adaptive_coefficient_follows_the_golden_values_and_a_fixed_one_stays():
    kl = PpoSection.model_validate({"kl": {"coefficient": 0.1}}).kl
    beta = 0.1
    for divergence, expected in ((3, 0.099488), (12, 0.09999738), (6.6, 0.10025337)):
        beta = next_coefficient(kl, beta, divergence, 256)
        assert beta == pytest.approx(expected, rel=1e-6)
    fixed = PpoSection.model_validate({"kl": {"controller": "fixed"}}).kl
    assert next_coefficient(fixed, 0.07, 100.0, 256) == 0.07
