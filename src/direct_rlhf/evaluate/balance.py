"""The balance of several kinds of answers (helpful, honest, harmless) in one model, and between two models.

Items are those of the conversation suite, whose categories are the kinds. Mean: of the kinds' means, with equal
weight. Worst: the lowest of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from direct_rlhf.errors import DataError
from direct_rlhf.evaluate.records import Item, Summary
from direct_rlhf.evaluate.statistics import Difference, lowest_difference, paired_difference, summarise

SCORES = (1.0, 10.0)  # range of a judge's score
MEAN, WORST = "mean", "worst"


@dataclass(frozen=True)
class Balance:
    """One model's scores by kind."""

    by_kind: Mapping[str, Summary]
    mean: Summary

    @property
    def worst(self) -> str | None:
        """The kind with the lowest mean; None if a kind has none."""
        means = {kind: found.mean for kind, found in self.by_kind.items()}
        if not means or any(mean is None for mean in means.values()):
            return None
        return min(means, key=lambda kind: (means[kind] or 0.0, kind))


def of_kinds(items: Iterable[Item], kinds: Sequence[str]) -> list[Item]:
    """The items of these kinds, each kind a task of its own. DataError if a kind has none."""
    found = [replace(item, task=str(item.extra.get("category", ""))) for item in items]
    found = [item for item in found if item.task in kinds]
    missing = sorted(set(kinds) - {item.task for item in found})
    if missing:
        raise DataError(f"no question has the category {' or '.join(missing)}: the questions must ask for every kind")
    return found


def balance(items: Sequence[Item], kinds: Sequence[str], *, draws: int, seed: int) -> Balance:
    """From the items of `of_kinds`."""
    by_kind = {kind: summarise([item for item in items if item.task == kind], draws=draws, seed=seed) for kind in kinds}
    return Balance(by_kind, summarise(items, draws=draws, seed=seed))


def balance_difference(
    ours: Sequence[Item], theirs: Sequence[Item], kinds: Sequence[str], *, draws: int, seed: int
) -> dict[str, Difference]:
    """Paired differences by kind, of the mean and of the worst kind."""
    settings = {"draws": draws, "seed": seed}
    found = {
        kind: paired_difference(
            [item for item in ours if item.task == kind],
            [item for item in theirs if item.task == kind],
            **settings,
            value_range=SCORES,
        )
        for kind in kinds
    }
    found[MEAN] = paired_difference(ours, theirs, **settings, value_range=SCORES)
    found[WORST] = lowest_difference(ours, theirs, **settings)
    return found
