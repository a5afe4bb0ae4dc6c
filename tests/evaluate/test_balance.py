"""Helpful, honest and harmless in one number each, their mean and the worst of them."""

import numpy as np
import pytest

from direct_rlhf.errors import DataError
from direct_rlhf.evaluate.balance import MEAN, WORST, balance, balance_difference, of_kinds
from direct_rlhf.evaluate.records import Item

KINDS = ("helpful", "honest", "harmless")
DRAWS = {"draws": 2000, "seed": 3}


def items(scores: dict[str, list[float]]) -> list[Item]:
    return [
        Item("conversation", f"{kind}-{n}:1", "scored", float(value), cluster=f"{kind}-{n}", extra={"category": kind})
        for kind, values in scores.items()
        for n, value in enumerate(values)
    ]


def test_every_kind_counts_alike_however_many_questions_it_has():
    found = balance(
        of_kinds(items({"helpful": [8, 8, 8, 8], "honest": [5, 5], "harmless": [2, 2, 2]}), KINDS), KINDS, **DRAWS
    )
    assert {kind: one.mean for kind, one in found.by_kind.items()} == {"helpful": 8, "honest": 5, "harmless": 2}
    assert found.mean.mean == 5
    assert found.worst == "harmless"


def test_other_categories_do_not_count_and_a_missing_kind_is_named():
    rows = items({"helpful": [9, 9], "honest": [9, 9], "harmless": [9, 9], "small talk": [1, 1]})
    assert balance(of_kinds(rows, KINDS), KINDS, **DRAWS).mean.mean == 9
    with pytest.raises(DataError, match="no question has the category honest"):
        of_kinds(items({"helpful": [9], "harmless": [9]}), KINDS)


def test_the_worst_kind_of_one_model_may_be_another_than_that_of_the_other():
    ours = of_kinds(items({"helpful": [4] * 9, "honest": [9] * 9, "harmless": [9] * 9}), KINDS)
    theirs = of_kinds(items({"helpful": [9] * 9, "honest": [9] * 9, "harmless": [3] * 9}), KINDS)
    found = balance_difference(ours, theirs, KINDS, **DRAWS)
    assert found[WORST].difference == 1
    assert found[WORST].verdict == "higher"
    assert found["helpful"].difference == -5
    assert found[MEAN].difference == pytest.approx(1 / 3)


def test_equal_models_differ_in_nothing():
    rows = of_kinds(items({kind: [1, 5, 9, 10] for kind in KINDS}), KINDS)
    for found in balance_difference(rows, rows, KINDS, **DRAWS).values():
        assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
        assert found.verdict == "no difference shown"


def test_the_interval_of_the_worst_is_that_of_a_bootstrap_written_out():
    rng = np.random.default_rng(0)
    scores = {kind: rng.integers(1, 11, 40).astype(float) for kind in KINDS}
    others = {kind: np.clip(values + rng.integers(-2, 3, 40), 1, 10) for kind, values in scores.items()}
    both = [of_kinds(items({kind: list(v) for kind, v in side.items()}), KINDS) for side in (scores, others)]
    found = balance_difference(*both, KINDS, draws=4000, seed=0)[WORST]
    picks = {kind: rng.integers(0, 40, (4000, 40)) for kind in KINDS}
    lowest = [np.min([side[kind][picks[kind]].mean(1) for kind in KINDS], axis=0) for side in (scores, others)]
    low, high = np.quantile(lowest[0] - lowest[1], (0.025, 0.975))
    assert found.low == pytest.approx(low, abs=0.06)
    assert found.high == pytest.approx(high, abs=0.06)


def test_an_answer_that_failed_leaves_the_worst_undecided():
    rows = of_kinds(items({kind: [2, 3, 4] for kind in KINDS}), KINDS)
    better = of_kinds(items({kind: [9, 9, 9] for kind in KINDS}), KINDS)
    failed = [Item(x.task, x.id, "failed", None, reason="no answer") if x.id == "honest-0:1" else x for x in better]
    found = balance_difference(failed, rows, KINDS, **DRAWS)[WORST]
    assert (found.n_dropped, found.verdict) == (1, "not decided")
