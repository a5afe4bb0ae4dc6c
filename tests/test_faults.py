"""The fault kit finds what it is there to find."""

import json
import signal
import time

import pytest
import torch
from safetensors.torch import save_file

from direct_rlhf.run.points import point
from faults import CRASH_CODE, Crash, CrashPoint, FaultyFS, assert_runs_equal, crash_at, every_crash_point, run_cli

ROW = {"stage": "ppo", "step": 1, "time": 1.5, "kl": 0.25, "reward": 1.0}


# Crashes


def test_a_crash_comes_at_the_asked_hit_and_not_before():
    done = []
    with crash_at("border", hit=2):
        for at in range(3):
            point("border")
            done.append(at)
    assert done == [0]


def test_a_point_that_is_not_reached_fails_the_test():
    def run():
        with crash_at("border", hit=2):
            point("border")
            point("another")

    with pytest.raises(AssertionError, match="the point border was not reached 2 times"):
        run()


def three_borders(done):
    def run(label):
        for name in ("a", "b", "a"):
            point(name)
            done.append((label, name))

    return run


def test_every_crash_point_is_reached_once_in_the_order_of_the_run():
    done = []
    assert [str(place) for place in every_crash_point(three_borders(done))] == ["a-1", "b-1"]
    assert done == [("whole", "a"), ("whole", "b"), ("whole", "a"), ("b-1", "a")]


def test_every_hit_of_a_point_can_be_asked_for():
    done = []
    assert list(every_crash_point(three_borders(done), hits="all")) == [
        CrashPoint("a", 1),
        CrashPoint("b", 1),
        CrashPoint("a", 2),
    ]
    assert [name for label, name in done if label == "a-2"] == ["a", "b"]


def test_a_run_without_points_is_not_taken_for_one_that_survives_all():
    with pytest.raises(AssertionError, match="reached no named point"):
        list(every_crash_point(lambda label: None))


def test_after_a_crash_nothing_reaches_the_disk(tmp_path):
    with FaultyFS(at=0):
        try:
            (tmp_path / "a").mkdir()
        except Crash:
            with pytest.raises(Crash):
                (tmp_path / "clean-up").mkdir()
            raise
    assert list(tmp_path.iterdir()) == []


# The command line as a process


def test_the_command_line_gives_code_and_both_outputs():
    good, bad = run_cli(["--version"]), run_cli(["run", "no-such-recipe"])
    assert (good.code, good.err, good.children) == (0, "", ())
    assert good.out.startswith("direct-rlhf ")
    assert (bad.code, bad.out) == (2, "")
    assert bad.err.startswith("direct-rlhf: ")


@pytest.fixture
def at_start(tmp_path):
    """Makes the environment in which a process first runs some code of ours."""

    def make(code):
        (tmp_path / "sitecustomize.py").write_text(code)
        return {"PYTHONPATH": str(tmp_path)}

    return make


LEAVES_A_CHILD = """
import subprocess, sys
if "child" not in sys.argv:
    subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
"""


def test_a_child_that_outlives_the_run_is_named_and_killed(at_start):
    start = time.monotonic()
    ended = run_cli(["--version"], env=at_start(LEAVES_A_CHILD))
    assert (ended.code, ended.children) == (0, ("sleep 60",))
    assert time.monotonic() - start < 30
    assert run_cli(["--version"]).children == ()


WAITS_FOR_SIGNALS = """
import os, pathlib, time
from direct_rlhf.run.signals import StopFlag
with StopFlag() as stop:
    print("now" + " ready", flush=True)
    pathlib.Path("ready").write_text("")
    try:
        while not stop():
            time.sleep(0.01)
        time.sleep({after})
    except KeyboardInterrupt:
        os._exit(9)
os._exit(7)
"""


@pytest.mark.parametrize(("times", "after", "code"), [(1, 0, 7), (2, 60, 9), (3, 0, 7)])
def test_signals_are_sent_one_after_the_other_once_the_text_is_there(at_start, times, after, code, tmp_path):
    env = at_start(WAITS_FOR_SIGNALS.format(after=after))
    ended = run_cli(["--version"], env=env, cwd=tmp_path, signal_at=("now ready", signal.SIGTERM, times), timeout=30)
    assert (ended.code, ended.err.count("SIGTERM: saving")) == (code, 1)


@pytest.mark.parametrize("when", ["file", "function"])
def test_a_signal_can_wait_for_a_file_or_a_function(at_start, tmp_path, when):
    mark = tmp_path / "ready"
    moment = mark if when == "file" else mark.exists
    env = at_start(WAITS_FOR_SIGNALS.format(after=0))
    ended = run_cli(["--version"], env=env, cwd=tmp_path, signal_at=(moment, signal.SIGINT, 1), timeout=30)
    assert (ended.code, ended.err.count("SIGINT: saving")) == (7, 1)


def test_a_moment_that_never_comes_fails_the_test():
    with pytest.raises(AssertionError, match=r"ended \(0\) before the moment for the signal"):
        run_cli(["--version"], signal_at=("no such text", signal.SIGTERM, 1))


def test_a_process_that_hangs_is_killed_and_shown(at_start):
    env = at_start("import time\nprint('before it hangs', flush=True)\ntime.sleep(60)")
    with pytest.raises(AssertionError, match="still running after 2 s\nbefore it hangs"):
        run_cli(["--version"], env=env, timeout=2)


def test_a_process_can_be_made_to_die_at_a_point(at_start):
    code = """
import atexit, sys
from direct_rlhf.run import points
if "--crash" in sys.orig_argv:
    class Reaches:
        def find_spec(self, name, *_):
            if name == "direct_rlhf.cli":
                points.point("border")
                print("after the first", flush=True)
                points.point("border")
                print("after the second", flush=True)
    sys.meta_path.insert(0, Reaches())
    atexit.register(print, "cleaned up")
"""
    ended = run_cli(["--version"], env=at_start(code), crash=("border", 2))
    assert (ended.code, ended.out) == (CRASH_CODE, "after the first\n")


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("socket.create_connection(('192.0.2.1', 80), timeout=1)", "192.0.2.1"),
        ("socket.create_connection(('example.org', 80), timeout=1)", "example.org"),
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 80))", "('192.0.2.1', 80)"),
        ("socket.socket().connect_ex(('192.0.2.1', 80))", "('192.0.2.1', 80)"),
        ("socket.socket(socket.AF_INET6).connect(('2001:db8::1', 80))", "('2001:db8::1', 80)"),
    ],
)
def test_an_offline_process_cannot_connect_elsewhere_and_a_swallowed_error_still_shows(at_start, call, what):
    code = f"""
import socket, sys
if "--offline" in sys.orig_argv:
    class Connects:
        def find_spec(self, name, *_):
            if name == "direct_rlhf.cli":
                try:
                    {call}
                except AssertionError as error:
                    assert "a test tried to connect to" in str(error)
    sys.meta_path.insert(0, Connects())
"""
    ended = run_cli(["--version"], env=at_start(code), offline=True)
    assert (ended.code, ended.err) == (0, f"NETWORK: {what}\n")


def test_an_offline_process_may_talk_to_this_machine(at_start):
    code = """
import socket, sys
if "--offline" in sys.orig_argv:
    class Connects:
        def find_spec(self, name, *_):
            if name == "direct_rlhf.cli":
                server = socket.create_server(("127.0.0.1", 0))
                socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()
    sys.meta_path.insert(0, Connects())
"""
    ended = run_cli(["--version"], env=at_start(code), offline=True)
    assert (ended.code, ended.err) == (0, "")


# Equal runs


def make_run(folder, rows=(ROW,), samples=(), weights=None, where="models/ppo"):
    (folder / where).mkdir(parents=True)
    for name, lines in (("metrics", rows), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file({"w": torch.zeros(4) if weights is None else weights}, folder / where / "model.safetensors")
    return folder


def test_equal_runs_are_equal_whatever_the_time(tmp_path):
    assert_runs_equal(make_run(tmp_path / "a"), make_run(tmp_path / "b", [ROW | {"time": 9.5}]))


DIFFERENCES = {
    "a value": (
        {"rows": [ROW, ROW | {"step": 2, "kl": 0.5}]},
        r"metrics.jsonl:2: ppo step 2: kl: 0.25 against 0.5",
    ),
    "a last bit": (
        {"rows": [ROW, ROW | {"step": 2, "kl": 0.25000000000000006}]},
        r"kl: 0.25 against 0.25000000000000006",
    ),
    "an integer for a float": ({"rows": [ROW, ROW | {"step": 2, "reward": 1}]}, r"reward: 1.0 against 1"),
    "a key more": ({"rows": [ROW, ROW | {"step": 2, "new": 1}]}, r"ppo step 2: new: absent against 1"),
    "a line less": ({"rows": [ROW]}, r"metrics.jsonl: 2 lines against 1; the first that one lacks: ppo step 2"),
    "a step twice": ({"rows": [ROW, ROW]}, r"metrics.jsonl:2: ppo step 2 against ppo step 1"),
    "a sample": ({"samples": [ROW]}, r"samples.jsonl: 0 lines against 1"),
    "a weight": (
        {"weights": torch.tensor([0.0, 0.0, 1.0, 0.0])},
        r"models/ppo/model.safetensors: w: element 2: 0.0 against 1.0 \(1 of 4 differ\)",
    ),
    "the sign of a zero": ({"weights": torch.tensor([0.0, -0.0, 0.0, 0.0])}, r"w: element 1: 0.0 against -0.0"),
    "a type": ({"weights": torch.zeros(4, dtype=torch.bfloat16)}, r"w: torch.float32 \[4\] against torch.bfloat16"),
    "another arm": ({"where": "models/dpo"}, r"models: \['models/ppo/model.safetensors'\] against \['models/dpo"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_the_first_difference_of_two_runs_is_named(tmp_path, what):
    other, message = DIFFERENCES[what]
    rows = [ROW, ROW | {"step": 2}]
    with pytest.raises(AssertionError, match=message):
        assert_runs_equal(make_run(tmp_path / "a", rows), make_run(tmp_path / "b", **{"rows": rows, **other}))
