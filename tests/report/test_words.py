"""Judgements and formats: what may be said of a number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from direct_rlhf.report.read import ArmResults, Difference, Estimate, read_run
from direct_rlhf.report.words import Judgement, best_arms, judge, show_difference, show_estimate, verdicts


def difference(value, low, high, **more):
    return Difference("direct_ppo", "base", "general", value, low, high, 100, **more)


@pytest.mark.parametrize(
    ("row", "higher_is_better", "expected"),
    [
        (difference(0.05, 0.01, 0.09), True, Judgement.BETTER),
        (difference(0.05, 0.01, 0.09), False, Judgement.WORSE),
        (difference(-0.05, -0.09, -0.01), True, Judgement.WORSE),
        (difference(-0.05, -0.09, -0.01), False, Judgement.BETTER),
        (difference(0.05, -0.01, 0.11), True, Judgement.NONE_SHOWN),
        (difference(0.05, 0.0, 0.10), True, Judgement.NONE_SHOWN),  # an interval that touches 0 covers it
        (difference(-0.05, -0.1, 0.0), False, Judgement.NONE_SHOWN),
        (difference(0.0, 0.0, 0.0), True, Judgement.NONE_SHOWN),  # two identical models
        (difference(0.5, None, None), True, Judgement.NO_INTERVAL),
        (difference(None, None, None), True, Judgement.MISSING),
        (None, True, Judgement.MISSING),
        (difference(0.05, 0.01, 0.09, p_holm=0.2), True, Judgement.NONE_SHOWN),  # one task among eleven
        (difference(0.05, 0.01, 0.09, p_holm=0.01), True, Judgement.BETTER),
        (difference(0.05, 0.01, 0.09, decided=False), True, Judgement.UNDECIDED),
    ],
)
def test_better_is_said_only_if_the_interval_leaves_zero_out(row, higher_is_better, expected):
    assert judge(row, higher_is_better) is expected


@given(st.floats(-1, 1), st.floats(0, 0.5), st.booleans())
def test_no_judgement_when_the_interval_covers_zero(value, half, higher):
    row = difference(value, value - half, value + half)
    if row.low <= 0 <= row.high:
        assert judge(row, higher) is Judgement.NONE_SHOWN
    else:
        assert judge(row, higher) is not judge(row, not higher)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (None, "not measured"),
        (Estimate(0.0), "0.0 %"),
        (Estimate(0.5), "50.0 %"),
        (Estimate(0.00043, 0.0003, 0.00056), "0.043 % [0.030, 0.056]"),
        (Estimate(0.02, 0.001, 0.1), "2.0 % [0.1, 10.0]"),
        (Estimate(1.0, None, None), "100.0 %"),
    ],
)
def test_shares_are_shown_in_per_cent_and_missing_is_said(found, text):
    assert show_estimate(found) == text


def test_differences_are_signed_points_with_a_true_minus():
    assert show_difference(difference(-0.004, -0.016, 0.008)) == "−0.4 points [−1.6, +0.8]"
    assert show_difference(difference(3.5, 3.0, 4.0), percent=False) == "+3.50 [+3.00, +4.00]"
    assert show_difference(difference(0.0, -0.00001, 0.02)) == "0.0 points [0.0, +2.0]"
    assert show_difference(difference(None, None, None)) == "not measured"


def test_the_three_claims_in_words(make_run):
    run = read_run(make_run())
    said = {arm: [(one.judgement, one.sentence) for one in verdicts(run, arm)] for arm in ("sft_ppo", "direct_ppo")}
    assert said["direct_ppo"] == [
        (
            "no difference shown",
            "General mean −0.4 points [−1.6, +0.8] against the base; a loss above 1.6 points is unlikely.",
        ),
        ("better", "Conversation score +3.50 [+3.00, +4.00] against the base."),
        (
            "better",
            "Toxic answers −20.7 points [−23.7, −17.7] against the base; "
            "no difference shown in refusals of harmless prompts: +1.3 points [−1.7, +4.3].",
        ),
    ]
    assert said["sft_ppo"][0] == ("worse", "General mean −2.6 points [−3.8, −1.4] against the base.")
    assert said["sft_ppo"][2][1].endswith("But it refuses more harmless prompts too: +10.0 points [+7.0, +13.0].")


def test_claims_without_a_comparison_are_not_measured(make_run):
    path = make_run()
    (path / "evaluation" / "comparisons.json").unlink()
    assert [one.judgement for one in verdicts(read_run(path), "direct_ppo")] == [Judgement.MISSING] * 3


def test_bold_needs_an_interval_against_the_base(make_run):
    run = read_run(make_run())
    assert best_arms(run, "general") == set()  # the base itself is best
    assert best_arms(run, "conversation") == {"sft_ppo"}
    assert best_arms(run, "toxic_rate") == {"direct_ppo"}
    assert best_arms(run, "over_refusal_rate") == set()


def test_an_arm_without_the_metric_is_never_the_best(make_run):
    run = make_run()
    (run / "evaluation" / "direct_ppo" / "toxicity.json").unlink()
    assert best_arms(read_run(run), "toxic_rate") == {"sft_ppo"}
    assert ArmResults("x", None).metric("toxic_rate") is None
