"""A full disk at any write of a run: what was there stays, the message has the bytes, and a resume goes on."""

import errno
import logging
import os
import re

import pytest
from safetensors import SafetensorError

from direct_rlhf.errors import DirectRLHFError
from direct_rlhf.report.html import write_report
from direct_rlhf.run import directory
from direct_rlhf.run.atomic import read_jsonl
from direct_rlhf.run.directory import RunDirectory
from direct_rlhf.run.lock import LOCK
from faults import FaultyFS, every_call

pytestmark = pytest.mark.promise("R1")


def attempt(root, loaded):
    """All that an attempt writes beside checkpoints and models, from the making of the run to its last status."""
    run = RunDirectory.open(root, loaded, resume=True, overwrite=False)
    with run.locked():
        run.status("running", None)
        run.check_sources({"a.jsonl": "1"})
        metrics = run.metrics("sft")
        metrics.rewind(0)
        for step in (1, 2):
            metrics.log(step, {"loss": 1.0 / step})
            run.sample("sft", step, [{"answer": "x"}])
            run.alert("sft", step, {"name": "kl"})
        metrics.close()
        metrics.rewind(1)
        run.finish_stage("sft", "abc", 1.0, {})
        run.status("done", 0)
    return run


def test_at_every_write_of_an_attempt_it_is_one_error_of_ours_and_a_resume_goes_on(tmp_path, load, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(directory, "start_facts", dict)  # no git calls
    monkeypatch.setattr(
        directory, "make_manifest", lambda seed, sha: {"seed": seed, "id": "x", "sources": {}, "recipe_sha256": sha}
    )
    loaded = load()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a hundred attempts are slow where it is real
    monkeypatch.setattr(directory, "_stored_recipe", lambda path: loaded.recipe)  # parsing YAML is what takes the time

    def failure(root, k):
        try:
            with FaultyFS(at=k, fault="full"):
                attempt(root, loaded)
        except DirectRLHFError as error:
            return error
        return None

    calls = every_call(lambda: attempt(tmp_path / "counted", loaded))
    assert calls > 80
    failures = []
    for k in range(calls):
        root = tmp_path / str(k)
        if error := failure(root, k):
            failures.append(error)
            full = r"the disk is full: (\d+ bytes needed, \d+ free|\d+ bytes free)\. .* intact"
            at_the_start = r"cannot be written \(No space left on device\)\. Choose another output folder"
            assert re.search(f"{full}|{at_the_start}", str(error))
        (root / "study" / LOCK).unlink(missing_ok=True)  # a process that has not released it is dead by then
        run = attempt(root, loaded)
        rows = [(row["step"], row["loss"]) for row in read_jsonl(run.path / "metrics.jsonl")]
        assert rows == [(1, 1.0)]
        assert run.stage_done("sft", "abc")
        assert [path.name for path in root.iterdir()] == ["study"]
    assert len(failures) > 0.8 * calls  # the others are folders that are there already


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_metrics_on_a_disk_that_really_is_full(tmp_path, load):
    run = RunDirectory.open(tmp_path, load(), resume=False, overwrite=False)
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(DirectRLHFError, match=r"metrics\.jsonl: the disk is full: \d+ bytes needed, \d+ free"):
        run.metrics("sft").log(1, {"loss": 1.0})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, load, monkeypatch, capsys):
    run = RunDirectory.open(tmp_path, load(), resume=False, overwrite=False)
    handler = logging.FileHandler
    monkeypatch.setattr(logging, "FileHandler", lambda path, **options: handler("/dev/full", **options))
    with run.locked():
        logging.getLogger("direct_rlhf.run").warning("a line that is lost")
        run.metrics("sft").log(1, {"loss": 1.0})
    assert read_jsonl(run.path / "metrics.jsonl")[0]["loss"] == 1.0
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_library_that_fills_the_disk_during_a_run_is_explained_too(tmp_path, load, error):
    run = RunDirectory.open(tmp_path, load(), resume=False, overwrite=False)
    with (
        pytest.raises(DirectRLHFError, match=r"study: the disk is full: \d+ bytes free\. .* intact") as caught,
        run.locked(),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), KeyError("x")])
def test_another_error_passes_as_it_is(tmp_path, load, error):
    run = RunDirectory.open(tmp_path, load(), resume=False, overwrite=False)
    with pytest.raises(type(error)) as caught, run.locked():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("fault", ["full", "filling"])
def test_the_report_of_before_stays_when_the_new_one_does_not_fit(tmp_path, load, fault):
    run = attempt(tmp_path, load())
    page = write_report([run.path])
    before = page.read_bytes()
    calls = every_call(lambda: write_report([run.path]))
    for k in range(1, calls - 2):  # without the folder that is there, the rename and the sync after it
        with FaultyFS(at=k, fault=fault), pytest.raises(DirectRLHFError, match=r"\.html: .* bytes needed, \d+ free"):
            write_report([run.path])
        assert page.read_bytes() == before
    assert calls > 4
