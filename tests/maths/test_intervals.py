import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import dictionaries, floats, lists, sampled_from

from direct_rlhf.maths.intervals import paired_interval, wilson

VALUES = floats(-5, 5)
TASKS = dictionaries(sampled_from("abcd"), lists(VALUES, min_size=2, max_size=6), min_size=1)


def test_wilson_agrees_with_published_values():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) is None
    assert wilson(20, 20)[1] == 1.0


def test_a_paired_interval_worked_out_by_hand():
    # means 0 and 0.5; variances 2/3 and 1/2; (2/3 / 4 + 1/2 / 2) / 2^2 = 5/48
    mean, low, high = paired_interval({"facts": [1, -1, 0, 0], "pronouns": [1, 0]})
    assert mean == 0.25
    assert (low, high) == pytest.approx((0.25 - 1.959964 * math.sqrt(5 / 48), 0.25 + 1.959964 * math.sqrt(5 / 48)))


@given(tasks=TASKS)
def test_the_paired_interval_equals_its_formula_in_numpy(tasks):
    mean = np.mean([np.mean(task) for task in tasks.values()])
    error = math.sqrt(sum(np.var(task, ddof=1) / len(task) for task in tasks.values()) / len(tasks) ** 2)
    assert paired_interval(tasks) == pytest.approx((mean, mean - 1.959964 * error, mean + 1.959964 * error), abs=1e-6)


@given(tasks=TASKS)
def test_swapping_the_two_models_negates_the_interval(tasks):
    mean, low, high = paired_interval(tasks)
    swapped = paired_interval({name: [-x for x in task] for name, task in reversed(tasks.items())})
    assert swapped == pytest.approx((-mean, -high, -low), abs=1e-12)


@given(tasks=TASKS, shift=VALUES, scale=floats(0.1, 10))
def test_the_interval_moves_and_scales_with_the_differences(tasks, shift, scale):
    moved = paired_interval({name: [scale * x + shift for x in task] for name, task in tasks.items()})
    assert moved == pytest.approx(tuple(scale * x + shift for x in paired_interval(tasks)), abs=1e-6)


def test_equal_models_differ_by_exactly_0():
    assert paired_interval({"facts": [0.0] * 5, "pronouns": [0.0] * 3}) == (0.0, 0.0, 0.0)


def test_a_large_task_weighs_as_much_as_a_small_one():
    mean, _, _ = paired_interval({"large": [1.0] * 1000, "small": [0.0, 0.0]})
    assert mean == 0.5


@pytest.mark.parametrize("tasks", [{}, {"facts": []}, {"facts": [0.5]}, {"facts": [0.1, 0.2], "pronouns": [0.3]}])
def test_a_task_of_fewer_than_2_items_has_no_interval(tasks):
    assert paired_interval(tasks) is None


def test_95_percent_of_the_intervals_hold_the_true_mean():
    draw = np.random.default_rng(0)
    true_mean = (0.2 + -0.1) / 2
    held = 0
    for _ in range(1000):
        differences = {
            "wide": draw.normal(0.2, 1.0, 40).tolist(),
            "discrete": draw.choice([-1.0, 0.0, 1.0], 80, p=[0.25, 0.6, 0.15]).tolist(),
        }
        _, low, high = paired_interval(differences)
        held += low <= true_mean <= high
    assert 0.93 <= held / 1000 <= 0.97
