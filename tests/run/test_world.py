import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from direct_rlhf.errors import CheckpointError, ConfigError, DataError
from direct_rlhf.run.checkpoints import CheckpointStore
from direct_rlhf.run.watch import error_named, name_of
from direct_rlhf.run.world import World, launch_id, launched

ELASTIC = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}


def test_one_process_is_a_world_of_its_own_in_which_nothing_is_sent():
    world, thing = World(), object()
    assert (world.is_main, world.speaks) == (True, True)
    assert world.sum({"a": 0.1}) == {"a": 0.1}
    assert [world.any(flag) for flag in (True, False)] == [True, False]
    assert world.gather(thing) == [thing]
    assert world.main(lambda: thing) is world.together(lambda: thing) is thing
    error = KeyError("x")
    assert world.explained(error) is error
    assert launched() == world
    assert not torch.distributed.is_initialized()


def test_torchruns_environment_says_which_process_this_is(monkeypatch):
    for name, value in ELASTIC.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert launched() == World(3, 8, 1, 2, 2, by_torchrun=True)
    nameless = launch_id()
    assert nameless != "none"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job_7")
    assert launch_id() == "job_7"
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match=r"torchrun's environment lacks LOCAL_RANK\. Start the run with torchrun"):
        launched()


def test_an_error_of_another_process_comes_back_as_one_of_ours_of_the_same_kind():
    for error in (DataError("row 7"), ConfigError("x")):
        again = error_named(name_of(error), str(error))
        assert (type(again), str(again)) == (type(error), str(error))
    assert name_of(KeyboardInterrupt()) == "Interrupted"
    assert name_of(ValueError("x")) == "BackendError"
    assert type(error_named("NoSuchKind", "x")).__name__ == "BackendError"


@pytest.mark.slow
@pytest.mark.promise("K2", "K3", "K10", "K11", "N3")
def test_two_processes_agree_and_keep_their_shares_of_a_checkpoint(tmp_path):
    alone = CheckpointStore(tmp_path / "alone", keep=1)
    shapes = {"0.weight": (7, 5), "0.bias": (7,), "1.weight": (1, 7), "1.bias": (1,)}
    tensors = {name: torch.arange(float(torch.Size(shape).numel())).view(shape) for name, shape in shapes.items()}
    alone.save(1, {"model": tensors}, {"optimiser": None})

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("two_worlds.py")
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert sorted(path.name for path in tmp_path.glob("done_*")) == ["done_0", "done_1"], done.stderr

    # One process reads what two have written
    two = CheckpointStore(tmp_path / "two", keep=3).latest()
    assert two is not None
    assert (two.step, two.processes) == (2, 2)
    expected = load_file(tmp_path / "expected.safetensors")
    for group in ("model", "optimiser"):
        found = two.tensors(group)
        assert {f"{group}/{name}" for name in found} == {name for name in expected if name.startswith(group)}
        assert all(torch.equal(tensor, expected[f"{group}/{name}"]) for name, tensor in found.items())
    with pytest.raises(CheckpointError, match=r"holds no tensors called 'policy' \(it has: model, optimiser\)"):
        two.tensors("policy")
