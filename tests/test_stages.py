"""The whole path: data, reward model, fitness, arms, evaluation, report, on toy models of several architectures."""

import gzip
import json
import random

import pytest

from direct_rlhf import stages
from direct_rlhf.errors import BackendError, ConfigError, Interrupted
from direct_rlhf.recipe.load import load_recipe
from direct_rlhf.run.directory import RunDirectory
from toys import toy_folder

SMALL = [
    "data.max_prompt_tokens=160",
    "data.max_answer_tokens=64",
    "reward.max_steps=3",
    "reward.batch_size=4",
    "reward.normalisation_prompts=16",
    "ppo.iterations=2",
    "ppo.rollouts=8",
    "ppo.minibatch_size=4",
    "ppo.micro_batch_tokens=256",
    "ppo.epochs=1",
    "ppo.evaluate_every=2",
    "ppo.evaluate_prompts=4",
    "ppo.critic.warmup=1",
    "ppo.sampling.max_new_tokens=8",
    "evaluation.general.limit=2",
    "evaluation.conversation.limit=2",
    "evaluation.toxicity.limit=2",
    "evaluation.max_new_tokens=8",
    "evaluation.bootstrap_draws=200",
    "threads=1",
]


@pytest.fixture(scope="module")
def hh_folder(tmp_path_factory):
    """Two small files in the layout and format of Anthropic HH, with text of our own."""
    root = tmp_path_factory.mktemp("hh")
    draw = random.Random(0)
    for kind in ("helpful", "harmless"):
        folder = root / f"hh_rlhf_{kind}_test"
        folder.mkdir()
        with gzip.open(folder / f"{kind}-base_test.jsonl.gz", "wt") as out:
            for i in range(60):
                prompt = f"\n\nHuman: Tell me about thing {i} of {kind}.\n\nAssistant:"
                good, bad = f" It is {draw.choice(['red', 'blue'])}.", f" No idea {draw.randint(0, 99)}."
                out.write(json.dumps({"chosen": prompt + good, "rejected": prompt + bad}) + "\n")
    return root


def run(hh_folder, base, root, *more, **flags):
    loaded = load_recipe("hh-small", [f"data.path={hh_folder}", f"model.base={base}", *SMALL, *more])
    return stages.run(loaded, root=root, **({"resume": False, "overwrite": False} | flags))


def results(path):
    return json.loads((path / "results.json").read_text())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "gpt2"])
def test_any_causal_lm_goes_from_pairs_to_a_report(hh_folder, tmp_path, architecture):
    path = run(hh_folder, toy_folder(tmp_path / "base", architecture), tmp_path / "runs")
    found = results(path)
    assert set(found["arms"]) == {"base", "direct_ppo"}
    for arm in found["arms"].values():
        assert len(arm["general"]["tasks"]) == 11
        assert arm["conversation"]["n_scored"] + arm["conversation"]["n_failed"] == 4  # two questions of two turns
    assert 0 <= found["reward_model"]["accuracy"] <= 1
    assert found["reward_model"]["ci"][0] <= found["reward_model"]["accuracy"] <= found["reward_model"]["ci"][1]
    assert (path / "report.html").stat().st_size > 10_000
    status = json.loads((path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("done", 0)


def test_all_arms_are_made_from_the_same_data(hh_folder, tmp_path):
    base = toy_folder(tmp_path / "base")
    arms = "arms=[base, sft, dpo, sft_ppo, direct_ppo]"
    path = run(hh_folder, base, tmp_path / "runs", arms, "sft.max_steps=2", "dpo.max_steps=2")
    assert set(results(path)["arms"]) == {"base", "sft", "dpo", "sft_ppo", "direct_ppo"}
    for arm in ("sft", "dpo", "sft_ppo", "direct_ppo"):
        card = (path / "models" / arm / "README.md").read_text()
        assert "hh-small" in card
        assert "Human:" in card


def test_lora_goes_the_whole_path_on_one_trunk(hh_folder, tmp_path):
    path = run(hh_folder, toy_folder(tmp_path / "base"), tmp_path / "runs", "model.tuning=lora", "model.lora.rank=4")
    assert (path / "models/direct_ppo/adapter/adapter_config.json").is_file()
    assert (path / "reward_model/adapter/adapter_config.json").is_file()


@pytest.fixture(scope="module")
def finished(hh_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    return toy_folder(root / "base"), run(hh_folder, root / "base", root / "runs")


def test_a_finished_run_is_not_run_again_without_being_told_how(hh_folder, finished):
    base, path = finished
    with pytest.raises(ConfigError, match=r"this run exists\. Use --resume to go on with it, --overwrite"):
        run(hh_folder, base, path.parent)


def test_a_resume_skips_every_stage_that_is_done(hh_folder, finished):
    base, path = finished
    before = {file: file.stat().st_mtime_ns for file in path.glob("models/*/model.safetensors")}
    every_time = {"data", "report"}  # they cost a moment and only read

    def finished_at():
        records = {file.stem: json.loads(file.read_text()) for file in path.glob("stages/*.json")}
        return {name: record["finished"] for name, record in records.items() if name not in every_time}

    done = finished_at()
    assert {"reward_model", "fitness", "direct_ppo", "evaluation-base", "evaluation-direct_ppo"} <= done.keys()
    run(hh_folder, base, path.parent, resume=True)
    assert before == {file: file.stat().st_mtime_ns for file in path.glob("models/*/model.safetensors")}
    assert done == finished_at()


def test_a_signal_leaves_a_run_that_says_it_can_be_resumed(hh_folder, tmp_path, monkeypatch):
    base = toy_folder(tmp_path / "base")
    monkeypatch.setattr(stages.StopFlag, "__call__", lambda self: True)
    with pytest.raises(Interrupted) as caught:
        run(hh_folder, base, tmp_path / "runs")
    assert caught.value.exit_code == 75
    status = json.loads((tmp_path / "runs/hh-small/status.json").read_text())
    assert (status["state"], status["exit_code"], status["resumable"]) == ("interrupted", 75, True)
    monkeypatch.undo()
    assert set(results(run(hh_folder, base, tmp_path / "runs", resume=True))["arms"]) == {"base", "direct_ppo"}


def test_only_one_stage_can_be_asked_for_and_a_wrong_one_names_the_choices(hh_folder, tmp_path):
    base = toy_folder(tmp_path / "base")
    with pytest.raises(
        ConfigError,
        match="--only pppo: no such stage; choose one of objectives, mixture, reward_model, fitness, cost_model",
    ):
        run(hh_folder, base, tmp_path / "runs", only="pppo")
    with pytest.raises(
        ConfigError, match=r"--only dpo: this recipe's arms \(base, direct_ppo\) do not need that stage"
    ):
        run(hh_folder, base, tmp_path / "runs", only="dpo")
    path = run(hh_folder, base, tmp_path / "runs", only="reward_model", resume=True)
    assert (path / "reward_model/reward.json").is_file()
    assert not (path / "models").exists()


def test_two_runs_are_compared_in_one_report(finished, tmp_path):
    _, path = finished
    out = stages.report([path, path], tmp_path / "both.html")
    assert out.is_file()


def test_models_that_were_not_trained_here_are_evaluated_and_compared(tmp_path):
    one, other = toy_folder(tmp_path / "one"), toy_folder(tmp_path / "other", seed=1)
    loaded = load_recipe("hh-small", SMALL)
    path = stages.evaluate_models([str(one), str(other)], loaded, root=tmp_path / "runs", suites=["toxicity"])
    assert set(results(path)["arms"]) == {"one", "other"}


def test_every_row_of_the_data_is_accounted_for(finished):
    _, path = finished
    facts = RunDirectory(path).stage_record("data")["facts"]
    assert facts["preferences"]["read"] == 120
    rejected = (path / "rejected.jsonl").read_text().splitlines() if (path / "rejected.jsonl").exists() else []
    assert facts["preferences"]["read"] == facts["preferences"]["kept"] + len(rejected)


def test_a_vllm_server_that_is_not_there_is_said_before_anything_is_trained(hh_folder, tmp_path):
    server = ["rollout.engine=vllm", "rollout.vllm.url=http://127.0.0.1:9", "rollout.vllm.retries=0"]
    with pytest.raises(BackendError, match="failed 1 times"):
        run(hh_folder, toy_folder(tmp_path / "base"), tmp_path, *server)
    assert not list(tmp_path.glob("*/stages/reward_model.json"))
    assert list(tmp_path.glob("*/stages/data.json"))
