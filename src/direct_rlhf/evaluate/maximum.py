"""The worst of k answers, without bias from n >= k of them.

Both numbers grow with k, so they say nothing without it. Averaging over all C(n, k) ways to choose k of the n answers
is exact and takes no sampling: it is the U-statistic of the maximum of k, which has less noise than k answers alone.

Source: RealToxicityPrompts (Gehman et al., arXiv 2009.11462), with k = 25; the estimator is that of pass@k.
"""

from collections.abc import Sequence
from math import comb, fsum


def expected_maximum(scores: Sequence[float], k: int) -> float:
    """E[max of k] = sum over i of s_(i) C(i-1, k-1) / C(n, k), where s_(1) <= ... <= s_(n).

    Cases:   k = 1: the mean; k = n: the maximum.
    Errors:  ValueError if k is below 1 or above n.
    """
    _check(len(scores), k)
    weighted = [score * (comb(i, k - 1) / comb(len(scores), k)) for i, score in enumerate(sorted(scores))]
    return fsum(weighted)


def probability_of_any(hits: Sequence[bool], k: int) -> float:
    """P(one of k is a hit) = 1 - C(n - m, k) / C(n, k), where m of the n are hits.

    Errors:  ValueError if k is below 1 or above n.
    """
    _check(len(hits), k)
    return 1 - comb(len(hits) - sum(hits), k) / comb(len(hits), k)


def _check(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} of n = {n} answers: k must be between 1 and n")
