import signal
import subprocess
import sys
import threading

import pytest

from direct_rlhf.run.checkpoints import CheckpointStore
from direct_rlhf.run.signals import StopFlag

# A stage that saves at every step, asks at step borders, and ends as the command line does.
STAGE = """
import sys, time
from pathlib import Path
from direct_rlhf.run.checkpoints import CheckpointStore
from direct_rlhf.run.signals import StopFlag
store = CheckpointStore(Path(sys.argv[1]), keep=2)
patient = sys.argv[2] == "patient"
with StopFlag() as stop:
    print("ready", flush=True)
    for step in range(1, 10_000):
        store.save(step, {}, {"step": step, "text": "x" * 100_000})
        if stop() and patient:
            print("stopped", step, flush=True)
            sys.exit(75)
        if stop():
            print("asked", flush=True)
            time.sleep(20)
"""


def stage(folder, kind):
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(folder), kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_stage_save_and_stop(tmp_path, number):
    process = stage(tmp_path, "patient")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert err == f"\n{number.name}: saving and stopping; a second signal stops at once\n"
    latest = CheckpointStore(tmp_path, keep=2).latest()
    assert latest is not None
    assert out == f"stopped {latest.step}\n"


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once_and_leaves_a_good_checkpoint(tmp_path, second):
    process = stage(tmp_path, "impatient")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(second)
    _, err = process.communicate(timeout=15)
    assert process.returncode in (130, -signal.SIGINT)
    assert "KeyboardInterrupt" in err
    assert CheckpointStore(tmp_path, keep=2).latest() is not None


def test_the_old_handlers_are_back_afterwards():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopFlag() as stop:
        assert signal.getsignal(signal.SIGTERM) not in before
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_flag_starts_unset_and_off_the_main_thread_touches_no_handler():
    handlers = []

    def work():
        with StopFlag() as stop:
            handlers.append((stop(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert handlers == [(False, before)]


def broken_off(stop, *steps):
    """Takes the steps under ``stop.at_once()``; how many of them began before KeyboardInterrupt."""
    begun = 0
    try:
        with stop.at_once():
            for step in steps:
                begun += 1
                step()
    except KeyboardInterrupt:
        return begun
    pytest.fail("it was not broken off")


def nothing():
    pass


def test_work_that_loses_nothing_is_broken_off_by_the_first_signal(capfd):
    with StopFlag() as stop:
        assert broken_off(stop, nothing, lambda: signal.raise_signal(signal.SIGTERM), nothing) == 2
        assert stop()
    assert capfd.readouterr().err == "\nSIGTERM: stopping\n"


def test_a_signal_from_before_is_obeyed_where_such_work_begins():
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGINT)
        assert broken_off(stop, nothing) == 0


def test_a_part_of_it_that_asks_is_broken_off_by_the_second_signal_only(capfd):
    with StopFlag() as stop:

        def asks():
            with stop.at_borders():
                signal.raise_signal(signal.SIGTERM)

        assert broken_off(stop, asks, asks, nothing) == 2
    assert capfd.readouterr().err == "\nSIGTERM: saving and stopping; a second signal stops at once\n"


def test_after_such_a_part_the_first_signal_is_enough_again():
    with StopFlag() as stop:

        def asks():
            with stop.at_borders():
                pass

        assert broken_off(stop, asks, lambda: signal.raise_signal(signal.SIGINT), nothing) == 2
