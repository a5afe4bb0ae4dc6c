"""Does the judge agree with people? Asked before any score of it is shown.

Human-labelled pairs, one a row: {"input", "output_1", "output_2", "label": 1 or 2}, such as LLMBar's. Each is judged in
both orders; its agreement is the mean of the two: 1 where the verdict is the people's, 0.5 for a tie, 0 against them.
A judge that always prefers one place, or draws lots, agrees at 0.5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from direct_rlhf.data.rows import read_rows
from direct_rlhf.errors import DataError
from direct_rlhf.evaluate.mt_bench import JudgePrompts
from direct_rlhf.evaluate.pairwise import Both, Inconsistency, both_orders, inconsistency, pair_cases
from direct_rlhf.evaluate.prompted import Panel
from direct_rlhf.evaluate.records import Item, Summary
from direct_rlhf.evaluate.statistics import summarise
from direct_rlhf.randomness import permutation
from direct_rlhf.recipe.references import HubReference

TASK = "self_check"
CHANCE = 0.5
_TOWARDS = {1: {"A": 1.0, "B": 0.0, "C": 0.5}, 2: {"A": 0.0, "B": 1.0, "C": 0.5}}


@dataclass(frozen=True)
class HumanPair:
    """Two answers to one text; people preferred the first (1) or the second (2)."""

    id: str  # FILE:LINE
    text: str
    answers: tuple[str, str]
    label: int


@dataclass(frozen=True)
class SelfCheck:
    """Agreement with people (0 to 1), with its interval and counts, and how consistent the judge is."""

    summary: Summary
    inconsistency: Inconsistency

    @property
    def better_than_chance(self) -> bool:
        """Whether the interval's lower end is above 0.5; without an interval it is not shown to be."""
        return self.summary.low is not None and self.summary.low > CHANCE

    def as_json(self) -> dict[str, Any]:
        """``agreement`` is the mean. Nothing here is a score of a model."""
        found = self.summary.as_json()
        ci = None if self.summary.low is None else [self.summary.low, self.summary.high]
        return {
            "agreement": found.pop("mean"),
            "ci": ci,
            **found,
            **self.inconsistency.as_json(),
            "better_than_chance": self.better_than_chance,
        }


def read_human_pairs(
    place: Path | HubReference, *, limit: int | None, subset: str | None, seed: int
) -> list[HumanPair]:
    """The pairs of a file; ``limit`` of them drawn by ``seed``, ``subset`` those whose row says so.

    Errors: DataError for a row that is no such pair, or if none is left.
    """
    pairs = []
    for row in read_rows(place, str(place)):
        value: Mapping[str, Any] = row.value or {}
        texts = [value.get(key) for key in ("input", "output_1", "output_2")]
        label = value.get("label")
        if not all(isinstance(text, str) for text in texts) or isinstance(label, bool) or label not in (1, 2):
            raise DataError(
                f"{row.source}: no human-labelled pair. It needs input, output_1, output_2 (texts) and label (1 or 2)."
            )
        if subset is None or value.get("subset") == subset:
            pairs.append(HumanPair(row.source, str(texts[0]), (str(texts[1]), str(texts[2])), int(label)))
    if not pairs:
        said = "" if subset is None else f" of the subset {subset!r}"
        raise DataError(
            f"{place}: holds no human-labelled pairs{said}. Give another file, or leave the self-check out."
        )
    drawn = permutation(len(pairs), seed, "self-check")[:limit]
    return [pairs[i] for i in sorted(drawn)]


def check_judge(
    panel: Panel, prompts: JudgePrompts, pairs: Sequence[HumanPair], *, draws: int, seed: int
) -> tuple[SelfCheck, list[Item]]:
    """Judge the pairs in both orders: two calls a pair, and one more for each reply without a verdict."""
    cases = []
    for pair in pairs:
        question = {"id": pair.id, "turns": [{"prompt": pair.text}]}
        sides = [pair.answers[0]], [pair.answers[1]]
        cases.append(pair_cases(prompts, question, 0, sides, ("people", "people")))
    found = both_orders(panel, cases, "judge self-check")
    items = [_item(pair, both, failure) for pair, (both, failure) in zip(pairs, found, strict=True)]
    check = SelfCheck(
        summarise(items, draws=draws, seed=seed), inconsistency([both for both, _ in found if both is not None])
    )
    return check, items


def _item(pair: HumanPair, both: Both | None, failure: str) -> Item:
    if both is None:
        word = "judge_unparsed" if failure.startswith("no_verdict") else "judge_failed"
        return Item(TASK, pair.id, "failed", None, reason=word, extra={"label": pair.label, "verdict": failure})
    turned_label = 3 - pair.label  # the other side stands first
    value = (_TOWARDS[pair.label][both.straight] + _TOWARDS[turned_label][both.turned]) / 2
    extra = {"label": pair.label, "straight": both.straight, "turned": both.turned, "consistent": both.consistent}
    return Item(TASK, pair.id, "scored", value, extra=extra)
