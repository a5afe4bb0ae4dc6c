import json
import os
import socket
import subprocess
import sys

import pytest

from direct_rlhf.errors import ConfigError
from direct_rlhf.run.directory import RunDirectory
from direct_rlhf.run.lock import LOCK, lock, refuse_if_locked

HOLD = """
import sys, time
from pathlib import Path
from direct_rlhf.run.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.promise("S7")
def test_a_second_process_is_refused_and_told_who_writes(tmp_path, holder):
    message = rf"process {holder.pid} on this machine has been writing to this run since .*Wait until it ends"
    with pytest.raises(ConfigError, match=message), lock(tmp_path):
        pass
    with pytest.raises(ConfigError, match=message):
        refuse_if_locked(tmp_path)
    holder.communicate()
    with lock(tmp_path):
        pass


@pytest.mark.promise("S7")
def test_the_lock_of_a_dead_process_is_taken_over_with_a_warning(tmp_path, holder, caplog):
    holder.kill()
    holder.wait()
    refuse_if_locked(tmp_path)
    with lock(tmp_path):
        assert f"process {holder.pid} has died while writing; its lock is taken over" in caplog.text
    assert (tmp_path / LOCK).read_bytes() == b""


@pytest.mark.promise("S7")
def test_a_pid_that_another_process_has_by_now_does_not_count(tmp_path):
    stale = {"host": socket.gethostname(), "pid": os.getppid(), "start": "another boot 1", "since": "2020"}
    (tmp_path / LOCK).write_text(json.dumps(stale))
    with lock(tmp_path):
        pass


@pytest.mark.promise("S7")
def test_a_writer_on_another_machine_is_believed(tmp_path):
    other = {"host": "elsewhere", "pid": 1, "start": None, "since": "2020"}
    (tmp_path / LOCK).write_text(json.dumps(other))
    with (
        pytest.raises(ConfigError, match=rf"process 1 on elsewhere .* If it is dead, delete {tmp_path / LOCK}"),
        lock(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / LOCK).read_text()) == other


def test_a_record_cut_by_a_crash_is_nobody(tmp_path):
    (tmp_path / LOCK).write_text('{"host": "el')
    with lock(tmp_path):
        pass


def test_the_lock_is_released_when_the_block_raises(tmp_path):
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    with lock(tmp_path):
        pass


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with lock(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on this machine"), lock(tmp_path):
        pass


@pytest.mark.promise("S7")
def test_a_run_that_is_being_written_is_neither_resumed_nor_overwritten(tmp_path, load):
    run = RunDirectory.open(tmp_path, load(), resume=False, overwrite=False)
    run.finish_stage("sft", "abc", 1.0, {})
    with run.locked():
        for flags in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            with pytest.raises(ConfigError, match="has been writing to this run"):
                RunDirectory.open(tmp_path, load(), **flags)
    assert run.stage_done("sft", "abc")


RACE = """
import os, sys, time
from pathlib import Path
from direct_rlhf.errors import ConfigError
from direct_rlhf.run.lock import lock
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
held = 0
end = time.monotonic() + 1
while time.monotonic() < end:
    try:
        with lock(folder):
            os.mkdir(folder / "inside")  # fails if another one is in here too
            held += 1
            os.rmdir(folder / "inside")
    except ConfigError:
        pass
print(held)
"""


@pytest.mark.promise("S7")
def test_of_several_processes_at_once_one_holds_the_lock(tmp_path):
    stale = {"host": socket.gethostname(), "pid": 2**22 + 1, "start": "another boot 1", "since": "2020"}
    (tmp_path / LOCK).write_text(json.dumps(stale))  # all of them see a dead holder first
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(4)]
    assert {racer.stdout.readline() for racer in racers} == {"ready\n"}
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    ended = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4, ended
    assert sum(int(out) for out, _ in ended) > 20


def test_a_run_deleted_while_it_is_locked_raises_no_second_error(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with lock(folder):
        (folder / LOCK).unlink()
        folder.rmdir()
