"""What two processes do for test_world.py: `torchrun --nproc-per-node 2 two_worlds.py FOLDER`."""

import errno
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from direct_rlhf.errors import CheckpointError, ConfigError, DataError, Interrupted
from direct_rlhf.recipe.schema import ParallelSection
from direct_rlhf.run.checkpoints import CheckpointStore
from direct_rlhf.run.packing import pack, unpack
from direct_rlhf.run.shards import is_shard, local
from direct_rlhf.run.signals import StopFlag
from direct_rlhf.run.world import joined, launched


def raised(kind, work):
    with pytest.raises(kind) as caught:
        work()
    assert caught.type is kind
    return str(caught.value)


def fail(error):
    raise error


def talk(world):
    assert world.sum({"a": world.rank + 1, "b": 0.1}) == {"a": 3.0, "b": 0.2}
    assert world.any(world.rank == 1)
    assert not world.any(False)
    mine = {"rows": [world.rank] * world.rank, "t": torch.full((world.rank, 2), world.rank), 3: (None, True, "ü")}
    got = world.gather(mine)
    assert [one["rows"] for one in got] == [[], [1]]
    assert [one[3] for one in got] == [(None, True, "ü")] * 2
    assert [one["t"].tolist() for one in got] == [[], [[1, 1]]]
    assert world.main(lambda: {"who": world.rank, "x": (0.1, None)}) == {"who": 0, "x": [0.1, None]}
    assert raised(ConfigError, lambda: world.main(lambda: fail(ConfigError("not so")))) == "not so"
    assert world.together(lambda: world.rank) == world.rank
    only_second = lambda: fail(DataError("row 7")) if world.rank else None
    assert raised(DataError, lambda: world.together(only_second)) == "row 7"
    either = lambda: fail(DataError("row 8")) if world.rank else fail(Interrupted("stopped"))
    assert raised(DataError, lambda: world.together(either)) == "row 8"
    assert raised(Interrupted, lambda: world.together(lambda: fail(Interrupted("so")) if world.rank else None)) == "so"


def trained(mesh):
    """A sharded model after a step, and its optimiser; the head has one row, so that one process holds none of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
    fully_shard(model, mesh=mesh)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(2, 5)).sum().backward()
    optimiser.step()
    optimiser.zero_grad()
    return model, optimiser


def parts(model, optimiser):
    tensors, state = pack({"adamw": optimiser.state_dict()["state"], "odd": (1, float("inf"))})
    return {"model": dict(model.named_parameters()), "optimiser": tensors}, {"optimiser": state}


def whole(groups):
    return {
        f"{group}/{name}": tensor.detach().full_tensor() if is_shard(tensor) else tensor.detach().clone()
        for group, named in groups.items()
        for name, tensor in named.items()
    }


def keep(world, folder):
    mesh = init_device_mesh("cpu", (world.size,))
    model, optimiser = trained(mesh)
    groups, state = parts(model, optimiser)
    like = dict(model.named_parameters()) | {
        f"adamw/{i}/{name}": parameter
        for i, parameter in enumerate(model.parameters())
        for name in ("exp_avg", "exp_avg_sq")
    }

    def same(checkpoint, expected):
        for group in groups:
            for name, tensor in checkpoint.tensors(group, like).items():
                assert is_shard(tensor) == (name in like), name
                full = tensor.full_tensor() if is_shard(tensor) else tensor
                assert torch.equal(full, expected[f"{group}/{name}"]), (group, name)
        assert unpack({}, {"odd": checkpoint.state["optimiser"]["odd"]}) == {"odd": (1, float("inf"))}

    # What one process wrote
    alone = CheckpointStore(folder / "alone", keep=1, world=world).latest()
    assert alone.processes == 1
    first = alone.tensors("model", like)
    assert [is_shard(tensor) for tensor in first.values()] == [True] * 4
    assert first["0.weight"].full_tensor().tolist() == torch.arange(35.0).view(7, 5).tolist()

    # A save holds the state of its own step, in the background as well
    store = CheckpointStore(folder / "two", keep=3, world=world)
    expected = whole(groups)
    store.save(1, groups, state)
    same(store.latest(), expected)
    assert store.save(2, groups, state, later=True) is None
    with torch.no_grad():
        for tensor in [*groups["model"].values(), *groups["optimiser"].values()]:
            local(tensor).add_(1.0)
    store.settle()
    assert store.latest().step == 2
    same(store.latest(), expected)
    if world.is_main:
        save_file(expected, folder / "expected.safetensors")

    # One process cannot write: no marker, an error in both, and what was there before is there
    write = HuggingFaceStorageWriter.write_data

    def full(self, *arguments):
        if world.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments)

    HuggingFaceStorageWriter.write_data = full
    assert "no room to save step 3" in raised(CheckpointError, lambda: store.save(3, groups, state))
    store.save(3, groups, state, later=True)
    assert "no room to save step 3" in raised(CheckpointError, store.settle)
    HuggingFaceStorageWriter.write_data = write
    left = world.main(lambda: sorted(path.name for path in (folder / "two").iterdir()))  # who clears up looks
    assert left == ["step_000001", "step_000002"]
    assert store.latest().step == 2

    # A number that is none in one process
    broken = {"model": {"weight": groups["model"]["0.weight"]}}
    local(broken["model"]["weight"].detach())[0, 0] = float("nan") if world.rank == 1 else 0.0
    assert "model: weight has numbers that are not finite" in raised(CheckpointError, lambda: store.save(3, broken, {}))

    # One file is damaged
    store.save(4, {"work": {"x": torch.arange(3)}}, {})
    if world.is_main:
        file = next((folder / "two" / "step_000004").glob("shard-*"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert store.latest().step == 2


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with StopFlag() as stop, joined(launched(), ParallelSection(), device="cpu", stop=stop) as world:
        assert world.size == 2
        talk(world)
        keep(world, folder)
    (folder / f"done_{world.rank}").touch()


main()
