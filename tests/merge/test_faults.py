"""M2: the result appears whole or not at all."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from direct_rlhf.errors import DirectRLHFError
from direct_rlhf.merge.weights import Mapped
from faults import CRASH_CODE, FaultyFS, every_call, every_crash_point, run_cli
from merge.checkpoint_kit import merge, same, write_family, write_model

TIES = {"merge_method": "ties", "base_model": "base", "models": ["a", "b"]}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def whole(family, tmp_path_factory):
    return merge(family, tmp_path_factory.mktemp("whole") / "out", shard_size="20KB", **TIES)


def looks_like_a_model(folder):
    return (folder / "config.json").exists()


def check_after_a_crash(family, whole, place):
    """Under ``place`` there is the whole result or nothing that looks like one, and the merge can be made again."""
    for folder in [path for path in place.rglob("*") if path.is_dir()]:
        if looks_like_a_model(folder) and folder.name in ("out", ".out.writing"):
            assert same(folder, whole)
    again = merge(family, place / "out", overwrite=True, shard_size="20KB", **TIES)
    assert same(again, whole)
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.promise("M2", "K1")
def test_a_crash_at_any_point_leaves_no_half_model(family, whole, tmp_path):
    def run(label):
        merge(family, tmp_path / label / "out", shard_size="20KB", **TIES)

    points = list(every_crash_point(run, hits="all"))
    assert {point.name for point in points} == {
        "merge: part written",
        "merge: weights written",
        "merge: folder written",
    }
    for point in points:
        assert not (tmp_path / str(point) / "out").exists()
        check_after_a_crash(family, whole, tmp_path / str(point))


@pytest.mark.promise("M2", "K1", "K4")
@pytest.mark.parametrize("fault", ["crash", "short"])
def test_a_crash_at_any_call_to_the_disk_leaves_the_old_model_or_the_new_one(family, tmp_path, fault):
    def run(place):
        merge(family, place / "out", overwrite=True, merge_method="linear")

    fresh = merge(family, tmp_path / "new" / "out", merge_method="linear")
    write_model(tmp_path / "old", seed=9)
    for call in range(every_call(lambda: run(tmp_path / "counted"))):
        place = tmp_path / f"{fault}-{call}"
        shutil.copytree(tmp_path / "old", place / "out")
        with FaultyFS(at=call, fault=fault):
            run(place)
        kept = [folder for folder in place.iterdir() if looks_like_a_model(folder)]
        assert kept, f"call {call}: both models are lost"
        assert all(same(folder, tmp_path / "old") or same(folder, fresh) for folder in kept)
        run(place)
        assert [path.name for path in place.iterdir()] == ["out"]
        assert same(place / "out", fresh)


@pytest.mark.promise("M2", "R1")
@pytest.mark.parametrize("fault", ["full", "filling"])
def test_a_disk_that_fills_up_on_the_way_is_said_and_leaves_the_old_model(family, tmp_path, fault):
    write_model(tmp_path / "old", seed=9)
    new = merge(family, tmp_path / "new", merge_method="linear")
    refused = 0
    for call in range(every_call(lambda: merge(family, tmp_path / "counted" / "out", merge_method="linear"))):
        place = tmp_path / str(call)
        shutil.copytree(tmp_path / "old", place / "out")
        said = ""
        try:
            with FaultyFS(at=call, fault=fault):
                merge(family, place / "out", overwrite=True, merge_method="linear")
        except DirectRLHFError as error:
            said = str(error)
        # a call that only tidies up may fail
        assert same(place / "out", tmp_path / "old" if said else new)
        if said:
            assert re.search(r"disk is full: \d+ bytes needed, \d+ free.*Make room, then start again", said)
            assert [path.name for path in place.iterdir()] == ["out"]
        refused += bool(said)
    assert refused > 25


@pytest.mark.promise("M2")
def test_a_merge_that_was_killed_between_the_two_renames_gives_the_old_model_back(family, tmp_path):
    write_model(tmp_path / ".out.old", seed=9)
    write_model(tmp_path / "old", seed=9)
    with pytest.raises(RuntimeError, match="stop here"):
        merge(family, tmp_path / "out", _raising(), merge_method="linear")
    assert same(tmp_path / "out", tmp_path / "old")


def _raising():
    from direct_rlhf.merge.executor import Execution

    class Stop:
        def __call__(self, *_: object, **__: object) -> None:
            raise RuntimeError("stop here")

    return Execution(progress=Stop())


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Two models of 96 MB, which take long enough to be hit, and their merge file."""
    root = tmp_path_factory.mktemp("larger")
    for number, model in enumerate(("base", "a", "b")):
        (root / model).mkdir()
        generator = torch.Generator().manual_seed(number)
        found = {f"model.layers.{n}.w": torch.randn(1000, 2000, generator=generator).bfloat16() for n in range(24)}
        save_file(found, root / model / "model.safetensors")
        (root / model / "config.json").write_text(json.dumps({"model_type": "toy"}))
    (root / "merge.yaml").write_text("merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n")
    return root


@pytest.mark.slow
@pytest.mark.promise("M2", "K1")
def test_a_merge_killed_at_a_random_moment_leaves_nothing_that_looks_like_a_model(larger, tmp_path):
    out, generator = tmp_path / "out", random.Random(7)
    command = [sys.executable, "-m", "direct_rlhf", "merge", str(larger / "merge.yaml"), "--out", str(out)]
    begun = 0
    for _ in range(8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / ".out.writing").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        ended = process.wait()
        begun += ended == -signal.SIGKILL
        leftovers = [path for path in tmp_path.iterdir() if looks_like_a_model(path)]
        assert leftovers in ([], [out]) or all(is_whole(path, larger) for path in leftovers)
        if out.exists():
            assert is_whole(out, larger)
            shutil.rmtree(out)
    assert begun
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert is_whole(out, larger)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def is_whole(folder, root):
    expected = _expected.setdefault(root, _merge_of(root))
    return (folder / "model.safetensors").read_bytes() == expected


_expected: dict[Path, bytes] = {}


def _merge_of(root):
    if root in _expected:
        return _expected[root]
    out = merge(root, root / "expected", **TIES)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.promise("M2")
def test_a_crash_of_the_command_line_leaves_nothing_and_it_starts_again(family, tmp_path):
    (family / "merge.yaml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\n")
    args = ["merge", str(family / "merge.yaml"), "--out", str(tmp_path / "out")]
    crashed = run_cli(args, crash=("merge: part written", 5))
    assert crashed.code == CRASH_CODE
    assert not any(looks_like_a_model(path) for path in tmp_path.iterdir())
    done = run_cli(args)
    assert (done.code, done.out) == (0, f"Merged: {tmp_path / 'out'}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.promise("S1", "S2", "S5", "U6")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_merge_with_75_and_leaves_nothing(larger, tmp_path, number):
    args = ["merge", str(larger / "merge.yaml"), "--out", str(tmp_path / "out"), "--threads", "1"]
    ended = run_cli(args, signal_at=(tmp_path / ".out.writing" / "model.safetensors", number, 1))
    assert ended.code == 75
    assert "stopped on request, nothing is left of it. Start the merge again." in ended.err
    assert list(tmp_path.iterdir()) == []
    assert ended.children == ()


@pytest.mark.promise("M6")
def test_pages_of_inputs_go_back_to_the_system(tmp_path):
    from direct_rlhf.merge.checkpoints import read_header

    save_file({"w": torch.ones(1 << 24)}, tmp_path / "model.safetensors")  # 64 MB
    place = read_header(tmp_path / "model.safetensors", "m")["w"]
    mapped = Mapped()
    before = _mapped_megabytes()
    assert mapped.tensor(place).sum() == 1 << 24
    assert _mapped_megabytes() - before > 60
    mapped.let_go()
    assert _mapped_megabytes() - before < 5
    assert mapped.tensor(place).sum() == 1 << 24


def _mapped_megabytes():
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:")) * 1024 / 1e6
