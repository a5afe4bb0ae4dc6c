"""Intervals of 95 %. Pure Python."""

import math

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
