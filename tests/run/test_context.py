import io

import pytest
from rich.console import Console

from direct_rlhf.errors import Interrupted
from direct_rlhf.run import context
from direct_rlhf.run.context import ProgressBars, StageContext
from direct_rlhf.run.directory import RunDirectory


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def test_outside_a_terminal_short_work_leaves_no_line(capsys):
    with ProgressBars()("rollouts", total=2) as bar:
        bar.advance(2)
    assert capsys.readouterr() == ("", "")


def test_outside_a_terminal_long_work_leaves_one_line_at_the_start_and_one_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(context, "QUIET_SECONDS", 0.0)
    with ProgressBars()("rollouts", total=3) as bar:
        for step in range(3):
            bar.advance(1, reward=step / 3, phase="update")
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first == "rollouts ..."
    assert second.startswith("rollouts: 3/3 in 0.0 s  reward 0.667  phase update")


def test_work_in_one_piece_has_no_count(capsys, monkeypatch):
    monkeypatch.setattr(context, "QUIET_SECONDS", 0.0)
    with ProgressBars()("loading"):
        pass
    assert capsys.readouterr().err == "loading: 0.0 s\n"


def test_on_a_terminal_a_bar_shows_count_and_fields(terminal):
    with ProgressBars(terminal)("rollouts", total=64) as bar:
        bar.advance(16, reward=0.5)
        bar.display.refresh()
    shown = terminal.file.getvalue()
    assert "rollouts" in shown
    assert "16/64" in shown
    assert "reward 0.5" in shown


def test_bars_may_be_nested_and_the_display_ends_with_the_outer_one(terminal):
    bars = ProgressBars(terminal)
    with bars("PPO", total=2) as outer:
        with bars("rollouts [odd name]") as inner:
            inner.advance(5)
            outer.display.refresh()
        outer.advance(1)
    assert "rollouts [odd name]" in terminal.file.getvalue()
    with bars("again", total=1) as bar:
        bar.advance(1)


def test_an_exception_passes_through_a_bar_and_leaves_no_display_behind(terminal):
    bars = ProgressBars(terminal)
    with pytest.raises(KeyError), bars("rollouts"):
        raise KeyError
    with bars("again") as bar:
        bar.advance(1)


def test_a_stage_is_interrupted_only_once_it_is_asked(tmp_path, load, capsys):
    loaded = load()
    run = RunDirectory.open(tmp_path, loaded, resume=False, overwrite=False)
    asked = []
    ctx = StageContext(loaded.recipe, run, "cpu", lambda: bool(asked))
    ctx.check_stop()
    asked.append(1)
    with pytest.raises(Interrupted, match=r"study: stopped on request. Go on with --resume."):
        ctx.check_stop()
    ctx.say("the critic explains nothing")
    assert capsys.readouterr().err == "the critic explains nothing\n"
