"""Intervals and paired comparisons by bootstrap over the unit that repeats.

Legend: D draws, C clusters (units of resampling) of one task.

Intervals are 95 %: Wilson's for one rate of independent items, else percentile intervals of the bootstrap. Several
tasks are stratified: clusters are drawn within each task, and the task means averaged with equal weight. Draws
depend on the seed, the task's name and its number of clusters only, so that neither the order of items nor the
presence of another task changes an interval.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from direct_rlhf.evaluate.records import Item, Summary, count
from direct_rlhf.maths.intervals import wilson
from direct_rlhf.randomness import generator

DRAWN_AT_ONCE = 2**22  # cluster draws held at once: 32 MB
Floats = NDArray[np.float64]
Verdict = Literal["higher", "lower", "no difference shown", "not decided", "nothing to compare"]


@dataclass(frozen=True)
class Difference:
    """Mean of model a minus mean of model b over the items that both have a value for.

    ``verdict`` is `higher` or `lower` (of a) only if the interval excludes 0; `not decided` if items were dropped and
    the sign depends on what they would have been.
    """

    difference: float | None
    low: float | None
    high: float | None
    p: float | None  # two-sided bootstrap p value
    n_pairs: int
    n_dropped: int  # items that one model or both have no value for
    worst: float | None  # the difference if a's missing values were the lowest and b's the highest possible
    best: float | None  # and the other way round
    verdict: Verdict


def summarise(items: Sequence[Item], *, draws: int, seed: int) -> Summary:
    """Mean, interval and standard error of the items that have a value; several tasks are averaged with equal weight.

    The standard error is cluster-robust; with one item per cluster it is sqrt(var / n) with the n - 1 variance.
    """
    counts = count(items)
    tasks = _by_task((item, item.value) for item in items if item.value is not None)
    # a task that lost every item leaves no mean at all: the average of the others would answer another question
    if not tasks or len(tasks) < len({item.task for item in items}):
        return Summary(None, None, None, None, counts)
    mean = float(np.mean([task.mean for task in tasks]))
    rate = _rate(tasks)
    if rate:
        low, high = wilson(*rate) or (None, None)
    else:
        low, high, _ = _bootstrap(tasks, draws=draws, seed=seed)
    return Summary(mean, low, high, _standard_error(tasks), counts)


def paired_difference(
    items_a: Iterable[Item],
    items_b: Iterable[Item],
    *,
    draws: int,
    seed: int,
    value_range: tuple[float, float] = (0, 1),
) -> Difference:
    """Paired bootstrap of mean(a) - mean(b) on common items, by cluster and, if there are several, within tasks.

    Cases:   equal items: 0, interval [0, 0], p = 1; swapping a and b negates the difference and the interval.
             Binary items, one per cluster: the standard error is sqrt((d - delta^2) / n), d = discordant share.
    Units:   those of the values. ``value_range`` bounds what a missing value could have been.
    """
    a_by_key = {(item.task, item.id): item for item in items_a}
    b_by_key = {(item.task, item.id): item for item in items_b}
    keys = sorted(a_by_key.keys() | b_by_key.keys())
    pairs: list[tuple[Item, float]] = []
    extremes: dict[str, list[tuple[float, float]]] = defaultdict(list)  # task -> (worst, best) of each item
    for key in keys:
        a, b = a_by_key.get(key), b_by_key.get(key)
        a_value, b_value = a.value if a else None, b.value if b else None
        if a and a_value is not None and b_value is not None:
            pairs.append((a, a_value - b_value))
        a_low, a_high = value_range if a_value is None else (a_value, a_value)
        b_low, b_high = value_range if b_value is None else (b_value, b_value)
        extremes[key[0]].append((a_low - b_high, a_high - b_low))
    dropped = len(keys) - len(pairs)
    tasks = _by_task(pairs)
    if not tasks or len(tasks) < len(extremes):
        return Difference(None, None, None, None, len(pairs), dropped, None, None, "nothing to compare")
    delta = float(np.mean([task.mean for task in tasks]))
    low, high, p = _bootstrap(tasks, draws=draws, seed=seed)
    worst, best = (float(np.mean([np.mean([pair[i] for pair in task]) for task in extremes.values()])) for i in (0, 1))
    return Difference(delta, low, high, p, len(pairs), dropped, worst, best, _verdict(low, high, dropped, worst, best))


def lowest_difference(items_a: Iterable[Item], items_b: Iterable[Item], *, draws: int, seed: int) -> Difference:
    """Paired bootstrap of the lowest task mean of a minus the lowest of b, which may be another task's.

    Cases:   one task: as `paired_difference`; equal items: 0.
    Items that only one of the two has a value for are left out and counted.
    """
    a_by_key = {(item.task, item.id): item for item in items_a if item.value is not None}
    b_by_key = {(item.task, item.id): item for item in items_b if item.value is not None}
    keys = sorted(a_by_key.keys() & b_by_key.keys())
    dropped = len(a_by_key.keys() | b_by_key.keys()) - len(keys)
    both = [_by_task((a_by_key[key], float(side[key].value or 0.0)) for key in keys) for side in (a_by_key, b_by_key)]
    if not keys or any(len(task.total_C) < 2 for task in both[0]):
        return Difference(None, None, None, None, len(keys), dropped, None, None, "nothing to compare")
    delta = min(task.mean for task in both[0]) - min(task.mean for task in both[1])
    # the same clusters are drawn for both: a draw depends on the task's name and size alone
    low_aD, low_bD = (np.min([_task_draws(task, draws, seed) for task in tasks], axis=0) for tasks in both)
    low, high, p = _interval(low_aD - low_bD)
    verdict = "not decided" if dropped else _verdict(low, high, 0, delta, delta)
    return Difference(delta, low, high, p, len(keys), dropped, None, None, verdict)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for making all these comparisons (family-wise error). Source: Holm 1979."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


@dataclass(frozen=True)
class _Task:
    """One task as sums over its clusters, in the order of their names."""

    name: str
    total_C: Floats
    size_C: Floats

    @property
    def mean(self) -> float:
        return float(self.total_C.sum() / self.size_C.sum())


def _by_task(values: Iterable[tuple[Item, float]]) -> list[_Task]:
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item, value in values:
        sums[item.task][item.unit].append(value)
    return [
        _Task(
            task,
            np.array([math.fsum(clusters[name]) for name in sorted(clusters)]),
            np.array([float(len(clusters[name])) for name in sorted(clusters)]),
        )
        for task, clusters in sorted(sums.items())
    ]


def _bootstrap(
    tasks: Sequence[_Task], *, draws: int, seed: int
) -> tuple[float, float, float] | tuple[None, None, None]:
    """(low, high, two-sided p of mean = 0) of the equally weighted task means; Nones if a task has one cluster only."""
    if any(len(task.total_C) < 2 for task in tasks):
        return None, None, None
    return _interval(np.mean([_task_draws(task, draws, seed) for task in tasks], axis=0))


def _interval(value_D: Floats) -> tuple[float, float, float]:
    """(low, high, two-sided p of 0) of a statistic's draws."""
    low, high = np.quantile(value_D, (0.025, 0.975))
    # the added draw is the sample itself: a p value is never 0
    tail = min(int((value_D <= 0).sum()), int((value_D >= 0).sum())) + 1
    return float(low), float(high), min(1.0, 2 * tail / (len(value_D) + 1))


def _task_draws(task: _Task, draws: int, seed: int) -> Floats:
    """Means of ``draws`` resamples of the task's clusters."""
    clusters = len(task.total_C)
    rng = generator(seed, "bootstrap", task.name, clusters)
    rows = max(1, DRAWN_AT_ONCE // clusters)
    parts = []
    for start in range(0, draws, rows):
        picked_DC = rng.integers(0, clusters, (min(rows, draws - start), clusters))
        parts.append(task.total_C[picked_DC].sum(axis=1) / task.size_C[picked_DC].sum(axis=1))
    return np.concatenate(parts)


def _rate(tasks: Sequence[_Task]) -> tuple[int, int] | None:
    """(successes, n) if this is one task of independent items that are each 0 or 1."""
    if len(tasks) > 1 or not (tasks[0].size_C == 1).all() or not np.isin(tasks[0].total_C, (0, 1)).all():
        return None
    return int(tasks[0].total_C.sum()), len(tasks[0].total_C)


def _standard_error(tasks: Sequence[_Task]) -> float | None:
    """Cluster-robust standard error of the equally weighted mean; None if a task has one cluster only."""
    variance = 0.0
    for task in tasks:
        clusters = len(task.total_C)
        if clusters < 2:
            return None
        residual_C = task.total_C - task.mean * task.size_C
        variance += clusters / (clusters - 1) * float((residual_C**2).sum()) / float(task.size_C.sum()) ** 2
    return math.sqrt(variance) / len(tasks)


def _verdict(low: float | None, high: float | None, dropped: int, worst: float, best: float) -> Verdict:
    if low is None or high is None or low <= 0 <= high:
        return "no difference shown"
    if dropped and np.sign(worst) != np.sign(best):
        return "not decided"
    return "higher" if low > 0 else "lower"
