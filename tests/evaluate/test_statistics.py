import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_rlhf.evaluate import statistics as stats
from direct_rlhf.evaluate.records import Item
from direct_rlhf.maths.intervals import Z95

DRAWS = 10_000


def items(values, task="t", clusters=None, failed=()):
    return [
        Item(task, str(i), "failed", None, reason="x", cluster=clusters[i] if clusters else "")
        if i in failed
        else Item(task, str(i), "scored", float(value), cluster=clusters[i] if clusters else "")
        for i, value in enumerate(values)
    ]


def test_a_rate_of_independent_items_has_wilsons_interval_so_that_none_of_160_is_not_certainty():
    summary = stats.summarise(items([0] * 160), draws=100, seed=0)
    assert (summary.mean, summary.low) == (0.0, 0.0)
    assert summary.high == pytest.approx(0.0234, abs=1e-4)


def test_standard_error_is_the_textbook_one_without_clusters_and_wider_when_items_repeat():
    values = np.random.default_rng(0).random(50)
    assert stats.summarise(items(values), draws=100, seed=0).stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    doubled = stats.summarise(items([*values, *values]), draws=100, seed=0)
    clustered = stats.summarise(
        items([*values, *values], clusters=[str(i % 50) for i in range(100)]), draws=100, seed=0
    )
    assert clustered.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert clustered.stderr > 1.3 * doubled.stderr


def test_bootstrap_of_a_mean_matches_its_standard_error_by_cluster():
    values = np.random.default_rng(1).normal(size=300)
    clusters = [str(i // 3) for i in range(300)]
    summary = stats.summarise(items(values, clusters=clusters), draws=DRAWS, seed=0)
    assert (summary.high - summary.low) / (2 * Z95) == pytest.approx(summary.stderr, rel=0.05)


@pytest.mark.promise("J8")
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
@settings(max_examples=25, deadline=None)
def test_identical_models_differ_by_nothing(values):
    found = stats.paired_difference(items(values), items(values), draws=200, seed=0)
    assert (found.difference, found.low, found.high, found.p, found.verdict) == (0, 0, 0, 1, "no difference shown")


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30), st.randoms())
@settings(max_examples=25, deadline=None)
def test_swapping_the_models_negates_and_shuffling_the_items_changes_nothing(pairs, random):
    a, b = items([x for x, _ in pairs]), items([y for _, y in pairs])
    forth = stats.paired_difference(a, b, draws=200, seed=3)
    back = stats.paired_difference(random.sample(b, len(b)), random.sample(a, len(a)), draws=200, seed=3)
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-forth.difference, -forth.high, -forth.low), abs=1e-12
    )
    assert back.p == forth.p


def test_paired_binary_interval_matches_the_closed_form():
    rng = np.random.default_rng(0)
    n = 2000
    a = rng.random(n) < 0.6
    b = np.where(rng.random(n) < 0.1, ~a, a)
    found = stats.paired_difference(items(a), items(b), draws=DRAWS, seed=0)
    discordant, delta = np.mean(a != b), np.mean(a) - np.mean(b)
    assert found.difference == pytest.approx(delta)
    assert (found.high - found.low) / (2 * Z95) == pytest.approx(math.sqrt((discordant - delta**2) / n), rel=0.05)


def test_more_items_give_narrower_intervals_on_average():
    def width(n):
        draws = [np.random.default_rng([n, i]).random((2, n)) for i in range(10)]
        found = [stats.paired_difference(items(a), items(b), draws=500, seed=0) for a, b in draws]
        return np.mean([x.high - x.low for x in found])

    assert width(400) < 0.6 * width(100) < 0.4 * width(25)


def test_a_stratified_mean_weighs_tasks_equally_whatever_their_size():
    many, few = items([1] * 90, "many"), items([0] * 5 + [1] * 5, "few")
    summary = stats.summarise(many + few, draws=DRAWS, seed=0)
    assert summary.mean == pytest.approx(0.75)
    alone = stats.summarise(few, draws=DRAWS, seed=0)
    assert summary.stderr == pytest.approx(alone.stderr / 2)  # the other task never varies


def test_one_task_of_several_that_lost_all_its_items_leaves_no_mean():
    rest = items([1, 0, 1], "rest")
    lost = items([1, 1], "lost", failed=(0, 1))
    assert stats.summarise(rest + lost, draws=100, seed=0).mean is None
    assert (
        stats.paired_difference(rest + lost, rest + items([1, 1], "lost"), draws=100, seed=0).verdict
        == "nothing to compare"
    )


def test_one_cluster_gives_a_mean_but_no_interval_and_no_verdict():
    a, b = (items([x, x], clusters=["q", "q"]) for x in (0.9, 0.1))
    summary = stats.summarise(a, draws=100, seed=0)
    assert (summary.mean, summary.low, summary.stderr) == (0.9, None, None)
    found = stats.paired_difference(a, b, draws=100, seed=0)
    assert (found.low, found.p, found.verdict) == (None, None, "no difference shown")


def test_failures_that_could_turn_the_sign_leave_it_undecided():
    a, b = [1] * 12 + [0] * 88, [0] * 100
    clear = stats.paired_difference(items(a), items(b), draws=DRAWS, seed=0)
    assert clear.verdict == "higher"
    assert (clear.worst, clear.best) == (pytest.approx(0.12), pytest.approx(0.12))
    few = stats.paired_difference(items(a), items(b, failed=range(50, 55)), draws=DRAWS, seed=0)
    assert (few.n_pairs, few.n_dropped, few.verdict) == (95, 5, "higher")
    assert (few.worst, few.best) == (pytest.approx(0.07), pytest.approx(0.12))
    many = stats.paired_difference(items(a), items(b, failed=range(50, 70)), draws=DRAWS, seed=0)
    assert many.worst == pytest.approx(-0.08)
    assert many.verdict == "not decided"


def test_an_item_that_one_model_never_saw_is_dropped_and_counted():
    found = stats.paired_difference(items([1, 0, 1]), items([0, 0, 1, 1]), draws=100, seed=0)
    assert (found.n_pairs, found.n_dropped) == (3, 1)
    assert found.difference == pytest.approx(1 / 3)


def test_holm_agrees_with_a_worked_example_and_never_falls_below_the_raw_value():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_the_p_value_of_a_sign_test_like_case_is_close_to_the_exact_one():
    # 15 discordant items of 100, 12 in favour: the normal approximation gives 0.017
    a, b = [1] * 12 + [0] * 88, [0] * 12 + [1] * 3 + [0] * 85
    assert stats.paired_difference(items(a), items(b), draws=DRAWS, seed=0).p == pytest.approx(0.017, abs=0.012)


def test_eleven_tasks_of_200_items_bootstrap_in_seconds():
    rng = np.random.default_rng(0)
    a, b = ([x for t in range(11) for x in items(rng.random(200), f"t{t}")] for _ in range(2))
    start = time.perf_counter()
    stats.paired_difference(a, b, draws=DRAWS, seed=0)
    assert time.perf_counter() - start < 5
