"""Two models' answers side by side, in both orders: a side that wins only where it stands first has not won.

    both orders prefer the same model   a win or a loss     value 1 or 0
    anything else                       a tie               value 0.5

An item is one turn: id QUESTION:TURN, value for the first model; both turns of a question are one unit of resampling.
If the two orders disagree (a tie and a win disagree too) the item is inconsistent. If either order has no verdict, the
item has failed and is in no rate.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from direct_rlhf.evaluate.mt_bench import JudgePrompts
from direct_rlhf.evaluate.prompted import CHOICE_ALONE, Case, Opinion, Panel, make_case
from direct_rlhf.evaluate.records import Item, Summary
from direct_rlhf.evaluate.statistics import Verdict, paired_difference, summarise
from direct_rlhf.evaluate.verdicts import Choice, parse_choice
from direct_rlhf.maths.intervals import wilson

TASK = "pairwise"
Side = Literal["first", "second"]
_VALUE: Mapping[Choice, float] = {"A": 1.0, "B": 0.0, "C": 0.5}


@dataclass(frozen=True)
class Both:
    """What a judge said of a pair: as it stands, and turned round."""

    straight: Choice
    turned: Choice

    @property
    def consistent(self) -> bool:
        return (self.straight, self.turned) in (("A", "B"), ("B", "A"), ("C", "C"))

    @property
    def value(self) -> float:
        """Of the side that stood first as it stands: 1 a win, 0 a loss, 0.5 a tie."""
        return _VALUE[self.straight] if self.consistent else 0.5

    @property
    def favoured(self) -> Side | None:
        """The place that the judge preferred; None if it was consistent."""
        if self.consistent:
            return None
        said = Counter((self.straight, self.turned))
        return "first" if said["A"] > said["B"] else "second"


def pair_cases(
    prompts: JudgePrompts,
    question: Mapping[str, Any],
    turn: int,
    answers: tuple[Sequence[str], Sequence[str]],
    models: tuple[str, str],
) -> tuple[Case, Case]:
    """Two models' answers to a question, as they stand and turned round."""

    def case(order: str, first: int, second: int) -> Case:
        said = {"_a": answers[first], "_b": answers[second]}
        names = (models[first], models[second])
        return make_case(prompts, "pairwise", question, turn, said, models=names, about={"order": order})

    return case("straight", 0, 1), case("turned", 1, 0)


def both_orders(panel: Panel, cases: Sequence[tuple[Case, Case]], title: str) -> list[tuple[Both | None, str]]:
    """The verdicts on each pair (as it stands, turned round), or None and why there is none. Both are always asked."""
    asked = [case for pair in cases for case in pair]
    opinions: list[Opinion[Choice]] = panel.ask(asked, parse_choice, CHOICE_ALONE, title)
    found: list[tuple[Both | None, str]] = []
    for straight, turned in zip(opinions[::2], opinions[1::2], strict=True):
        if straight.value is None or turned.value is None:
            found.append((None, straight.failure or turned.failure))
        else:
            found.append((Both(straight.value, turned.value), ""))
    return found


@dataclass(frozen=True)
class Inconsistency:
    """How often two orders disagreed, with Wilson's interval, and which place was preferred then."""

    rate: float | None
    low: float | None
    high: float | None
    favoured: Mapping[Side, int]

    def as_json(self) -> dict[str, Any]:
        ci = None if self.low is None else [self.low, self.high]
        return {"inconsistency_rate": self.rate, "inconsistency_ci": ci, "favoured": dict(self.favoured)}


def inconsistency(pairs: Sequence[Both]) -> Inconsistency:
    """Of the pairs that have both verdicts; None where there is none."""
    favoured: dict[Side, int] = {"first": 0, "second": 0}
    for pair in pairs:
        if pair.favoured is not None:
            favoured[pair.favoured] += 1
    torn = sum(favoured.values())
    low, high = wilson(torn, len(pairs)) or (None, None)
    return Inconsistency(torn / len(pairs) if pairs else None, low, high, favoured)


@dataclass(frozen=True)
class PairwiseResult:
    """``summary`` holds the win rate of the first model, ties as half a win. ``verdict`` is of that model."""

    summary: Summary
    verdict: Verdict
    outcomes: Mapping[str, int]  # wins, ties, losses
    inconsistency: Inconsistency
    by_turn: Mapping[str, Summary]
    by_category: Mapping[str, Summary]


def judge_pairs(
    panel: Panel,
    prompts: JudgePrompts,
    questions: Sequence[Mapping[str, Any]],
    items_a: Sequence[Item],
    items_b: Sequence[Item],
    *,
    models: tuple[str, str],
    draws: int,
    seed: int,
) -> tuple[PairwiseResult, list[Item]]:
    """Judge two models' answers (items of the conversation suite) in both orders.

    An answer that either model lacks makes the item fail. ``models`` name who wrote the answers, in the keys.
    """
    said = [_answers(items) for items in (items_a, items_b)]
    places = [(question, turn) for question in questions for turn in range(len(question["turns"]))]
    there, cases = [], []
    for place in places:
        question, turn = place
        a, b = (answers.get(str(question["id"]), [])[: turn + 1] for answers in said)
        if len(a) == len(b) == turn + 1:
            there.append((str(question["id"]), turn))
            cases.append(pair_cases(prompts, question, turn, (a, b), models))
    judged = dict(zip(there, both_orders(panel, cases, "pairs"), strict=True))
    items = [_item(question, turn, judged.get((str(question["id"]), turn))) for question, turn in places]
    return _result(items, [both for both, _ in judged.values() if both is not None], draws=draws, seed=seed), items


def _answers(items: Sequence[Item]) -> dict[str, list[str]]:
    """Question -> its answers by turn, up to the first that is not there."""
    found: dict[str, list[str]] = defaultdict(list)
    for item in sorted(items, key=lambda item: int(item.extra["turn"])):
        if item.output is not None and len(found[item.unit]) == int(item.extra["turn"]) - 1:
            found[item.unit].append(item.output)
    return found


def _item(question: Mapping[str, Any], turn: int, judged: tuple[Both | None, str] | None) -> Item:
    item = Item(
        task=TASK,
        id=f"{question['id']}:{turn + 1}",
        status="failed",
        value=None,
        reason="no_answer",
        cluster=str(question["id"]),
        extra={"turn": turn + 1, "category": str(question.get("category", ""))},
    )
    if judged is None:
        return item
    both, failure = judged
    if both is None:
        word = "judge_unparsed" if failure.startswith("no_verdict") else "judge_failed"
        return replace(item, reason=word, extra={**item.extra, "verdict": failure})
    verdicts = {"straight": both.straight, "turned": both.turned, "consistent": both.consistent}
    return replace(item, status="scored", value=both.value, reason="", extra={**item.extra, **verdicts})


def _result(items: Sequence[Item], pairs: Sequence[Both], *, draws: int, seed: int) -> PairwiseResult:
    def by(name: str) -> dict[str, Summary]:
        groups: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            groups[str(item.extra[name])].append(item)
        return {key: summarise(group, draws=draws, seed=seed) for key, group in sorted(groups.items())}

    mirrored = [item if item.value is None else replace(item, value=1 - item.value) for item in items]
    # win rate minus loss rate: its interval leaves 0 out where the win rate's leaves 1/2 out
    verdict = paired_difference(items, mirrored, draws=draws, seed=seed).verdict
    values = Counter(item.value for item in items)
    return PairwiseResult(
        summarise(items, draws=draws, seed=seed),
        verdict,
        {"wins": values[1.0], "ties": values[0.5], "losses": values[0.0]},
        inconsistency(pairs),
        by("turn"),
        by("category"),
    )
