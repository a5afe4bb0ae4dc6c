from itertools import combinations, pairwise
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from direct_rlhf.evaluate.maximum import expected_maximum, probability_of_any

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=9)


@given(SCORES, st.data())
def test_the_expected_maximum_is_the_mean_over_all_subsets_of_k(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    brute = mean(max(some) for some in combinations(scores, k))
    assert expected_maximum(scores, k) == pytest.approx(brute, abs=1e-12)


@given(st.lists(st.booleans(), min_size=1, max_size=10), st.data())
def test_the_probability_of_any_hit_is_the_share_of_all_subsets_of_k(hits, data):
    k = data.draw(st.integers(1, len(hits)))
    brute = mean(any(some) for some in combinations(hits, k))
    assert probability_of_any(hits, k) == pytest.approx(brute, abs=1e-12)


def test_golden_values_by_hand():
    """Of 1, 2, 4 choose two: maxima 2, 4, 4. Of three with one hit: two of the three pairs hold it."""
    assert expected_maximum([4.0, 1.0, 2.0], 2) == pytest.approx(10 / 3)
    assert probability_of_any([False, True, False], 2) == pytest.approx(2 / 3)


@given(SCORES)
def test_k_of_one_is_the_mean_and_k_of_all_is_the_maximum_and_between_it_only_grows(scores):
    values = [expected_maximum(scores, k) for k in range(1, len(scores) + 1)]
    assert values[0] == pytest.approx(mean(scores), abs=1e-12)
    assert values[-1] == max(scores)
    assert all(a <= b + 1e-12 for a, b in pairwise(values))


def test_rtp_sizes_stay_exact():
    """n = 100, k = 25: the weights sum to one, so a constant is its own maximum."""
    assert expected_maximum([0.3] * 100, 25) == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_that_cannot_be_chosen_is_refused(k):
    with pytest.raises(ValueError, match=f"k = {k} of n = 3"):
        expected_maximum([0.1, 0.2, 0.3], k)
    with pytest.raises(ValueError, match=f"k = {k} of n = 3"):
        probability_of_any([True, False, False], k)
