import pytest

from direct_rlhf.train.health import WINDOW, detect, text_statistics

CALM = {
    "kl_sequence": 2.0,
    "length_mean": 20.0,
    "rate_length_cut": 0.1,
    "repeated_4gram_rate": 0.05,
    "duplicate_rate": 0.1,
    "reward_std": 1.0,
}


def names(changed, steps=WINDOW, start=None):
    history = [{**CALM, **(start or {})}] * 4 + [{**CALM, **changed}] * steps
    return [alert.name for alert in detect(history, cap=48, kl_target=6.0)]


def test_a_calm_run_raises_no_alert():
    assert names({}) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"kl_sequence": -0.6}, "negative_kl"),
        ({"kl_sequence": 12.1}, "kl_high"),
        ({"length_mean": 1.5}, "eos_only"),
        ({"length_mean": 5.0}, "shrinking"),
        ({"length_mean": 40.0}, "length_spike"),
        ({"rate_length_cut": 0.9}, "never_ends"),
        ({"repeated_4gram_rate": 0.6}, "repetition"),
        ({"duplicate_rate": 0.7, "kl_sequence": 4.0}, "one_answer"),
        ({"reward_std": 1e-4}, "flat_reward"),
    ],
)
def test_each_collapse_is_named_after_it_lasts_and_not_before(changed, expected):
    assert expected in names(changed)
    assert names(changed, steps=WINDOW - 1) == []


def test_an_alert_says_what_was_seen_its_cause_and_the_remedy():
    (alert,) = detect([{**CALM, "kl_sequence": -0.7}] * WINDOW, cap=48, kl_target=6.0)
    assert str(alert) == (
        "The KL to the reference is -0.70 nats, below 0 for 3 iterations. Usual cause: sampling and scoring "
        "differ (temperature, masks), or EOS is suppressed. What to do: stop the run; compare ppo.sampling with what the "
        "sampler was given."
    )


def test_a_sampler_that_stays_far_from_the_trainer_is_named_and_none_is_missed_where_there_is_none():
    history = [CALM] + [{**CALM, "mismatch_kl": 0.02}] * WINDOW
    (alert,) = detect(history, cap=48, kl_target=6.0, mismatch_limit=0.01)
    assert alert.name == "sampler_mismatch"
    assert alert.seen == "Sampler and trainer are 0.02 nats per token apart, over 0.01."
    assert detect(history, cap=48, kl_target=6.0, mismatch_limit=0.03) == []
    assert detect(history[:-1], cap=48, kl_target=6.0, mismatch_limit=0.01) == []  # one of the three is calm


def test_text_statistics_count_what_they_say():
    texts = ["a b a b", "I cannot help.", "I cannot  help.", "", "x y z w x y z w"]
    stats = text_statistics(texts, ["p1", "p2", "p3", "p4", "p5"])
    assert stats["rate_empty"] == 1 / 5
    assert stats["duplicate_rate"] == 2 / 5  # the two refusals, white space folded
    assert stats["repeated_4gram_rate"] == pytest.approx((0 + 1 / 5) / 2)  # only answers of >= 4 words count
    # pairs: ab ba ab | I-cannot cannot-help twice | xy yz zw wx xy yz zw -> 8 distinct of 14
    assert stats["distinct_2"] == pytest.approx(8 / 14)


def test_equal_answers_to_the_same_prompt_are_no_duplicates():
    assert text_statistics(["yes", "yes"], ["p", "p"])["duplicate_rate"] == 0.0
