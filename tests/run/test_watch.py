"""The watch over processes on other machines, with a store in memory; real processes are in train/test_parallel.py."""

import json
import os

import pytest

from direct_rlhf.errors import BackendError, DataError, Interrupted
from direct_rlhf.run.signals import StopFlag
from direct_rlhf.run.watch import Failure, Watch


class Store:
    """torch's key-value store, as far as the watch uses it."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)

    def multi_get(self, keys):
        return [self.values[key] for key in keys]

    def compare_set(self, key, expected, desired):
        assert expected == ""
        self.values.setdefault(key, desired.encode())


class Gone(Store):
    def check(self, keys):
        raise RuntimeError("Connection reset by peer\nmore")


def watch(store, rank, size=3, stop=None):
    made = Watch(store, rank, size, patience=10, stop=stop or StopFlag())
    who = json.loads(store.get(f"who/{rank}"))
    store.set(f"who/{rank}", json.dumps(who | {"host": f"machine-{rank}"}))  # to the others
    return made


@pytest.fixture
def ends(monkeypatch):
    """The codes with which processes have been ended."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr("direct_rlhf.run.watch.LAST_WORDS", 0.0)
    return codes


def test_a_process_on_another_machine_that_falls_silent_is_lost_after_the_time_it_is_given():
    store = Store()
    first, second, _ = (watch(store, rank) for rank in range(3))
    for _ in range(30):
        second._beat()
        assert first._look(0.5) is None
        store.set("beat/2", str(store.values["beat/2"] + b"1"))
    for _ in range(21):
        second._beat()
        assert first._look(0.5) is None
    second._beat()
    lost = first._look(0.5)
    assert lost is not None
    assert (lost.rank, lost.kind) == (2, "BackendError")
    assert lost.message.startswith(
        "process 2 of 3 has given no sign of life for 10 s (stopped, or its machine is gone?)"
    )


def test_a_sign_of_life_starts_the_time_anew_and_who_has_not_come_yet_is_waited_for():
    store = Store()
    first = watch(store, 0)
    second = watch(store, 1)
    for _ in range(100):  # process 2 is still importing torch
        second._beat()
        assert first._look(5.0) is None
    assert first._look(9.0) is None
    second._beat()
    assert first._look(9.0) is None
    assert first._look(9.0) is None
    lost = first._look(9.0)
    assert lost is not None
    assert lost.rank == 1


@pytest.mark.promise("S3")
def test_a_signal_to_one_reaches_all():
    store, flags = Store(), [StopFlag() for _ in range(3)]
    watches = [watch(store, rank, stop=flag) for rank, flag in enumerate(flags)]
    flags[2].signalled = True
    for one in (watches[2], *watches):
        assert one._look(0.5) is None
    assert [flag() for flag in flags] == [True] * 3
    assert [flag.signalled for flag in flags] == [False, False, True]


@pytest.mark.promise("S4")
def test_the_failure_of_one_ends_the_others_with_its_code_and_the_first_one_says_why(ends, capsys):
    store, told = Store(), []
    watches = [watch(store, rank) for rank in range(3)]
    for one in watches:
        one.on_failure = lambda error: told.append(error)
    watches[1].publish(DataError("row 7 is broken"))
    watches[2].publish(DataError("row 9 is broken"))  # too late
    for one in (watches[0], watches[2]):
        one._fail(one._look(0.5))
    assert watches[1]._look(0.5) is None  # it knows
    assert ends == [3, 3]
    assert [(type(error), str(error)) for error in told] == [(DataError, "process 1: row 7 is broken")]
    assert capsys.readouterr().err == "direct-rlhf: process 1: row 7 is broken\n"


@pytest.mark.promise("S4")
def test_where_the_first_process_is_lost_the_second_says_so(ends, capsys):
    store = Store()
    watches = [watch(store, rank) for rank in range(3)]
    for one in watches[1:]:
        assert [one._look(9.0) for _ in range(2)] == [None, None]
        one._fail(one._look(9.0))
    assert ends == [1, 1]
    assert capsys.readouterr().err.count("direct-rlhf: process 0 of 3 has given no sign of life") == 1


def test_the_main_thread_is_told_and_ends_the_watch_itself(ends):
    store = Store()
    first, second = (watch(store, rank, size=2) for rank in range(2))
    second.publish(KeyboardInterrupt())
    found = first._look(0.5)
    first.end()
    first._fail(found)
    assert first.failure() == Failure(1, "Interrupted", "stopped at once. Go on with --resume.")
    assert isinstance(first.failure().error(), Interrupted)
    assert ends == []


@pytest.mark.promise("S4", "S5")
@pytest.mark.parametrize("asked", [False, True])
def test_without_its_launcher_a_process_ends(ends, capsys, asked):
    stop = StopFlag()
    one = watch(Gone(), 0, stop=stop)
    if asked:
        stop.ask()
    one.run()
    assert ends == [75 if asked else 1]
    said = "stopped at once. Go on with --resume." if asked else "the launcher (torchrun) or process 0 does not answer"
    assert said in capsys.readouterr().err
    assert isinstance(one.failure().error(), Interrupted if asked else BackendError)
