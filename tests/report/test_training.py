"""The training section: the capability guard, the cost constraint, and what was said of single steps."""

import json
import re

import pytest
import yaml

from direct_rlhf.report import plots, training
from direct_rlhf.report.html import write_report
from direct_rlhf.report.plots import Line
from direct_rlhf.report.read import read_run

PANELS = ("General skill while training", "Cost", "Held-out cost", "Cost multiplier")


@pytest.fixture
def drawn(monkeypatch):
    """Title -> (lines, options) of every panel that is asked for."""
    found = {}

    def curves(title, unit, lines, **options):
        found[title] = ([line for line in lines if len(line.x)], options)

    monkeypatch.setattr(plots, "curves", curves)
    return found


@pytest.fixture
def guarded(make_guarded):
    return make_guarded(arms=("base", "sft_ppo", "direct_ppo"))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_metrics(path, change):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    write_lines(path / "metrics.jsonl", rows)


def change_facts(path, **changed):
    """Replaces the guard's facts, or drops them all."""
    record = json.loads((path / "stages" / "direct_ppo.json").read_text())
    guard = record["facts"].pop("guard")
    if changed:
        record["facts"]["guard"] = {key: x for key, x in (guard | changed).items() if x is not None}
    (path / "stages" / "direct_ppo.json").write_text(json.dumps(record))


def test_skill_and_costs_are_drawn_against_their_bounds(guarded, drawn):
    training.main_curves([read_run(guarded)])
    skill, options = drawn["General skill while training"]
    assert [line.arm for line in skill] == ["direct_ppo"]
    assert skill[0].x == [4, 8, 12, 16, 20, 24]
    assert skill[0].y[2] == pytest.approx(100 * (0.002 - 0.08 * 0.5 * 0.7 * 2))
    assert skill[0].intervals[2] == pytest.approx((skill[0].y[2] - 2.5, skill[0].y[2] + 2.5))
    assert (options["level"], options["level_label"]) == (-3.0, "")
    (light, main), options = drawn["Cost"]
    assert (len(light.x), len(main.x), light.light, main.light) == (24, 24, True, False)
    assert (options["level"], options["level_label"]) == (0.25, "")
    (held_out,), options = drawn["Held-out cost"]
    assert (len(held_out.intervals), options["level"]) == (6, 0.25)
    (multiplier,), options = drawn["Cost multiplier"]
    assert (len(multiplier.x), options["level"]) == (24, None)
    assert drawn["KL from the reference"][1]["level"] == 6.0


def test_a_run_without_guard_and_costs_has_none_of_their_panels(make_run, guarded):
    plain = training.main_curves([read_run(make_run("plain"))])
    safe = training.main_curves([read_run(guarded)])
    labels = [str(picture.svg).split('aria-label="')[1].split(" (")[0] for picture in safe]
    assert labels[-4:] == list(PANELS)
    assert len(safe) == len(plain) + 4


@pytest.mark.promise("U5")
def test_a_missing_probe_or_half_an_interval_is_left_out_and_never_zero(guarded, drawn):
    def lose(row):
        if row["step"] == 8:
            row.pop("probe_difference", None)
        if row["step"] == 12:
            row.pop("probe_difference_low", None)

    change_metrics(guarded, lose)
    training.main_curves([read_run(guarded)])
    (line,), _ = drawn["General skill while training"]
    assert line.x == [4, 12, 16, 20, 24]
    assert [ends is None for ends in line.intervals] == [False, True, False, False, False]
    assert line.intervals[2] == pytest.approx((line.y[2] - 2.5, line.y[2] + 2.5))  # those of its own point


def test_runs_with_different_bounds_share_no_dashed_line(guarded, make_guarded, drawn):
    other = make_guarded("other", ("base", "direct_ppo"))
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe["ppo"]["guard"]["max_drop"] = 0.05
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    training.main_curves([read_run(guarded), read_run(other)])
    lines, options = drawn["General skill while training"]
    assert [line.run for line in lines] == [0, 1]
    assert options["level"] is None
    assert drawn["Cost"][1]["level"] == 0.25


def test_intervals_are_upright_lines_in_the_colour_of_the_arm():
    def drawn_paths(intervals):
        svg = plots.curves(
            "Skill", "points", [Line("direct_ppo", [1, 2, 3], [0, 1, 2], markers=True, intervals=intervals)]
        )
        return str(svg).count("var(--arm-direct_ppo)")

    none = drawn_paths(())
    assert drawn_paths((None, None, None)) == none
    assert drawn_paths(((-1, 1), None, (1, 3))) == none + 2


def test_intervals_of_two_arms_at_the_same_steps_stand_side_by_side():
    ends = ((-1, 1), (0, 2))
    svg = plots.curves(
        "Skill", "points", [Line(arm, [4, 8], [0, 1], intervals=ends) for arm in ("sft_ppo", "direct_ppo")]
    )
    starts = {}
    for path, arm in re.findall(r'<path d="M ([\d.]+)[^"]*"[^>]*stroke: var\(--arm-(\w+)\)', str(svg)):
        starts.setdefault(arm, []).append(float(path))
    assert len(starts["sft_ppo"]) == len(starts["direct_ppo"]) == 3  # the line and two intervals
    gaps = [b - a for a, b in zip(starts["sft_ppo"], starts["direct_ppo"], strict=True)]
    assert min(gaps) > 1
    assert max(gaps) < 8  # of 273 points of width


def test_what_the_guard_did_is_said_with_its_worst_look(guarded):
    (line,) = training.guard_lines([read_run(guarded)])[1:]
    assert line == (
        "direct PPO: the capability guard looked at general skill 6 times; the worst difference was −5.4 points "
        "[−7.9, −2.9] against PPO's start, at iteration 12 (its bound: a drop of 3 points). It raised the KL weight "
        "once and did not stop the run."
    )
    assert training.guard_lines([read_run(guarded)])[0] == (
        "SFT + PPO: the capability guard was on, but no probe of general skill is recorded."
    )


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"raises": 0}, "It never raised the KL weight and did not stop the run."),
        ({"raises": 3, "stopped": True}, "It raised the KL weight 3 times and stopped the run."),
        ({"action": "stop", "raises": 0, "stopped": True}, "It stopped the run."),
        ({"action": "stop", "raises": 0, "stopped": False}, "It did not stop the run."),
        ({"raises": None}, "What it did is not recorded."),
        ({"stopped": None}, "What it did is not recorded."),
        ({"stopped": "yes"}, "What it did is not recorded."),
        ({}, "What it did is not recorded."),  # no facts: the stage did not end
    ],
)
def test_no_action_of_the_guard_is_hidden_and_none_is_made_up(guarded, facts, said):
    change_facts(guarded, **facts)
    line = training.guard_lines([read_run(guarded)])[-1]
    assert line.endswith(f"(its bound: a drop of 3 points). {said}")
    assert "looked at general skill 6 times" in line


def test_a_worst_look_whose_line_is_lost_is_said_without_interval(guarded):
    change_metrics(guarded, lambda row: row.pop("probe_difference", None))
    line = training.guard_lines([read_run(guarded)])[-1]
    assert "6 times; the worst difference was −5.4 points against PPO's start (its bound" in line
    (guarded / "metrics.jsonl").unlink()
    assert training.guard_lines([read_run(guarded)])[-1] == line


def test_a_guard_that_was_off_is_not_mentioned(make_run):
    assert training.guard_lines([read_run(make_run())]) == []


def test_guard_lines_of_several_runs_say_which_run(guarded, make_guarded):
    other = make_guarded("other", ("base", "direct_ppo"))
    lines = training.guard_lines([read_run(guarded), read_run(other)])
    assert [line.split(":")[0] for line in lines] == ["demo · SFT + PPO", "demo · direct PPO", "other · direct PPO"]


def test_alerts_of_guard_and_steps_are_listed_with_their_batch(guarded):
    fault = {"seen": "The norm is 41", "cause": "an odd batch.", "remedy": "look at it."}
    write_lines(
        guarded / "alerts.jsonl",
        [
            {
                "stage": "direct_ppo",
                "step": 12,
                "name": "capability_drop",
                "seen": "General skill has dropped by 5.4% [2.9%, 7.9%].",
                "cause": "the policy moves too far.",
                "remedy": "The KL weight was raised to 0.1 (1 of 3).",
            },
            {"stage": "reward_model", "step": 7, "name": "gradient_spike", **fault, "batch": ["a1", "a2", "a3", "a4"]},
            {"stage": "sft_ppo", "step": 3, "name": "nonfinite_step", **fault, "batch": ["b1"]},
            {"stage": "dpo", "step": 9, "name": "something_new"},
        ],
    )
    assert training.alerts([read_run(guarded)]) == [
        "direct PPO, iteration 12: General skill has dropped by 5.4% [2.9%, 7.9%]. Usual cause: the policy moves too "
        "far. What to do: The KL weight was raised to 0.1 (1 of 3).",
        "reward model, step 7: The norm is 41. Usual cause: an odd batch. What to do: look at it. Batch: a1, a2, a3 "
        "and 1 more (alerts.jsonl).",
        "SFT + PPO, iteration 3: The norm is 41. Usual cause: an odd batch. What to do: look at it. Batch: b1.",
        "DPO, step 9: something new.",
    ]


def test_many_faulty_steps_are_counted_but_every_act_of_the_guard_is_listed(guarded):
    rows = [{"stage": "direct_ppo", "step": i, "name": "gradient_spike", "seen": f"spike {i}."} for i in range(1, 21)]
    rows += [{"stage": "sft_ppo", "step": i, "name": "gradient_spike", "seen": f"spike {i}."} for i in range(1, 5)]
    rows += [{"stage": "direct_ppo", "step": i, "name": "capability_drop", "seen": f"drop {i}."} for i in range(1, 7)]
    write_lines(guarded / "alerts.jsonl", rows)
    said = training.alerts([read_run(guarded)])
    assert sum("drop" in line for line in said) == 6
    assert [line for line in said if "iteration 3: spike" in line] == [
        "direct PPO, iteration 3: spike 3.",
        "SFT + PPO, iteration 3: spike 3.",
    ]
    assert said[-2:] == [
        "direct PPO, iteration 20: gradient spike, the last of 17 more (alerts.jsonl).",
        "SFT + PPO, iteration 4: gradient spike, one more (alerts.jsonl).",
    ]
    assert len(said) == 3 + 3 + 6 + 2


@pytest.mark.promise("X5")
def test_the_page_holds_the_guards_line_and_hostile_facts_stay_text(guarded):
    evil = "<img src=x onerror=alert(1)>"
    change_facts(guarded, action=evil)
    write_lines(
        guarded / "alerts.jsonl",
        [{"stage": "direct_ppo", "step": evil, "name": evil, "batch": [evil], "remedy": evil}],
    )
    text = write_report([guarded]).read_text()
    assert "looked at general skill 6 times" in text
    assert evil not in text
    assert "&lt;img src=x" in text
