"""The noise that a run of several processes is judged by."""

import pytest

from nproc import figures, one_more


def test_the_interval_of_one_more_run_is_the_prediction_interval_of_a_normal():
    low, high = one_more([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 * (4 / 3) ** 0.5, 2 + 4.302653 * (4 / 3) ** 0.5))


def test_runs_that_agree_leave_no_room():
    assert one_more([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_figures_are_those_of_the_trained_arms_and_the_reward_model():
    rates = {"toxic_rate": 0.1, "bad_word_probability": 0.2, "refusal_rate": 0.3, "over_refusal_rate": 0.4}
    arm = {"conversation": {"score": 5.0}, "general": {"mean": 0.7}, "toxicity": rates}
    found = figures({"reward_model": {"accuracy": 0.9}, "arms": {"base": arm, "sft": arm}})
    assert found["sft: conversation"] == 5.0
    assert found["reward model: accuracy"] == 0.9
    assert len(found) == 7
