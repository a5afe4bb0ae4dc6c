import json

import pytest

from direct_rlhf.report.conversation import conversation_section
from direct_rlhf.report.parts import Links, series_of
from direct_rlhf.report.read import read_run

CHECK = {
    "agreement": 0.71, "ci": [0.62, 0.79], "n_scored": 98, "n_failed": 2, "better_than_chance": True,
    "inconsistency_rate": 0.2, "favoured": {"first": 15, "second": 5},
}  # fmt: skip


def cell(value, n=10, failed=0):
    return {
        "value": value,
        "ci": None if value is None else [value - 0.5, value + 0.5],
        "n_scored": n,
        "n_failed": failed,
    }


def conversation(shift, **changed):
    by = {
        name: {"1": cell(5 + i + shift), "2": cell(4 + i + shift)}
        for i, name in enumerate(("coding", "math", "writing"))
    }
    by["math"]["2"] = cell(None, n=4, failed=6)
    return {
        "score": 5.5 + shift,
        "by_turn": {"1": 6.0, "2": 5.0},
        "by_category": {"coding": 4.5 + shift, "math": None, "writing": 6.5 + shift},
        "by_category_and_turn": by,
        "by_reference": {"none": cell(6.0), "given": cell(4.0), "sound": cell(4.5, n=7)},
        "judge": "endpoint (m)",
        "self_check": CHECK,
        "n_scored": 54,
        "n_failed": 6,
        **changed,
    }


def pairs(**changed):
    return {
        "arm": "direct_ppo", "against": "base", "win_rate": 0.61, "ci": [0.55, 0.68], "wins": 70, "ties": 55, "losses": 35,
        "inconsistency_rate": 0.25, "inconsistency_ci": [0.19, 0.32], "favoured": {"first": 30, "second": 10},
        "verdict": "higher", "n_failed": 3, **changed,
    }  # fmt: skip


@pytest.fixture
def section(tmp_path):
    def make(base, ppo=None, rows=None):
        (tmp_path / "recipe.yaml").write_text("name: r\n")
        for arm, content in {"base": base, "direct_ppo": ppo or base}.items():
            (tmp_path / "evaluation" / arm).mkdir(parents=True, exist_ok=True)
            (tmp_path / "evaluation" / arm / "conversation.json").write_text(json.dumps(content))
        if rows is not None:
            (tmp_path / "evaluation" / "pairwise.json").write_text(json.dumps(rows))
        runs = [read_run(tmp_path)]
        return conversation_section(runs, series_of(runs), Links(tmp_path))

    return make


def texts(row):
    return [one.text for one in row]


def test_scores_stand_by_category_arm_and_turn_and_missing_ones_are_no_numbers(section):
    table = section(conversation(0.0), conversation(1.0)).scores
    assert table.columns == ("Category", "base, turn 1", "base, turn 2", "direct PPO, turn 1", "direct PPO, turn 2")
    assert [row[0].text for row in table.rows] == ["coding", "math", "writing"]
    assert texts(table.rows[0])[1:] == [
        "5.00 [4.50, 5.50]",
        "4.00 [3.50, 4.50]",
        "6.00 [5.50, 6.50]",
        "5.00 [4.50, 5.50]",
    ]
    assert (table.rows[1][2].text, table.rows[1][2].sub, table.rows[1][2].tone) == (
        "not measured",
        "n = 4, 6 failed",
        "missing",
    )
    assert table.rows[0][1].href == "evaluation/base/conversation.json"


def test_the_judge_is_spoken_of_once_and_with_its_failures(section):
    (line,) = section(conversation(0.0), conversation(1.0)).checks
    assert line.text == (
        "Judge: endpoint (m). It agrees with people on 71.0 % [62.0, 79.0] of 98 pairs. With the order of the answers its "
        "verdict changed in 20.0 % of them, 15 of 20 times towards the answer shown first. 2 pairs have no verdict."
    )
    assert line.tone == ""


def test_a_judge_at_chance_is_said_to_be(section):
    weak = {**CHECK, "agreement": 0.55, "ci": [0.48, 0.62], "better_than_chance": False}
    (line,) = section(conversation(0.0, self_check=weak)).checks
    assert "That is no better than chance" in line.text
    assert line.tone == "bad"
    (unread,) = section(conversation(0.0, self_check={**weak, "agreement": None, "ci": None})).checks
    assert "Too few" in unread.text
    (unchecked,) = section(conversation(0.0, self_check=None)).checks
    assert "was not checked" in unchecked.text
    assert section(conversation(0.0, judge="scripted", self_check=None)).checks == ()


def test_references_stand_beside_their_absence(section):
    table = section(conversation(0.0)).references
    assert [row[0].text for row in table.rows] == [
        "Questions without a reference answer",
        "Questions with one, judged by it",
        "the same, without references reported wrong",
    ]
    assert table.rows[2][1].sub == "n = 7"


def test_arms_side_by_side_with_the_inconsistency_beside_the_rate(section):
    table = section(
        conversation(0.0), rows=[pairs(), pairs(verdict="no difference shown"), pairs(win_rate=None, ci=None)]
    ).pairs
    assert texts(table.rows[0]) == [
        "direct PPO against base",
        "61.0 % [55.0, 68.0]",
        "better",
        "25.0 % [19.0, 32.0]",
        "3",
    ]
    assert table.rows[0][1].sub == "70 wins, 55 ties, 35 losses"
    assert table.rows[0][3].sub == "30 of 40 times towards the answer shown first"
    assert texts(table.rows[1])[2] == "no difference shown"
    assert texts(table.rows[2])[1:3] == ["not measured", "not measured"]


def test_the_radar_leaves_a_gap_where_a_category_has_no_number(section):
    (picture,) = section(conversation(0.0), conversation(1.0)).pictures
    assert 'aria-label="Judged score by category by arm, 0 to 10"' in picture.svg
    assert "nan" not in picture.svg.lower()


def test_a_run_without_a_judge_that_is_asked_has_empty_parts(section):
    old = {"score": 5.0, "by_turn": {"1": 5.0}, "by_category": {"a": 5.0}, "judge": "scripted"}
    found = section(old)
    assert (found.checks, found.scores.rows, found.references.rows, found.pairs.rows, found.pictures) == (
        (),
        (),
        (),
        (),
        (),
    )


@pytest.mark.parametrize("broken", ["[1, 2]", '{"arm": 3}', "not json", '[{"arm": "x"}, 5]'])
def test_a_broken_pairwise_file_is_no_table_of_zeros(section, tmp_path, broken):
    section(conversation(0.0))
    (tmp_path / "evaluation" / "pairwise.json").write_text(broken)
    runs = [read_run(tmp_path)]
    table = conversation_section(runs, series_of(runs), Links(tmp_path)).pairs
    assert all(one.tone == "missing" for row in table.rows for one in row[1:])
