"""PPO whose answers are sampled by vLLM: by a small server that speaks its protocol, on the toy model."""

import json
import math

import pytest
import torch

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import Prompt, PromptData, Turn
from direct_rlhf.errors import BackendError, CheckpointError, DivergenceError, Interrupted
from direct_rlhf.models.loading import load_causal_lm
from direct_rlhf.recipe.load import LoadedRecipe
from direct_rlhf.recipe.schema import Recipe
from direct_rlhf.run import points
from direct_rlhf.run.context import StageContext
from direct_rlhf.run.directory import RunDirectory
from direct_rlhf.train import ppo as ppo_module
from direct_rlhf.train.ppo import Inputs, train_ppo
from direct_rlhf.train.start import Sources
from processes import Processes, make_study, metrics
from toys import toy_folder
from vllm_server import VllmServer, stand_in

REWARD = "def reward(items):\n    return [sum('a' <= c <= 'z' for c in item['answer']) for item in items]\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("base"))


def recipe(base, rollout=None, tuning="full", **ppo):
    section = {
        "iterations": 2,
        "rollouts": 8,
        "minibatch_size": 4,
        "micro_batch_tokens": 150,
        "epochs": 2,
        "evaluate_every": 2,
        "checkpoint_every": 1,
        "evaluate_prompts": 4,
        "optimiser": {"learning_rate": 1e-2, "warmup": 0},
        "critic": {"warmup": 1},
        "kl": {"inner_limit": 100},
        "sampling": {"max_new_tokens": 8},
        "reward": {"type": "python", "target": "letter_reward:reward"},
        **ppo,
    }
    values = {"name": "toy", "model": {"base": str(base), "tuning": tuning, "lora": {"rank": 4}}, "ppo": section}
    values["reward"] = {"normalisation_prompts": 16}
    return Recipe.model_validate(values | ({"rollout": rollout} if rollout else {}))


def by(server, **correction):
    section = {"url": server.url, "retries": 1, "concurrency": 4}
    return {"engine": "vllm", "vllm": section, "correction": correction}


def run(made, root, *, resume=False, should_stop=lambda: False):
    root.mkdir(exist_ok=True)
    (root / "letter_reward.py").write_text(REWARD)
    directory = RunDirectory.open(root / "runs", LoadedRecipe.of(made, root), resume=resume, overwrite=False)
    torch.set_num_threads(1)
    prompts = [Prompt(f"p{i}", (Turn("human", f"Say {i}."),), "helpful", f"x:{i}") for i in range(24)]
    data = PromptData(tuple(prompts[8:]), tuple(prompts[:8]), (), {})
    sources = Sources(directory.path / "reward_model", root, directory.path / "cost_model")
    inputs = Inputs("direct_ppo", made.model.base, load_tokens(made.model.base), sources)
    return directory.path, train_ppo(StageContext(made, directory, "cpu", should_stop), data, inputs)


def alerts(path):
    return [json.loads(line) for line in (path / "alerts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_ppo_on_a_servers_samples_finds_no_mismatch_and_needs_no_correction(base, tmp_path, tuning):
    with VllmServer(base) as server:
        path, folder = run(recipe(base, by(server), tuning), tmp_path)
    rows = metrics(path)
    assert len(rows) == 2
    assert all(abs(row["mismatch_kl"]) < 1e-9 for row in rows)  # the toy server computes what the trainer computes
    assert all(row["mismatch_truncated"] == 0 for row in rows)
    assert rows[0]["kl_sequence"] == pytest.approx(0, abs=1e-4)
    # weights were given once before each iteration and once for the evaluation, each time under a new name
    loads = [body["kwargs"]["weights_path"] for route, body in server.asked if route == "/collective_rpc"]
    assert len(set(loads)) == len(loads) == 3
    served = {name: tensor for name, tensor in server.engine._model.state_dict().items() if "lm_head" not in name}
    ours = load_causal_lm(folder).state_dict()  # the only evaluated policy is the last one, and the best
    assert all(torch.allclose(tensor, ours[name], atol=1e-6) for name, tensor in served.items())
    assert not (path / "weights").exists()


def test_a_server_samples_the_same_distribution_of_rewards_as_the_native_engine(base, tmp_path):
    sizes = {"iterations": 1, "rollouts": 128, "minibatch_size": 128, "epochs": 1, "evaluate_prompts": 1}
    sizes |= {"micro_batch_tokens": 2000, "samples_per_prompt": 8}
    with VllmServer(base) as server:
        (theirs,) = metrics(run(recipe(base, by(server), **sizes), tmp_path / "server")[0])
    (ours,) = metrics(run(recipe(base, **sizes), tmp_path / "native")[0])
    error = math.hypot(theirs["reward_std"], ours["reward_std"]) / 128**0.5
    assert abs(theirs["reward_mean"] - ours["reward_mean"]) < 4 * error
    assert theirs["reward_mean"] != ours["reward_mean"]  # other random numbers
    assert "mismatch_kl" not in ours


def shifted(by_nats):
    def edit(choice):
        values = choice["logprobs"]["token_logprobs"]
        choice["logprobs"]["token_logprobs"] = [value - by_nats for value in values]

    return edit


@pytest.mark.parametrize(("nats", "truncated"), [(0.1, 0.0), (1.0, 1.0)])
def test_a_mismatch_is_reported_corrected_and_said(base, tmp_path, monkeypatch, nats, truncated):
    """The sampler says less than the trainer: every weight is exp(nats), cut at 2."""
    weights = []
    real = ppo_module.estimate

    def estimate(*arguments, **options):
        found = real(*arguments, **options)
        weights.append(found.correction.weight_BT[found.scored.rollout.action_mask_BT])
        return found

    monkeypatch.setattr(ppo_module, "estimate", estimate)
    with VllmServer(base, edit=shifted(nats)) as server:
        path, _ = run(recipe(base, by(server, stop_above=10), iterations=3, epochs=1, evaluate_every=3), tmp_path)
    for row in metrics(path):
        assert row["mismatch_kl"] == pytest.approx(math.exp(nats) - 1 - nats, rel=1e-3)
        assert row["mismatch_truncated"] == truncated
    assert torch.cat(weights).tolist() == pytest.approx([min(math.exp(nats), 2.0)] * len(torch.cat(weights)), rel=1e-4)
    (alert,) = [row for row in alerts(path) if row["name"] == "sampler_mismatch"] if nats == 1.0 else [None]
    if alert is not None:
        assert alert["step"] == 3
        assert "over 0.01" in alert["seen"]


def test_a_server_that_only_says_it_has_loaded_weights_trains_nothing(base, tmp_path):
    """Neither does a server of another model. It knows no versions: the mismatch itself gives it away."""
    with VllmServer(base, deaf=True, versions=False) as server:
        made = recipe(base, by(server, stop_above=1e-4))
        with pytest.raises(DivergenceError, match=r"nats per token from what the trainer computes .*stale weights"):
            run(made, tmp_path)
    assert len(metrics(tmp_path / "runs" / "toy")) == 1  # with the weights that it was started with it was right


def test_a_server_started_again_during_an_iteration_trains_nothing_and_is_given_weights_on_resume(base, tmp_path):
    with VllmServer(base) as server:
        made = recipe(base, by(server))
        expected = metrics(run(made, tmp_path / "whole")[0])
        asked = server.routes().count("/v1/completions")
        halfway = asked + 8 + 4  # in the second iteration
        server.fault = lambda path, nth: server.restart() if (path, nth) == ("/v1/completions", halfway) else None
        with pytest.raises(BackendError, match="its weights are 'default'"):
            run(made, tmp_path / "broken")
        server.fault = lambda path, nth: None
        assert metrics(run(made, tmp_path / "broken", resume=True)[0]) == expected


@pytest.mark.parametrize("border", ["rollout", "updated", "evaluated"])
def test_a_run_stopped_and_resumed_repeats_one_that_was_not(base, tmp_path, border):
    """With a server that says the same for the same seed, as this one does."""
    reached = []
    with VllmServer(base) as server:
        made = recipe(base, by(server), iterations=3)
        expected, _ = run(made, tmp_path / "whole")
        token = points.hook.set(lambda name: reached.extend([name] if name == f"ppo.{border}" else []))
        try:
            with pytest.raises(Interrupted):
                run(made, tmp_path / "stopped", should_stop=lambda: bool(reached))
        finally:
            points.hook.reset(token)
        assert metrics(run(made, tmp_path / "stopped", resume=True)[0]) == metrics(expected)


def test_the_address_of_the_server_may_change_between_a_stop_and_a_resume_and_the_engine_may_not(base, tmp_path):
    with VllmServer(base) as server:
        made = recipe(base, by(server))
        with pytest.raises(Interrupted):
            run(made, tmp_path, should_stop=lambda: "/collective_rpc" in server.routes())
    with pytest.raises(CheckpointError, match=r"rollout\.engine: 'vllm' is now None"):
        run(recipe(base), tmp_path, resume=True)
    with VllmServer(base) as server:
        assert len(metrics(run(recipe(base, by(server)), tmp_path, resume=True)[0])) == 2


def test_weights_may_go_through_a_folder_of_ones_own(base, tmp_path):
    with VllmServer(base) as server:
        rollout = by(server)
        rollout["vllm"]["weights"] = str(tmp_path / "fast")
        run(recipe(base, rollout, iterations=1), tmp_path)
        loads = [body["kwargs"]["weights_path"] for route, body in server.asked if route == "/collective_rpc"]
    assert all(load.startswith(f"{tmp_path / 'fast'}/direct-rlhf-") for load in loads)
    assert list((tmp_path / "fast").iterdir()) == []  # nothing is left behind


def test_ppo_with_a_colocated_engine_wakes_it_with_new_weights_and_lets_it_sleep(base, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(__import__("sys").modules, "vllm", stand_in(calls, base))
    path, _ = run(recipe(base, {"engine": "vllm", "vllm": {"mode": "colocated"}}), tmp_path)
    assert all(abs(row["mismatch_kl"]) < 1e-9 for row in metrics(path))
    once = ["wake weights", "reload_weights", "wake kv_cache", "reset", "generate 8", "sleep 2"]
    held_out = [*once[:4], "generate 4", "sleep 2"]
    assert [call for call in calls if call != "generate 1"] == ["sleep 2", *once, *once, *held_out]


@pytest.mark.slow
def test_two_processes_share_the_answers_and_give_the_server_weights_once(tmp_path):
    study = make_study(tmp_path)
    (study / "letter_reward.py").write_text(REWARD)
    with VllmServer(study / "base") as server:
        settings = ["ppo.reward={type: python, target: letter_reward:reward}", "arms=[base,direct_ppo]"]
        settings += [f"rollout={{engine: vllm, vllm: {{url: '{server.url}'}}}}", "ppo.iterations=2"]
        made = Processes(study, tmp_path / "two", *settings)
        ended = made.run()
    assert ended.code == 0, ended.err
    rows = [row for row in metrics(made.path) if row["stage"] == "direct_ppo"]
    assert len(rows) == 2
    assert all(abs(row["mismatch_kl"]) < 1e-8 for row in rows)
    routes = server.routes()
    assert routes.count("/collective_rpc") == 3
    seeds = [body["seed"] for route, body in server.asked if route == "/v1/completions"]
    assert len(seeds) == len(set(seeds)) == 8 + 8 + 4  # every answer was asked for once
