"""What the page of the 3H study computes by itself."""

import pytest
from scipy import stats

from direct_rlhf.report.read import Estimate
from direct_rlhf.report.three_h import Point, front, over_runs, student_95


@pytest.mark.parametrize(("freedom", "printed"), [(1, 12.706), (2, 4.303), (9, 2.262), (30, 2.042), (1000, 1.962)])
def test_the_quantiles_are_those_of_printed_tables(freedom, printed):
    assert student_95(freedom) == pytest.approx(printed, abs=5e-4)


def test_the_interval_over_runs_is_students_also_for_many_runs():
    values = [float(value) for value in range(12)]
    found = over_runs([Estimate(value) for value in values])
    low, high = stats.t.interval(0.95, 11, loc=5.5, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)


def test_the_front_holds_what_no_other_beats_in_both():
    points = [Point(name, "merge", x, y) for name, x, y in [("a", 1, 3), ("b", 2, 2), ("c", 1, 2), ("d", 3, 1)]]
    assert [point.label for point in front(points)] == ["a", "b", "d"]
