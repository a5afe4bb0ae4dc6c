import contextlib
import copy
import gc
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import Prompt, PromptData, Turn
from direct_rlhf.errors import ConfigError, DataError, DivergenceError, Interrupted
from direct_rlhf.models.loading import load_causal_lm
from direct_rlhf.recipe.load import LoadedRecipe
from direct_rlhf.recipe.schema import PpoSection, Recipe
from direct_rlhf.rollout import native as native_module
from direct_rlhf.run import points
from direct_rlhf.run.context import StageContext
from direct_rlhf.run.directory import RunDirectory
from direct_rlhf.train import ppo as ppo_module
from direct_rlhf.train import update as update_module
from direct_rlhf.train.ppo import Inputs, next_coefficient, rollout_cap, train_ppo
from direct_rlhf.train.start import Sources
from faults import every_crash_point
from toys import toy_folder

REWARD = """
def reward(items):
    return [sum('a' <= c <= 'z' for c in item['answer']) for item in items]

def cost(items):
    return [sum(c in 'aeiou' for c in item['answer']) for item in items]
"""


CAP = 8  # tokens of an answer
LONGEST = 29 + CAP  # of a prompt of two digits, as the dialogue format renders it, and its answer


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
        "micro_batch_tokens": 4 * LONGEST,
        "epochs": 2,
        "evaluate_every": 2,
        "evaluate_prompts": 8,
        "checkpoint_every": 1,
        "critic": {"warmup": 3},
        "sampling": {"max_new_tokens": CAP},
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


def run(made, root, *, resume=False, should_stop=lambda: False, texts=(), data=None, probe=None):
    (root / "letter_reward.py").write_text(REWARD)
    directory = RunDirectory.open(root / "runs", LoadedRecipe.of(made, root), resume=resume, overwrite=False)
    torch.set_num_threads(1)
    context = StageContext(made, directory, "cpu", should_stop)
    sources = Sources(directory.path / "reward_model", root, directory.path / "cost_model")
    inputs = Inputs("direct_ppo", made.model.base, load_tokens(made.model.base), sources, texts, probe)
    folder = train_ppo(context, data or prompts(), inputs)
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
        micro_batch_tokens=32 * LONGEST,
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


@pytest.fixture(scope="module", params=["full", "lora"])
def whole(request, base, tmp_path_factory):
    """(tuning, an uninterrupted run, how often it asked whether to stop)."""
    asked = []
    root = tmp_path_factory.mktemp("whole")
    done = run(recipe(base, tuning=request.param), root, should_stop=lambda: bool(asked.append(1)))
    return request.param, done, len(asked)


@pytest.mark.promise("K6", "K7")
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_run_stopped_anywhere_and_resumed_equals_an_uninterrupted_one_bit_for_bit(
    base, whole, tmp_path_factory, data
):
    tuning, uninterrupted, polls = whole
    root = tmp_path_factory.mktemp("stopped")
    stop_at = data.draw(st.lists(st.integers(0, polls - 1), min_size=1, max_size=2, unique=True).map(sorted))
    for polls_left in stop_at:
        asked = iter([False] * polls_left + [True] * 10_000)
        with contextlib.suppress(Interrupted):  # a second stop may come after the resumed run's end
            run(recipe(base, tuning=tuning), root, should_stop=lambda asked=asked: next(asked), resume=True)
    assert_same(run(recipe(base, tuning=tuning), root, resume=True), uninterrupted)


BORDERS = ["rollout", "scored", "warmed", "minibatch", "updated", "evaluated", "iteration"]


@pytest.mark.promise("K7")
@pytest.mark.parametrize("border", BORDERS)
def test_a_stop_at_each_border_inside_an_iteration_draws_no_rollout_twice(base, tmp_path, whole, monkeypatch, border):
    tuning, uninterrupted, _ = whole
    hits = {"minibatch": 5, "warmed": 1, "evaluated": 1}.get(border, 2)  # else in the second iteration
    reached, drawn = [], []
    real = ppo_module.sample

    def counting(*args, **kwargs):
        rollout = real(*args, **kwargs)
        drawn.append(rollout)
        return rollout

    monkeypatch.setattr(ppo_module, "sample", counting)
    token = points.hook.set(lambda name: reached.extend([name] if name == f"ppo.{border}" else []))
    try:
        with pytest.raises(Interrupted):
            run(recipe(base, tuning=tuning), tmp_path, should_stop=lambda: len(reached) >= hits)
    finally:
        points.hook.reset(token)
    assert_same(run(recipe(base, tuning=tuning), tmp_path, resume=True), uninterrupted)
    assert len(drawn) == 3 + 2  # three iterations, two evaluations: what was done before the stop was used again


@pytest.mark.promise("K7")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_crash_at_each_border_is_as_if_it_had_not_been(base, tmp_path, tuning):
    made = recipe(base, tuning=tuning, checkpoint_every=2)
    whole = []

    def train(label):
        (tmp_path / label).mkdir(exist_ok=True)
        whole.append(run(made, tmp_path / label))

    for place in every_crash_point(train):
        assert_same(run(made, tmp_path / str(place), resume=True), whole[0])


@pytest.mark.promise("K8")
def test_a_resumed_run_draws_the_same_random_numbers_from_its_first_draw_on(base, tmp_path, monkeypatch):
    drawn = []
    real = native_module.uniforms

    def counting(keys, n):
        found = real(keys, n)
        drawn.append(found.tobytes())
        return found

    monkeypatch.setattr(native_module, "uniforms", counting)
    for side in "ab":
        (tmp_path / side).mkdir()
    run(recipe(base), tmp_path / "a")
    fresh, asked = list(drawn), iter([False] * 14 + [True] * 100)
    drawn.clear()
    torch.manual_seed(0)
    with pytest.raises(Interrupted):
        run(recipe(base), tmp_path / "b", should_stop=lambda: next(asked))
    before = list(drawn)
    drawn.clear()
    torch.manual_seed(1)  # the global state is nobody's business
    run(recipe(base), tmp_path / "b", resume=True)
    after = list(drawn)
    # what was drawn before the stop and what is drawn after it make up the uninterrupted run's draws, in order
    overlap = len(before) + len(after) - len(fresh)
    assert 0 <= overlap <= 2  # a rollout (and its held-out one) that was broken off is drawn again, the same
    assert before[: len(before) - overlap] + after == fresh


@pytest.mark.promise("D1")
def test_the_same_recipe_gives_the_same_metrics_and_another_seed_other_samples(base, tmp_path, whole):
    tuning, first, _ = whole
    assert_same(run(recipe(base, tuning=tuning), tmp_path), first)


def test_the_size_of_micro_batches_changes_no_result_beyond_rounding(base, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = metrics(run(recipe(base, iterations=1), tmp_path / "a")[0])[-1]
    other = metrics(run(recipe(base, iterations=1, micro_batch_tokens=8 * LONGEST), tmp_path / "b")[0])[-1]
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


def stale_sampler(monkeypatch, *, honest):
    """A sampler whose weights are never synced after its first rollout."""
    real, kept = ppo_module.sample, []

    def stale(model, tokens, ids, keys, settings, *, policy_version, **more):
        kept.append(kept[0] if kept else (copy.deepcopy(model), policy_version))
        weights, version = kept[0]
        return real(weights, tokens, ids, keys, settings, policy_version=version if honest else policy_version, **more)

    monkeypatch.setattr(ppo_module, "sample", stale)


@pytest.mark.promise("N6")
def test_a_sampler_that_missed_a_weight_sync_is_noticed_by_its_version(base, tmp_path, monkeypatch):
    stale_sampler(monkeypatch, honest=True)
    with pytest.raises(
        DivergenceError, match=r"the rollout is of policy version 0, but the policy has taken 4 optimiser"
    ):
        run(recipe(base), tmp_path)
    assert [row["step"] for row in metrics(RunDirectory(tmp_path / "runs/toy"))] == [1]


@pytest.mark.promise("N5", "N6")
def test_stale_weights_under_a_new_version_number_are_noticed_by_the_ratio(base, tmp_path, monkeypatch):
    stale_sampler(monkeypatch, honest=False)
    with pytest.raises(DivergenceError, match="sampler and trainer disagree before any update"):
        run(recipe(base, optimiser={"learning_rate": 1e-3}), tmp_path)


@pytest.mark.promise("N1")
def test_a_loss_that_is_not_finite_takes_no_step_and_says_where(base, tmp_path, monkeypatch):
    real = update_module.policy_loss

    def broken(*args, **kwargs):
        term = real(*args, **kwargs)
        return replace(term, loss=term.loss * float("nan"))

    monkeypatch.setattr(update_module, "policy_loss", broken)
    with pytest.raises(
        DivergenceError, match=r"policy, iteration 0, epoch 0, minibatch at 0, prompts p\d+, p\d+, p\d+, p\d+, \.\.\."
    ):
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


class ForcedProbe:
    """General skill as told: a list of scores per look, one task."""

    def __init__(self, *looks):
        self.looks, self.seen = list(looks), 0

    def __call__(self, model, *, should_stop):
        scores = self.looks[min(self.seen, len(self.looks) - 1)]
        self.seen += 1
        return {"task": scores}


GOOD, BAD = [1.0] * 18 + [0.0] * 2, [1.0] * 8 + [0.0] * 12


def guarded(base, action, **more):
    return recipe(base, iterations=4, evaluate_every=1, guard={"action": action, "max_drop": 0.1, **more})


def alerts(directory):
    path = directory.path / "alerts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.promise("N10")
def test_a_drop_of_general_skill_beyond_the_bound_stops_the_run_and_keeps_the_best_policy_before_it(base, tmp_path):
    directory, folder = run(guarded(base, "stop"), tmp_path, probe=ForcedProbe(GOOD, GOOD, BAD))
    rows = metrics(directory)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["probe_difference"] == pytest.approx(-0.5)
    assert rows[1]["probe_difference_high"] < 0
    assert alerts(directory)[-1]["name"] == "capability_drop"
    assert "50.0%" in alerts(directory)[-1]["seen"]
    directory.finish_stage("direct_ppo", "x", 0.0, {})
    facts = directory.stage_record("direct_ppo")["facts"]
    assert facts["guard"] == {
        "action": "stop", "max_drop": 0.1, "probes": 2, "raises": 0, "worst": pytest.approx(-0.5), "stopped": True
    }  # fmt: skip
    assert facts["best"]["iteration"] == 1
    kept = directory.checkpoints("direct_ppo-best", keep=1).latest()
    assert kept.step == 1
    saved = parameters(folder)
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept.tensors("policy").items())


@pytest.mark.promise("N10")
def test_a_drop_raises_the_kl_weight_for_good_and_stops_once_that_no_longer_helps(base, tmp_path):
    made = guarded(base, "raise_kl", kl_factor=3.0, max_raises=1)
    directory, _ = run(made, tmp_path, probe=ForcedProbe(GOOD, BAD, GOOD, BAD))
    rows = metrics(directory)
    assert rows[1]["kl_coefficient"] == pytest.approx(3 * 0.05, rel=0.01)
    assert rows[2]["kl_coefficient"] >= rows[1]["kl_coefficient"]  # KL is far below its target, and yet it stays
    assert [row["step"] for row in rows] == [1, 2, 3]  # the second drop stops the run
    assert [row["name"] for row in alerts(directory)] == ["capability_drop"] * 2


@pytest.mark.promise("N10")
def test_if_no_policy_kept_its_general_skill_the_one_it_started_from_is_saved(base, tmp_path):
    _, folder = run(guarded(base, "stop"), tmp_path, probe=ForcedProbe(GOOD, BAD))
    start = parameters(base)
    assert all(torch.equal(tensor, start[name]) for name, tensor in parameters(folder).items())


@pytest.mark.promise("N10")
def test_a_drop_within_the_bound_or_within_the_noise_is_left_alone(base, tmp_path):
    (tmp_path / "a").mkdir()
    small = [1.0] * 17 + [0.0] * 3
    directory, _ = run(guarded(base, "stop"), tmp_path / "a", probe=ForcedProbe(GOOD, small))
    assert len(metrics(directory)) == 4
    (tmp_path / "b").mkdir()
    noise = [0.0] * 4 + [1.0] * 16  # 4 lost, 2 won: a drop of 10 %, and the interval covers 0
    directory, folder = run(guarded(base, "stop", max_drop=0.05), tmp_path / "b", probe=ForcedProbe(GOOD, noise))
    assert len(metrics(directory)) == 4
    start = parameters(base)  # the run went on, but no such policy is kept
    assert all(torch.equal(tensor, start[name]) for name, tensor in parameters(folder).items())
    assert metrics(directory)[0]["probe_difference"] == pytest.approx(-0.1)
    assert metrics(directory)[0]["probe_difference_high"] > 0


def test_a_guard_without_a_probe_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match=r"ppo.guard.action = stop: needs a probe"):
        run(guarded(base, "stop"), tmp_path)


def lagrangian(**more):
    section = {"enabled": True, "cost": {"type": "python", "target": "letter_reward:cost"}, "window": 32}
    return {"lagrangian": section | more}


@pytest.mark.promise("K6")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_ppo_lagrangian_resumes_exactly_with_its_multiplier_window_and_second_critic(base, tmp_path, tuning):
    made = recipe(base, tuning=tuning, **lagrangian(bound=-0.5))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(made, tmp_path / "a")
    rows = metrics(whole[0])
    assert all({"cost_mean", "multiplier", "cost_window_mean", "cost_value_loss"} <= row.keys() for row in rows)
    multiplier = 1.0
    for row in rows:  # the rule of the maths room, on what was logged
        assert row["multiplier"] == pytest.approx(multiplier, rel=1e-5)
        multiplier *= math.exp(0.1 * (row["cost_window_mean"] + 0.5) * multiplier)
    asked = iter([False] * 17 + [True] * 10_000)
    with pytest.raises(Interrupted):
        run(made, tmp_path / "b", should_stop=lambda: next(asked))
    assert_same(run(made, tmp_path / "b", resume=True), whole)


def test_a_fixed_multiplier_is_the_weighted_sum_and_stays(base, tmp_path):
    rows = metrics(run(recipe(base, **lagrangian(learning_rate=0.0, multiplier=2.0)), tmp_path)[0])
    assert [row["multiplier"] for row in rows] == [pytest.approx(2.0)] * 3


@pytest.mark.promise("R6")
def test_memory_does_not_grow_over_200_iterations(base, tmp_path):
    made = recipe(
        base, iterations=200, rollouts=2, minibatch_size=2, epochs=1, evaluate_every=50, evaluate_prompts=2,
        checkpoint_every=50, sampling={"max_new_tokens": 2}, length={"unfinished": "subtract"},
    )  # fmt: skip
    reached, counts = [], []

    def count(name):
        reached.extend([name] if name == "ppo.iteration" else [])
        if name == "ppo.iteration" and len(reached) in (20, 200):
            gc.collect()
            tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
            counts.append((len(tensors), sum(tensor.nbytes for tensor in tensors)))

    token = points.hook.set(count)
    try:
        run(made, tmp_path)
    finally:
        points.hook.reset(token)
    assert len(reached) == 200
    assert counts[1] == counts[0]
