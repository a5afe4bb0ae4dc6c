"""Two processes against one: the same batches, losses, samples and weights; and what happens when one of them fails."""

import json
import shutil
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGSTOP, SIGTERM

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_rlhf import stages
from direct_rlhf.errors import Interrupted
from direct_rlhf.launch import command
from direct_rlhf.maths.losses import bradley_terry, nll
from direct_rlhf.recipe.load import load_recipe
from direct_rlhf.rollout.types import FinishReason, Rollout, SampleKey, joined
from direct_rlhf.run.world import World
from direct_rlhf.train.parallel import deal, everything, to_measure, to_train
from faults import assert_runs_equal, run_cli
from processes import Fault, Processes, assert_runs_close, make_study, metrics

IN_TIME = 15  # seconds within which a run with a lost process ends here; the promise is dead_after and some seconds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"))


def alone(study: Path, root: Path, *overrides: str, only: str | None = None) -> Path:
    """The run made by this process, without evaluation and report."""
    loaded = load_recipe(str(study / "toy.yaml"), overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Study, "evaluate", lambda self, models: None)
        patch.setattr(stages.Study, "_report", lambda self: None)
        return stages.run(loaded, root=root, resume=True, overwrite=False, only=only)


@pytest.fixture(scope="module")
def one(study, tmp_path_factory):
    return alone(study, tmp_path_factory.mktemp("one") / "runs")


@pytest.fixture(scope="module")
def two(study, tmp_path_factory):
    run = Processes(study, tmp_path_factory.mktemp("two"))
    ended = run.run()
    assert ended.code == 0, ended.err
    return run


def begun(run: Processes, path: Path) -> None:
    """Gives ``run`` a copy of another one as it was before PPO began."""
    shutil.copytree(path, run.path)
    (run.path / "stages" / "direct_ppo.json").unlink()
    for name in ("models/direct_ppo", "checkpoints/direct_ppo", "checkpoints/direct_ppo-best"):
        shutil.rmtree(run.path / name)
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (run.path / name).read_text().splitlines(keepends=True)
        (run.path / name).write_text("".join(line for line in lines if '"stage": "direct_ppo"' not in line))


@pytest.mark.promise("N4", "D3")
def test_two_processes_give_the_losses_samples_and_weights_of_one(one, two):
    assert_runs_close(one, two.path)
    assert two.status()["state"] == "done"
    assert json.loads((two.path / "logs" / "attempt_001" / "attempt.json").read_text())["processes"] == 2
    config = Path("models") / "direct_ppo" / "config.json"
    assert (one / config).read_text() == (two.path / config).read_text()


@pytest.mark.promise("N4")
def test_two_processes_with_adapters_on_a_shared_trunk_give_what_one_gives(study, tmp_path):
    lora = ["model.tuning=lora", "model.lora.rank=4", "ppo.ptx.weight=0.5", "ppo.ptx.batch_size=3"]
    lora += ["data.text=[{path: text.jsonl}]", "ppo.samples_per_prompt=2", "parallel.activation_checkpointing=true"]
    lora += ["parallel.shard_size=1", "parallel.asynchronous_checkpoints=true", "arms=[base, direct_ppo]"]
    lora += ["ppo.guard={action: raise_kl, tasks: [world], items: 2}"]  # the first process alone looks at general skill
    texts = ["The sky is blue.", "A cat sat on a mat, and a dog ran by.", "Two and two make four.", "Rain fell."]
    (study / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = Processes(study, tmp_path / "two", *lora)
    ended = run.run()
    assert ended.code == 0, ended.err
    assert_runs_close(alone(study, tmp_path / "one" / "runs", *lora), run.path)


@pytest.mark.promise("S3", "S5", "K10")
def test_a_signal_to_one_process_stops_both_and_one_or_two_go_on(study, one, two, tmp_path):
    run = Processes(study, tmp_path / "stopped")
    begun(run, two.path)
    ended = run.run(Fault(rank=1, point="ppo.minibatch", hit=5, signal=SIGTERM), options=["--only", "direct_ppo"])
    assert ended.code == 75, ended.err
    assert run.seconds_after_the_fault(ended) < IN_TIME
    assert ended.err.endswith(f"direct-rlhf: {run.path}: stopped on request. Go on with --resume.\n")
    assert (run.status()["state"], run.status()["resumable"]) == ("interrupted", True)
    marker = json.loads((run.path / run.status()["last_checkpoint"] / "complete.json").read_text())
    assert (marker["processes"], marker["step"]) == (2, 0)

    again = Processes(study, tmp_path / "two")
    shutil.copytree(run.path, again.path)
    assert again.run(options=["--only", "direct_ppo"]).code == 0
    assert_runs_equal(two.path, again.path)  # as if nothing had happened, to the last bit

    alone(study, run.root, only="direct_ppo")
    log = (run.path / "logs" / "attempt_003" / "log.txt").read_text()
    assert "goes on with 1 process(es) from a checkpoint of 2; the batches stay as they are" in log
    assert_runs_close(one, run.path)


@pytest.mark.promise("K10")
def test_what_one_process_began_two_go_on_with(study, one, tmp_path):
    run = Processes(study, tmp_path)
    begun(run, one)
    directory = run.path / "checkpoints" / "direct_ppo"
    with pytest.MonkeyPatch.context() as patch:
        counted = []
        patch.setattr(
            "direct_rlhf.train.ppo.StageContext.check_stop_together",
            lambda self: counted.append(1) or (self.stop() if len(counted) == 9 else None),
        )
        with pytest.raises(Interrupted):
            alone(study, run.root, only="direct_ppo")
    assert (directory / "step_000000" / "policy.safetensors").is_file()
    ended = run.run(options=["--only", "direct_ppo"])
    assert ended.code == 0, ended.err
    assert "goes on with 2 process(es) from a checkpoint of 1" in ended.err
    assert_runs_close(one, run.path)


@pytest.mark.promise("S4", "S5")
def test_a_killed_process_ends_the_run_with_the_cause_and_the_run_goes_on(study, two, tmp_path):
    run = Processes(study, tmp_path)
    begun(run, two.path)
    ended = run.run(Fault(rank=0, point="ppo.scored", signal=SIGKILL), options=["--only", "direct_ppo"])
    assert ended.code == 1
    assert run.seconds_after_the_fault(ended) < IN_TIME
    assert "process 0 of 2 has died (pid " in ended.err
    assert "was ended by SIGKILL" in ended.err
    assert run.status()["state"] == "failed"
    assert run.status()["reason"].startswith("process 0 of 2 has died (pid ")
    # Started again by torchrun after another loss, the processes go on by themselves.
    fault = Fault(rank=1, point="ppo.iteration", hit=2, signal=SIGKILL)
    ended = run.run(fault, options=["--only", "direct_ppo", "--max-restarts", "1"])
    assert ended.code == 0, ended.err
    assert len(list((run.path / "logs").iterdir())) == 4
    assert_runs_equal(two.path, run.path)


@pytest.mark.promise("S4", "S5")
def test_a_stopped_process_ends_the_run_within_the_time_that_the_recipe_gives(study, two, tmp_path):
    run = Processes(study, tmp_path, "parallel.dead_after=2")
    begun(run, two.path)
    ended = run.run(Fault(rank=1, point="ppo.rollout", signal=SIGSTOP), options=["--only", "direct_ppo"])
    assert ended.code == 1
    assert 2 < run.seconds_after_the_fault(ended) < IN_TIME
    assert "direct-rlhf: process 1 of 2 has given no sign of life for 2 s (pid " in ended.err
    assert run.status()["reason"].startswith("process 1 of 2 has given no sign of life")


@pytest.mark.promise("S2", "S5")
def test_a_second_signal_to_the_launcher_ends_all_processes_at_once(study, tmp_path):
    (study / "slow_reward.py").write_text(
        f"import pathlib, time\n\ndef reward(items):\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'asked').touch()\n    time.sleep(60)\n    return [0.0] * len(items)\n"
    )
    slow = ["ppo.reward={type: python, target: 'slow_reward:reward'}", "reward.normalisation_prompts=8"]
    arguments = ["run", "toy.yaml", *slow, "--root", str(tmp_path / "runs"), "--only", "direct_ppo", "--nproc", "2"]
    ended = run_cli(arguments, cwd=study, signal_at=(tmp_path / "asked", SIGINT, 2))
    assert (ended.code, ended.children) == (75, ()), ended.err
    assert ended.seconds < 40
    assert "SIGINT: saving and stopping; a second signal stops at once" in ended.err
    status = json.loads((tmp_path / "runs" / "toy" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["resumable"]) == ("interrupted", 75, True)


@pytest.mark.promise("N1")
def test_a_loss_that_is_no_number_in_one_process_stops_all_before_the_step(study, tmp_path):
    run = Processes(study, tmp_path)
    ended = run.run(Fault(rank=1, what="nan", calls=7), options=["--only", "reward_model"])
    assert ended.code == 5, ended.err
    assert "reward, step 3, items " in ended.err
    assert "loss nan, gradient norm nan; the step was not taken" in ended.err
    assert (run.status()["state"], run.status()["exit_code"]) == ("failed", 5)
    assert [row["step"] for row in metrics(run.path)] == [0, 1, 2]
    alert = json.loads((run.path / "alerts.jsonl").read_text())
    assert (alert["name"], alert["step"], len(alert["batch"])) == ("diverged", 3, 5)


@pytest.mark.promise("S6")
def test_torchrun_is_given_our_grace_time_where_it_takes_one(monkeypatch):
    line = command(["toy.yaml"], nproc=8, max_restarts=1, grace=90)
    assert "--shutdown-timeout=90" in line
    assert {"--nproc-per-node=8", "--max-restarts=1", "--standalone"} <= set(line)
    monkeypatch.setattr("direct_rlhf.launch.torchrun_has", lambda option: False)
    assert not any("shutdown" in part for part in command(["toy.yaml"], nproc=8, max_restarts=1, grace=90))


# Who computes what, without processes

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=24)


@given(lengths=LENGTHS, size=st.integers(1, 5), slots=st.integers(1, 90))
def test_every_row_counts_once_and_all_processes_make_equally_many_passes(lengths, size, slots):
    shares = [list(to_train(World(rank, size))(lengths, range(len(lengths)), slots)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for rows, counts in share if counts for row in rows) == list(
        range(len(lengths))
    )
    assert all(
        len(rows) * max(lengths[row] for row in rows) <= slots or len(rows) == 1
        for share in shares
        for rows, _ in share
    )
    measured = [
        rows for rank in range(size) for rows, _ in to_measure(World(rank, size))(lengths, range(len(lengths)), slots)
    ]
    assert sorted(row for rows in measured for row in rows) == list(range(len(lengths)))


@given(lengths=LENGTHS, size=st.integers(1, 5))
def test_no_process_has_more_than_its_share_and_the_longest_row(lengths, size):
    loads = [sum(lengths[row] for row in part) for part in deal(lengths, range(len(lengths)), size)]
    assert max(loads) <= sum(lengths) / size + max(lengths)
    assert deal(lengths, range(len(lengths)), size) == deal(lengths, range(len(lengths)), size)


def test_one_process_cuts_as_it_always_has():
    assert to_train(World()) is to_measure(World()) is everything


@pytest.mark.promise("N4")
@settings(deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 4), slots=st.integers(1, 90), seed=st.integers(0, 99))
def test_the_shares_of_uneven_processes_add_up_to_the_gradient_of_the_whole_batch(lengths, size, slots, seed):
    generator = torch.Generator().manual_seed(seed)
    n, longest = len(lengths), max(lengths)
    value_BL = torch.randn(n, longest, generator=generator, dtype=torch.float64)
    mask_BL = torch.arange(longest) < torch.tensor(lengths)[:, None]
    count = float(mask_BL.sum())

    def gradients(cuts) -> list[torch.Tensor]:
        weight = torch.ones(longest, dtype=torch.float64, requires_grad=True)
        for cut in cuts:
            for rows, counts in cut(lengths, range(n), slots):
                tokens = nll(value_BL[rows] * weight, mask_BL[rows], denominator=count)
                pairs = bradley_terry(
                    (value_BL[rows] * weight).sum(1), weight.sum() + 0 * value_BL[rows, 0], denominator=n
                )
                ((tokens + pairs) if counts else 0.0 * (tokens + pairs)).backward()
        return [weight.grad]

    whole = gradients([everything])
    shared = gradients([to_train(World(rank, size)) for rank in range(size)])
    torch.testing.assert_close(shared, whole, rtol=1e-10, atol=1e-12)


def test_rollouts_of_several_processes_are_joined_in_the_order_of_the_prompts():
    def part(rows, prompt_slots, slots):
        n = len(rows)
        ids_BT = torch.tensor([[10 * row + slot for slot in range(slots)] for row in rows])
        ones_BT = torch.ones(n, slots, dtype=torch.bool)
        return Rollout(
            prompt_ids_BP=torch.tensor([[row] * prompt_slots for row in rows]),
            prompt_mask_BP=torch.ones(n, prompt_slots, dtype=torch.bool),
            response_ids_BT=ids_BT,
            response_mask_BT=ones_BT,
            action_mask_BT=ones_BT,
            logprob_BT=ids_BT.float(),
            finish=(FinishReason.EOS,) * n,
            texts=tuple(map(str, rows)),
            keys=tuple(SampleKey(0, str(row), 0, 0) for row in rows),
            policy_version=7,
        )

    both = joined([part([0, 2], 3, 1), part([1], 2, 4)], [0, 2, 1])
    assert both.texts == ("0", "1", "2")
    assert [key.prompt_id for key in both.keys] == ["0", "1", "2"]
    assert both.prompt_ids_BP.tolist() == [[0, 0, 0], [0, 1, 1], [2, 2, 2]]  # padded on the left
    assert both.prompt_mask_BP.tolist()[1] == [False, True, True]
    assert both.response_ids_BT.tolist() == [[0, 0, 0, 0], [10, 11, 12, 13], [20, 0, 0, 0]]  # on the right
    assert both.action_mask_BT.sum(1).tolist() == [1, 4, 1]
    assert both.policy_version == 7
