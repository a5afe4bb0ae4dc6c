import hashlib
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_rlhf.errors import CheckpointError
from direct_rlhf.run import checkpoints
from direct_rlhf.run.checkpoints import CheckpointStore
from direct_rlhf.run.directory import RunDirectory
from direct_rlhf.run.packing import pack, unpack
from faults import FaultyFS, crash_at, every_call

TESTS = Path(__file__).parents[1]


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"policy": {"w": torch.full((3,), value)}, "critic": {"head": torch.full((2, 2), -value)}}


def save(store: CheckpointStore, step: int, value: float | None = None) -> Path:
    value = float(step) if value is None else value
    return store.save(step, tensors(value), {"value": value})


def value_of(store: CheckpointStore) -> float | None:
    """The value of the newest good checkpoint, after checking that all of it is of one save."""
    checkpoint = store.latest()
    if checkpoint is None:
        return None
    value = checkpoint.state["value"]
    assert torch.equal(checkpoint.tensors("policy")["w"], torch.full((3,), value))
    assert torch.equal(checkpoint.tensors("critic")["head"], torch.full((2, 2), -value))
    return float(value)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "ppo", keep=2)


# K1, K2, K4, K5: crashes


@pytest.mark.promise("K1")
@pytest.mark.parametrize("fault", ["crash", "short"])
@pytest.mark.parametrize("before", [[], [1], [1, 2]])
def test_after_a_crash_at_any_call_an_older_checkpoint_loads_or_none(tmp_path, fault, before, caplog):
    caplog.set_level(logging.CRITICAL)

    def prepared(name: str) -> CheckpointStore:
        made = CheckpointStore(tmp_path / name, keep=2)
        for step in before:
            save(made, step)
        return made

    counted = prepared("counted")
    calls = every_call(lambda: save(counted, 3))
    assert calls > 15
    seen = set()
    for k in range(calls):
        store = prepared(str(k))
        with FaultyFS(at=k, fault=fault):
            save(store, 3)
        seen.add(value_of(store))
        save(store, 4)
        assert value_of(store) == 4.0
        assert not [folder for folder in store.folder.iterdir() if folder.name.startswith(".")]
    assert seen == {float(before[-1]) if before else None, 3.0}


@pytest.mark.promise("K1")
def test_after_a_process_dies_at_any_call_an_older_checkpoint_loads(tmp_path):
    script = f"""
import os, sys
from pathlib import Path
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "run")!r}]
from faults import FaultyFS
from test_checkpoints import CheckpointStore, save, value_of
for k in range(100):
    store = CheckpointStore(Path({str(tmp_path)!r}) / str(k), keep=1)
    save(store, 1)
    child = os.fork()
    if child == 0:
        with FaultyFS(at=k, crash=lambda: os._exit(137)):
            save(store, 2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, value_of(store))
    if code == 0:
        break
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    lines = ran.stdout.split("\n")[:-1]
    assert set(lines[:-1]) == {"137 1.0", "137 2.0"}
    assert lines[-1] == "0 2.0"


@pytest.mark.promise("K2")
@pytest.mark.promise("R1")
@pytest.mark.parametrize("fault", ["full", "filling"])
def test_a_write_that_fails_never_leaves_a_marker_and_names_needed_and_free_bytes(tmp_path, fault):
    def failure_of_save(store: CheckpointStore, k: int) -> str | None:
        try:
            with FaultyFS(at=k, fault=fault):
                save(store, 1)
        except CheckpointError as error:
            return str(error)
        return None

    errors = []
    calls = every_call(lambda: save(CheckpointStore(tmp_path / "counted", keep=1), 1))
    for k in range(calls):
        store = CheckpointStore(tmp_path / str(k), keep=1)
        error = failure_of_save(store, k)
        errors.append(error)
        # Without an error the call was one whose failure loses nothing; the last call is the sync after the rename.
        assert value_of(store) == (1.0 if error is None or k == calls - 1 else None)
        assert error is None or re.search(r"no room to save step 1: \d+ bytes needed, \d+ free", error)
        assert not list(tmp_path.glob(f"{k}/.*"))
    assert len([error for error in errors if error]) > calls / 2


@pytest.mark.promise("K2")
def test_the_marker_lists_every_file_and_is_written_last(store):
    with crash_at("checkpoint.before_marker"):
        save(store, 1)
    assert store.latest() is None
    marker = json.loads((save(store, 1) / "complete.json").read_text())
    assert sorted(marker["files"]) == ["critic.safetensors", "policy.safetensors", "state.json"]
    state = b'{"value": 1.0}'
    assert marker["files"]["state.json"] == {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}


@pytest.mark.promise("K4")
@pytest.mark.parametrize("fault", ["crash", "short"])
def test_saving_the_only_step_again_never_loses_it(tmp_path, fault):
    def prepared(name: str) -> CheckpointStore:
        made = CheckpointStore(tmp_path / name, keep=1)
        save(made, 5, value=1.0)
        return made

    counted = prepared("counted")
    calls = every_call(lambda: save(counted, 5, value=2.0))
    seen = []
    for k in range(calls):
        store = prepared(str(k))
        with FaultyFS(at=k, fault=fault):
            save(store, 5, value=2.0)
        seen.append(value_of(store))
    assert set(seen) == {1.0, 2.0}


def test_a_step_saved_three_times_is_there_once(store):
    for value in (1.0, 2.0, 3.0):
        save(store, 5, value=value)
    assert value_of(store) == 3.0
    assert len(list(store.folder.iterdir())) == 1


@pytest.mark.promise("K5")
def test_a_delete_that_fails_warns_and_the_next_save_tries_again(store, monkeypatch, caplog):
    save(store, 1)
    save(store, 2)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("in use")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        patched.setattr(
            checkpoints.shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else refuse()
        )
        save(store, 3)
    assert value_of(store) == 3.0
    assert "step_000001: an old checkpoint could not be deleted (in use); the run goes on" in caplog.text
    save(store, 4)
    assert sorted(folder.name for folder in store.folder.iterdir()) == ["step_000003", "step_000004"]


@pytest.mark.promise("K5")
def test_a_crash_between_save_and_delete_leaves_the_newer_one_and_the_older_ones(store):
    save(store, 1)
    save(store, 2)
    with crash_at("checkpoint.saved"):
        save(store, 3)
    assert sorted(folder.name for folder in store.folder.iterdir()) == ["step_000001", "step_000002", "step_000003"]
    assert value_of(store) == 3.0
    save(store, 4)
    assert sorted(folder.name for folder in store.folder.iterdir()) == ["step_000003", "step_000004"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    store = CheckpointStore(tmp_path, keep=keep)
    for step in (1, 2, 10, 1_000_000):
        save(store, step)
    steps = [1, 2, 10, 1_000_000][-keep:]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(f"step_{step:06d}" for step in steps)


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep = 0"):
        CheckpointStore(tmp_path, keep=0)


# K3: damage


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a byte of a tensor flipped": lambda folder: flip(folder / "policy.safetensors", -1),
    "a byte of the state flipped": lambda folder: flip(folder / "state.json", 3),
    "a file cut": lambda folder: (folder / "policy.safetensors").write_bytes(b"1234"),
    "a file longer": lambda folder: (folder / "state.json").write_text('{"value": 9.0}   '),
    "a file deleted": lambda folder: (folder / "critic.safetensors").unlink(),
    "the marker deleted": lambda folder: (folder / "complete.json").unlink(),
    "the marker empty": lambda folder: (folder / "complete.json").write_bytes(b""),
    "the marker a list": lambda folder: (folder / "complete.json").write_text("[]"),
    "another step's folder": lambda folder: shutil.copytree(
        folder.with_name("step_000001"), folder, dirs_exist_ok=True
    ),
}


@pytest.mark.promise("K3")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(store, damage, caplog):
    save(store, 1)
    folder = save(store, 2)
    DAMAGES[damage](folder)
    assert value_of(store) == 1.0
    assert "step_000002: damaged and not used: " in caplog.text


@pytest.mark.promise("K3")
def test_no_flipped_byte_of_the_marker_goes_unnoticed(store, caplog):
    caplog.set_level(logging.CRITICAL)
    save(store, 1)
    marker = save(store, 2) / "complete.json"
    good = marker.read_bytes()
    for at in range(len(good)):
        flip(marker, at)
        assert value_of(store) == 1.0 or json.loads(marker.read_bytes()) == json.loads(good), at
        marker.write_bytes(good)
    assert value_of(store) == 2.0


def test_when_all_are_damaged_there_is_none(store, caplog):
    for step in (1, 2):
        (save(store, step) / "state.json").unlink()
    assert store.latest() is None
    assert "step_000001: damaged" in caplog.text
    assert "step_000002: damaged" in caplog.text


def test_after_going_back_the_damaged_future_does_not_push_out_new_good_ones(tmp_path, caplog):
    store = CheckpointStore(tmp_path, keep=1)
    with crash_at("checkpoint.saved"):
        save(store, 10)
    with crash_at("checkpoint.saved"):
        save(store, 30)
    flip(tmp_path / "step_000030" / "policy.safetensors", -1)
    assert value_of(store) == 10.0
    save(store, 20)
    assert value_of(store) == 20.0
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_000020"]


@pytest.mark.promise("K13")
def test_a_format_of_another_release_is_an_error_and_not_damage(store):
    save(store, 1)
    path = save(store, 2) / "complete.json"
    marker = {**json.loads(path.read_text()), "format": 99}
    path.write_text(json.dumps({**marker, "seal": checkpoints._seal(marker)}))
    with pytest.raises(
        CheckpointError, match=r"step_000002: checkpoint format 99; this release .* reads format 1.*manifest.json"
    ):
        store.latest()


RELEASES = Path(__file__).parent / "releases"  # what each format of checkpoint looked like, as its release wrote it


@pytest.mark.promise("K13")
@pytest.mark.parametrize("release", sorted(path.name for path in RELEASES.iterdir()))
def test_what_an_older_release_wrote_loads(tmp_path, release, caplog):
    run = Path(shutil.copytree(RELEASES / release, tmp_path / "study"))
    expected = json.loads((run / "expected.json").read_text())
    found = RunDirectory(run).checkpoints("sft", keep=2).latest()
    assert found is not None
    assert (found.step, found.state["values"]) == (expected["step"], expected["values"])
    weights = {name: tensor.tolist() for name, tensor in found.tensors("policy").items()}
    assert weights == expected["policy"]
    optimiser = unpack(found.tensors("optimiser"), found.state["optimiser"])
    assert optimiser["state"][0]["exp_avg"].tolist() == expected["exp_avg"]
    assert optimiser["param_groups"][0]["betas"] == tuple(expected["betas"])
    assert not caplog.records


@pytest.mark.promise("K13")
@pytest.mark.parametrize("release", sorted(path.name for path in RELEASES.iterdir()))
def test_the_run_of_an_older_release_is_read_or_the_message_says_where_its_release_is_named(release):
    def look(run: RunDirectory) -> int | str:
        try:
            return run.recipe.seed
        except CheckpointError as error:
            return str(error)

    run = RunDirectory(RELEASES / release)
    assert run.manifest["direct_rlhf"].startswith(release)
    found = look(run)
    assert (
        found == 7 or "cannot be read by this release of direct-rlhf. Use the release named in manifest.json" in found
    )


# What is stored


@pytest.mark.promise("N3")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_a_number_that_is_not_finite_is_refused_and_its_tensor_named(store, bad, dtype):
    save(store, 1)
    weights = torch.zeros(3, dtype=dtype)
    weights[1] = bad
    with pytest.raises(CheckpointError, match=r"policy: layer.7.weight has numbers that are not finite"):
        store.save(2, {"policy": {"fine": torch.zeros(1), "layer.7.weight": weights}}, {})
    with pytest.raises(CheckpointError, match=r"progress/kl is NaN"):
        store.save(2, {}, {"progress": {"kl": math.nan}})
    assert [folder.name for folder in store.folder.iterdir()] == ["step_000001"]


@pytest.mark.promise("R1")
def test_too_little_disk_is_noticed_before_anything_is_written(store, monkeypatch):
    save(store, 1)
    monkeypatch.setattr(checkpoints, "free_bytes", lambda _: 1000)
    with pytest.raises(CheckpointError, match=r"no room to save step 2: \d+ bytes needed, 1000 free.*intact"):
        save(store, 2)
    assert value_of(store) == 1.0


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_and_shape_comes_back_bit_for_bit(store, dtype):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(-9, 9, (4, 6), generator=generator).to(dtype)
    named = {"zero_dim": wide[0, 0], "empty": wide[:0], "transposed": wide.t(), "column": wide[:, 1], "all": wide}
    store.save(1, {"group": named}, {})
    checkpoint = store.latest()
    assert checkpoint is not None
    loaded = checkpoint.tensors("group")
    assert loaded.keys() == named.keys()
    for name, tensor in named.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)


def test_tied_weights_and_parameters_are_stored_as_plain_copies(store):
    tied = torch.nn.Parameter(torch.ones(3))
    store.save(1, {"policy": {"head": tied, "embedding": tied, "slice": tied[1:]}}, {})
    checkpoint = store.latest()
    assert checkpoint is not None
    loaded = checkpoint.tensors("policy")
    assert torch.equal(loaded["head"], torch.ones(3))
    loaded["head"] += 1
    assert torch.equal(loaded["embedding"], torch.ones(3))
    assert torch.equal(loaded["slice"], torch.ones(2))


@pytest.mark.promise("K11")
def test_a_save_holds_the_state_of_its_own_step(store):
    weights = torch.zeros(3)
    store.save(1, {"policy": {"w": weights}}, {})
    weights += 1
    checkpoint = store.latest()
    assert checkpoint is not None
    assert torch.equal(checkpoint.tensors("policy")["w"], torch.zeros(3))


def test_asking_for_a_group_that_is_not_there_lists_those_that_are(store):
    save(store, 1)
    checkpoint = store.latest()
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match=r"holds no tensors called 'value' \(it has: critic, policy\)"):
        checkpoint.tensors("value")


def test_a_tensor_left_in_the_state_is_refused(store):
    with pytest.raises(CheckpointError, match="state holds a tensor at a/0: use pack"):
        store.save(1, {}, {"a": [torch.zeros(1)]})


# pack and unpack

SCALARS = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
TENSORS = st.builds(
    lambda shape, dtype, seed: torch.randint(0, 99, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
KEYS = SCALARS | st.tuples(st.integers(), st.text()) | st.sampled_from(["$tensor", "$dict", "a/b", "0", 0, True, 1.0])
NESTED = st.recursive(
    SCALARS | TENSORS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=12,
)


def same(a: object, b: object) -> bool:
    """Equal in value, in type and in every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    return a == b and (
        not isinstance(a, float) or not isinstance(b, float) or math.copysign(1, a) == math.copysign(1, b)
    )


@settings(max_examples=150, deadline=None)
@given(NESTED)
def test_what_is_packed_comes_back_exactly_through_json(nested):
    named, packed = pack(nested)
    through_json = json.loads(json.dumps(packed, allow_nan=False))
    assert same(unpack(named, through_json), nested)


def test_plain_json_stays_as_it_is():
    plain = {"step": 3, "best": None, "history": [{"kl": 0.1}], "name": "x"}
    assert pack(plain) == ({}, plain)


def test_tensors_are_named_after_their_place():
    named, _ = pack({"state": {0: {"exp_avg": torch.zeros(1)}}, "lists": [torch.zeros(1)]})
    assert list(named) == ["state/0/exp_avg", "lists/0"]


def test_a_type_that_cannot_be_stored_is_named_with_its_place():
    with pytest.raises(CheckpointError, match=r"state: a/1 is a set, which cannot be stored"):
        pack({"a": [1, {2}]})
    with pytest.raises(CheckpointError, match=r"state: a is NaN"):
        pack({"a": math.nan})


def test_an_optimiser_goes_on_to_the_last_bit_after_a_checkpoint(store):
    def step(weights: torch.nn.Parameter, optimiser: torch.optim.Optimizer, at: int) -> None:
        weights.grad = torch.sin(weights.detach() + at)
        optimiser.step()

    whole = torch.nn.Parameter(torch.linspace(0, 1, 7))
    optimiser = torch.optim.AdamW([{"params": [whole], "lr": 1e-2}], betas=(0.9, 0.95))
    for at in range(3):
        step(whole, optimiser, at)
    named, packed = pack(optimiser.state_dict())
    store.save(3, {"policy": {"w": whole}, "optimiser": named}, {"optimiser": packed, "rng": (1, None)})

    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.state["rng"] == (1, None)
    resumed = torch.nn.Parameter(checkpoint.tensors("policy")["w"])
    second = torch.optim.AdamW([{"params": [resumed], "lr": 1.0}])
    second.load_state_dict(unpack(checkpoint.tensors("optimiser"), checkpoint.state["optimiser"]))
    for at in range(3, 6):
        step(whole, optimiser, at)
        step(resumed, second, at)
    assert torch.equal(whole, resumed)


def test_a_named_tuple_becomes_a_tuple():
    Betas = namedtuple("Betas", "first second")
    assert unpack(*pack({"betas": Betas(0.9, 0.95)})) == {"betas": (0.9, 0.95)}
