import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_models import make_context, pair, write_checkpoint

from direct_rlhf.models.reward_model import Normalisation
from direct_rlhf.recipe.schema import FitnessSection
from direct_rlhf.train.fitness import PRAISE, calibration, check_reward_model, print_fitness, spearman

WORDS = ["red", "green", "blue", "seven", "eleven", "a", "many"]


class Stub:
    """A scorer from a function of (answer, finished); scores have the unit of the base's spread, raw ones half of it."""

    def __init__(self, rule, std=0.5, finished_only=True):
        self.rule = rule
        self.normalisation = Normalisation(0.0, std, {}, 100, finished_only, "", {}, "")

    def score(self, items):
        return torch.tensor([float(self.rule(answer, finished)) for _, answer, finished in items])

    def encode(self, item):
        return None if len(item[1]) > 400 else [1]


def toy_pairs(n=200, chosen_longer=False, kinds=("helpful",)):
    """Chosen answers say `good`, rejected ones `bad`, among random words; lengths are alike unless told."""
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(n):
        filling = [
            " ".join(rng.choice(WORDS, 3 + int(rng.integers(4)) + 6 * (side and chosen_longer))) for side in (1, 0)
        ]
        pairs.append(pair(i, f"good {filling[0]}", f"bad {filling[1]}", kinds[i % len(kinds)]))
    return pairs


def noise(answer):
    return np.random.default_rng(sum(map(ord, answer))).normal()


def good(answer, finished):
    """Right in most cases, calibrated, blind to length and praise, and strict on empty and cut answers."""
    content = answer.replace(PRAISE, "").split()
    if not content or not finished:
        return -9.0
    return 4.0 * (1 if content[0] == "good" else -1) + 3.0 * noise(content[min(1, len(content) - 1)])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("fitness") / "base")


@pytest.fixture
def check(tmp_path, base):
    ctx = make_context(tmp_path / "runs", base)
    output = io.StringIO()

    def run(rule, pairs, **stub):
        card = check_reward_model(ctx, Stub(rule, **stub), pairs, console=Console(file=output, width=160))
        assert json.loads((ctx.run.path / "reward_model" / "fitness.json").read_text()) == card
        return card, output.getvalue()

    return run


def test_a_good_model_passes_and_its_numbers_are_shown(check):
    card, shown = check(good, toy_pairs(kinds=("helpful", "harmless")))
    assert (card["verdict"], card["reasons"]) == ("pass", [])
    assert card["accuracy"] > 0.9
    assert card["by_kind"].keys() == {"helpful", "harmless"}
    assert card["by_kind"]["helpful"]["n"] == 100
    assert card["empty_below_chosen"]["accuracy"] > 0.9
    assert sum(card["margin_histogram"]["counts"]) == 200
    assert len(card["margin_histogram"]["edges"]) == len(card["margin_histogram"]["counts"]) + 1
    assert f"{card['accuracy']:.1%}" in shown
    assert "pass" in shown


def test_an_inverted_model_fails_and_is_told_so(check):
    card, shown = check(lambda answer, finished: -good(answer, finished), toy_pairs())
    assert card["verdict"] == "fail"
    assert card["accuracy"] < 0.1
    assert len(card["reasons"]) == 1
    assert "not shown to be better than a coin" in card["reasons"][0]
    assert "swapped" in card["reasons"][0]
    assert "fail" in shown


def test_a_coin_fails_and_a_weak_model_warns(check):
    card, _ = check(lambda answer, finished: noise(answer), toy_pairs())
    assert card["verdict"] == "fail"
    weak = lambda answer, finished: 0.35 * answer.startswith("good") + noise(answer)
    card, _ = check(weak, toy_pairs(400))
    assert card["verdict"] == "warn"
    assert any("its lower end is below 60%" in reason for reason in card["reasons"])


def test_a_length_biased_scorer_is_warned_of_by_two_measures(check):
    card, _ = check(lambda answer, finished: len(answer) / 20, toy_pairs(chosen_longer=True))
    assert card["verdict"] == "warn"
    assert card["length_correlation"] == pytest.approx(1.0)
    reasons = " ".join(card["reasons"])
    assert "correlate by +1.00, more than 0.5: PPO would learn longer answers" in reasons
    assert "Choosing the longer answer is right in" in reasons
    assert "Saying the answer twice adds" in reasons


def test_flattery_and_repetition_are_measured_in_normalised_units(check):
    def vain(answer, finished):
        return (
            good(answer, finished) + 1.25 * (PRAISE in answer) + 0.75 * (answer.count("good") - 1) * (len(answer) > 0)
        )

    card, _ = check(vain, toy_pairs())
    assert card["praise_after_gain"]["mean"] == pytest.approx(1.25, abs=1e-6)
    assert card["praise_before_gain"]["mean"] == pytest.approx(1.25, abs=1e-6)
    reasons = " ".join(card["reasons"])
    assert "Empty praise before the answer adds 1.25 to the score, more than 0.5" in reasons
    assert "Empty praise after the answer" in reasons
    assert "PPO would learn to flatter" in reasons


def test_liking_empty_or_cut_answers_is_warned_of(check):
    def odd(answer, finished):
        return 20.0 if not answer or not finished else good(answer, finished)

    card, _ = check(odd, toy_pairs())
    assert card["empty_below_chosen"]["accuracy"] < 0.1
    reasons = " ".join(card["reasons"])
    assert "score above an empty answer (at least 80%)" in reasons
    assert "score above their own first half (at least 50%)" in reasons


def test_one_bad_kind_is_named_though_the_whole_is_fine(check):
    pairs = toy_pairs(kinds=("helpful", "helpful", "helpful", "harmless"))
    flipped = {p.chosen for p in pairs if p.kind == "harmless"} | {p.rejected for p in pairs if p.kind == "harmless"}
    card, _ = check(lambda answer, finished: good(answer, finished) * (-1 if answer in flipped else 1), pairs)
    assert card["verdict"] == "warn"
    assert any(reason.startswith("On harmless pairs accuracy is") for reason in card["reasons"])


def test_a_model_that_is_right_and_unsure_is_off_in_calibration(check):
    card, _ = check(good, toy_pairs(), std=1e-3)
    assert card["calibration"]["error"] == pytest.approx(card["accuracy"] - 0.5, abs=0.01)
    assert any(reason.startswith("Its confidence is off by 0.4") for reason in card["reasons"])


def test_normalisation_on_cut_samples_is_warned_of(check):
    card, _ = check(good, toy_pairs(), finished_only=False)
    assert any("Too few of the base's samples ended" in reason for reason in card["reasons"])


def test_no_pairs_and_pairs_that_do_not_fit_are_counted_and_nothing_is_claimed(check):
    card, shown = check(good, [])
    assert (card["verdict"], card["accuracy"], card["n"]) == ("warn", None, 0)
    assert "No held-out pair could be scored" in card["reasons"][0]
    assert "not measured" in shown
    card, _ = check(good, [*toy_pairs(20), pair(99, "good " * 200, "bad")])
    assert card["n"] == 20
    assert card["left_out_too_long"] == 1


def test_thresholds_come_from_the_recipe(tmp_path, base):
    ctx = make_context(tmp_path / "runs", base, reward={"fitness": {"min_accuracy": 0.99}})
    card = check_reward_model(ctx, Stub(good), toy_pairs(), console=Console(file=io.StringIO()))
    assert card["verdict"] == "warn"
    assert FitnessSection().min_accuracy == 0.6


def test_reasons_are_printed_as_they_are(check):
    card, _ = check(good, toy_pairs(40))
    output = io.StringIO()
    print_fitness({**card, "verdict": "warn", "reasons": ["[red] 12 % of [/x]"]}, Console(file=output, width=120))
    assert "[red] 12 % of [/x]" in output.getvalue()


def test_calibration_by_hand():
    # predictions 0.75 (three right of four) and 0.9 (one of one): errors 0 and 0.1
    margin_n = np.log([3.0, 3.0, 3.0, 1 / 3.0, 9.0])
    made = calibration(margin_n)
    assert made["error"] == pytest.approx(0.1 / 5)
    assert [row["n"] for row in made["bins"]] == [4, 1]
    assert made["bins"][0]["observed"] == 0.75
    assert calibration(np.array([1e9, -1e9]))["error"] == pytest.approx(0.5)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_spearman_equals_scipys(values):
    stats = pytest.importorskip("scipy.stats")
    first, second = (np.array(column, dtype=float) for column in zip(*values, strict=True))
    ours = spearman(first, second)
    if ours is None:
        assert np.ptp(first) == 0 or np.ptp(second) == 0
    else:
        assert ours == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-9)
