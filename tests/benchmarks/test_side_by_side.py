import sys

import pytest

from peers import side_by_side
from peers.side_by_side import OURS, TRL, measure, memory_ratio, pace, peer_python, run_side, seconds, speed_up, unlike


def report(*steps, peak=100.0):
    """What a side prints; the steps of the warm-up and the last one are far slower."""
    return {"steps": [90.0, 90.0, *steps, 90.0], "peak_mb": peak}


def side(tmp_path, code):
    """A command that runs ``code`` with a job."""
    script = tmp_path / "side.py"
    script.write_text(code)
    return [sys.executable, str(script)]


def test_a_step_is_the_median_without_the_warm_up_and_the_last_one():
    assert seconds(report(1.0, 2.0, 40.0)) == 2.0
    assert pace([report(0.5), report(1.0), report(0.25)]) == 2.0


@pytest.mark.parametrize("steps", [[], [1.0], [1.0, 1.0, 1.0]])
def test_too_few_steps_give_no_figure(steps):
    with pytest.raises(ValueError, match="too few to leave out the warm-up"):
        seconds({"steps": steps})


def test_a_ratio_is_taken_within_each_round_and_shows_the_rounds_farthest_from_the_median():
    ours = [report(1.0, peak=50.0), report(2.0, peak=60.0), report(1.0, peak=90.0)]
    theirs = [report(3.0), report(8.0), report(2.0)]
    assert speed_up(ours, theirs) == (3.0, 2.0, 4.0)
    assert memory_ratio(ours, theirs) == (0.6, 0.5, 0.9)
    assert str(speed_up(ours, theirs)) == "3.00 [2.00, 4.00]"


def test_sides_take_turns_in_every_case_and_change_places_each_round(monkeypatch):
    calls = []

    def run(command, job):
        calls.append((command[0], job["number"]))
        return report(float(len(calls)))

    monkeypatch.setattr(side_by_side, "run_side", run)
    found = measure({"one": {"number": 1}, "two": {"number": 2}}, {OURS: ["a"], TRL: ["b"]}, 2)
    assert calls == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("b", 1), ("a", 1), ("b", 2), ("a", 2)]
    assert [seconds(one) for one in found["one"][OURS]] == [1.0, 6.0]
    assert [seconds(one) for one in found["two"][TRL]] == [4.0, 7.0]


def test_a_side_gets_its_job_and_may_print_before_its_line(tmp_path):
    command = side(tmp_path, "import sys\nprint('noise')\nprint(sys.argv[1])")
    assert run_side(command, {"dtype": "float32"}) == {"dtype": "float32"}


def test_a_side_that_fails_ends_the_benchmark_with_its_last_words(tmp_path):
    with pytest.raises(SystemExit, match=r"ended with 1\n(.|\n)*no such thing"):
        run_side(side(tmp_path, "raise KeyError('no such thing')"), {})


def test_peak_memory_of_a_side_is_not_that_of_the_process_that_started_it(tmp_path):
    held = bytearray(300_000_000)
    held[::4096] = b"x" * len(held[::4096])
    command = side(tmp_path, "from peers.measuring import Clock\nclock = Clock()\nclock.ended()\nclock.finish(seen=1)")
    ended = run_side(
        [
            command[0],
            "-c",
            f"import sys; sys.path.insert(0, {str(side_by_side.PEERS.parent)!r})\nexec(open({command[1]!r}).read())",
        ],
        {},
    )
    assert 1 < ended["before_models_mb"] <= ended["training_peak_mb"] <= ended["peak_mb"] < 150
    assert (ended["seen"], ended["steps"]) == (1, [])


def test_a_missing_environment_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "PEERS", tmp_path / "peers")
    with pytest.raises(SystemExit, match=r"benchmarks/peers\.sh trl-ppo"):
        peer_python("trl-ppo")


def test_work_that_differs_by_more_than_the_tolerance_is_named():
    theirs = {"optimiser_steps": 4, "answer_tokens": 12.0}
    allowed = {"optimiser_steps": 0.0, "answer_tokens": 0.15}
    assert unlike({"optimiser_steps": 4, "answer_tokens": 13.0}, theirs, allowed) == []
    found = unlike({"optimiser_steps": 1, "answer_tokens": 14.0}, theirs, allowed)
    assert found == ["optimiser_steps 1 against 4", "answer_tokens 14 against 12"]
