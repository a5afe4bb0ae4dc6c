"""Intervals of 95 %. Pure Python."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(successes: float, n: int) -> tuple[float, float] | None:
    """Interval of one rate; None for n = 0. Half a success is a tie. Source: Wilson 1927."""
    if n == 0:
        return None
    rate, z2 = successes / n, Z95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # at the ends the bound is exactly 0 or 1; rounding may pass it
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def paired_interval(differences: Mapping[str, Sequence[float]]) -> tuple[float, float, float] | None:
    """(mean, low, high) of per-item differences by task: tasks are strata, each with equal weight.

        mean = sum_t mean_t / K        mean +- 1.96 sqrt(sum_t var_t / n_t) / K        var_t divides by n_t - 1

    Cases:   K tasks; one task: mean +- 1.96 s / sqrt(n); all differences of a task equal: it adds no width.
             None if there is no task or a task has fewer than 2 items: its variance is unknown.
    Units:   those of the differences. Normal approximation: a handful of items gives too narrow an interval.
    Source:  Cochran, Sampling Techniques, section 5.3 (stratified mean without finite population correction).
    """
    tasks = list(differences.values())
    if not tasks or any(len(task) < 2 for task in tasks):
        return None
    mean = fmean(fmean(task) for task in tasks)
    half = Z95 * math.sqrt(math.fsum(variance(task) / len(task) for task in tasks)) / len(tasks)
    return mean, mean - half, mean + half
