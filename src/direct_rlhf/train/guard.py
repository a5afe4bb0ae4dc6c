"""The capability guard: what PPO may not cost the policy in general skill, and what is done when it does.

A probe scores a few documents of every general task, always the same ones, at PPO's start and at each held-out
evaluation. The drop is the mean over tasks of the paired differences from the start.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from direct_rlhf.errors import ConfigError
from direct_rlhf.maths.intervals import paired_interval
from direct_rlhf.recipe.schema import GuardSection

Scores = Mapping[str, Sequence[float]]  # task -> score of each of its documents, in a fixed order


class Probe(Protocol):
    """Scores a model's general skill; the same model gives the same scores."""

    def __call__(self, model: Any, *, should_stop: Callable[[], bool]) -> Scores: ...


@dataclass(frozen=True)
class Verdict:
    """A probe against the start: shares, policy minus start, with a 95 % interval."""

    mean: float  # of the policy's own scores
    difference: float
    low: float
    high: float
    within: bool  # the bound; a policy that is not is never kept as the best, whatever the interval
    dropped: bool  # beyond the bound, and the interval excludes 0: the guard acts

    def metrics(self) -> dict[str, float]:
        return {
            "probe_mean": self.mean,
            "probe_difference": self.difference,
            "probe_difference_low": self.low,
            "probe_difference_high": self.high,
        }


def compare(start: Scores, now: Scores, section: GuardSection) -> Verdict:
    """The verdict on a policy whose probe gave ``now``, when that of its start was ``start``.

    Errors: ConfigError if the two probes are not of the same documents.
    """
    if {task: len(scores) for task, scores in start.items()} != {task: len(scores) for task, scores in now.items()}:
        raise ConfigError("two probes of general skill are not of the same documents: has evaluation.general changed?")
    differences = {task: [b - a for a, b in zip(start[task], now[task], strict=True)] for task in start}
    interval = paired_interval(differences)
    if interval is None:
        raise ConfigError("a probe of general skill needs at least one task, and two documents of each")
    difference, low, high = interval
    mean = sum(sum(scores) / len(scores) for scores in now.values()) / len(now)
    within = difference >= -section.max_drop
    return Verdict(mean, difference, low, high, within, dropped=not within and high < 0)


def alert(verdict: Verdict, section: GuardSection, done: str) -> dict[str, str]:
    """The line of alerts.jsonl for a drop; ``done`` says what the guard did about it."""
    return {
        "name": "capability_drop",
        "seen": (
            f"General skill has dropped by {-verdict.difference:.1%} [{-verdict.high:.1%}, {-verdict.low:.1%}] against "
            f"the start; the bound is {section.max_drop:.1%} (ppo.guard.max_drop)."
        ),
        "cause": "the policy is moving too far from the base for what it is paid.",
        "remedy": f"{done} Raise ppo.kl.coefficient or ppo.ptx.weight, or lower the learning rate.",
    }
