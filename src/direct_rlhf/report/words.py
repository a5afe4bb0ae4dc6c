"""Names, units and judgements: how a number and a difference are put into words.

"Better" and "worse" are said only where the 95 % interval of the paired difference excludes 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from direct_rlhf.report.read import ArmResults, Difference, Estimate, RunData

NOT_MEASURED = "not measured"
ARM_LABELS = {"base": "base", "sft": "SFT", "sft_ppo": "SFT + PPO", "dpo": "DPO", "direct_ppo": "direct PPO"}


class Judgement(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    NONE_SHOWN = "no difference shown"
    NO_INTERVAL = "not judged (no interval)"
    UNDECIDED = "not decided (the sign depends on failed items)"
    MISSING = NOT_MEASURED


@dataclass(frozen=True)
class Metric:
    """A headline metric. All are shares (0 to 1) shown in per cent, except where ``percent`` is False."""

    key: str
    label: str
    higher_is_better: bool
    names: tuple[str, ...]  # how comparisons.json may name it
    note: str
    percent: bool = True


HEADLINES = (
    Metric(
        "conversation",
        "Conversation score",
        True,
        ("conversation.score", "conversation"),
        "judged answers on a scale from 1 to 10",
        percent=False,
    ),
    Metric("general", "General mean", True, ("general.mean", "general"), "mean over the general tasks"),
    Metric("toxic_rate", "Toxic answers", False, ("toxic_rate", "toxicity.toxic_rate"), "sampled answers called toxic"),
    Metric(
        "bad_word_probability",
        "Bad-word probability",
        False,
        ("bad_word_probability", "toxicity.bad_word_probability"),
        "chance of a listed word among an answer's first words",
    ),
    Metric(
        "refusal_rate", "Refusal of harmful", True, ("refusal_rate", "toxicity.refusal_rate"), "harmful prompts refused"
    ),
    Metric(
        "over_refusal_rate",
        "Over-refusal",
        False,
        ("over_refusal_rate", "toxicity.over_refusal_rate"),
        "harmless prompts refused",
    ),
)
FURTHER = {  # compared as well, but no headlines; lower is better
    "toxicity.word_rate": "Answers with a listed word",
    "toxicity.first_word_probability": "Listed word as the first",
    "toxicity.expected_max_toxicity": "Expected maximum toxicity of k answers",
    "toxicity.toxicity_probability": "Any of k answers toxic",
}
RATE_KEYS = tuple(metric.key for metric in HEADLINES[2:])
BY_KEY: Mapping[str, Metric] = {metric.key: metric for metric in HEADLINES}


def arm_label(name: str) -> str:
    return ARM_LABELS.get(name, name)


def metric_of(name: str) -> Metric | None:
    """The headline metric that comparisons.json calls ``name``."""
    return next((metric for metric in HEADLINES if name in metric.names), None)


def metric_label(name: str) -> str:
    found = metric_of(name)
    return found.label if found else FURTHER.get(name, name)


def judge(difference: Difference | None, higher_is_better: bool) -> Judgement:
    """Cases: interval above 0, below 0, touching or covering 0, absent, or no difference at all.

    One task among several also needs its adjusted p value below 0.05.
    """
    if difference is None or difference.difference is None:
        return Judgement.MISSING
    if not difference.decided:
        return Judgement.UNDECIDED
    if difference.low is None or difference.high is None:
        return Judgement.NO_INTERVAL
    if difference.p_holm is not None and difference.p_holm >= 0.05:
        return Judgement.NONE_SHOWN
    if difference.low > 0:
        return Judgement.BETTER if higher_is_better else Judgement.WORSE
    if difference.high < 0:
        return Judgement.WORSE if higher_is_better else Judgement.BETTER
    return Judgement.NONE_SHOWN


def reference_label(run: RunData) -> str:
    return "the base" if run.reference == "base" else arm_label(run.reference)


def difference_of(run: RunData, arm: str, key: str) -> Difference | None:
    """The paired difference of the arm to the run's reference."""
    pair, names = (arm, run.reference), BY_KEY[key].names
    rows = (row for row in run.comparisons if (row.arm, row.against) == pair and row.metric in names)
    return next(rows, None)


def show_number(value: float | None, percent: bool = True) -> str:
    """A share as per cent, small ones with more digits; other numbers with two."""
    return NOT_MEASURED if value is None else _format([value], percent)[0] + (" %" if percent else "")


def show_estimate(found: Estimate | None, percent: bool = True) -> str:
    if found is None or found.low is None or found.high is None:
        return show_number(found.value if found else None, percent)
    value, low, high = _format([found.value, found.low, found.high], percent)
    return f"{value}{' %' if percent else ''} [{low}, {high}]"


def show_difference(row: Difference | None, percent: bool = True) -> str:
    """Signed difference with its interval, in percentage points where the metric is a share."""
    if row is None or row.difference is None:
        return NOT_MEASURED
    unit = " points" if percent else ""
    if row.low is None or row.high is None:
        return _format([row.difference], percent, sign="+")[0] + unit
    value, low, high = _format([row.difference, row.low, row.high], percent, sign="+")
    return f"{value}{unit} [{low}, {high}]"


def _format(values: Sequence[float], percent: bool, sign: str = "") -> list[str]:
    """Numbers that are read together, equally many decimals: two significant digits of the largest, at least one."""
    shown = [100 * x if percent else x for x in values]
    largest = max(map(abs, shown))
    decimals = (1 if percent else 2) if largest >= 0.95 or largest == 0 else 1 - math.floor(math.log10(largest))
    texts = [f"{x:{sign}.{min(decimals, 9)}f}" for x in shown]
    return [text.lstrip("+-") if not float(text) else text.replace("-", "−") for text in texts]  # a true minus sign


@dataclass(frozen=True)
class Verdict:
    """One claim about one arm: the question, the judgement, and the sentence that carries the numbers."""

    question: str
    judgement: Judgement
    sentence: str


def verdicts(run: RunData, arm: str) -> list[Verdict]:
    """The three claims: general skill kept? conversation better? toxic output rarer?"""
    return [
        _claim(run, arm, "General skill kept?", "general", _general_bound),
        _claim(run, arm, "Conversation better?", "conversation"),
        _claim(run, arm, "Toxic output rarer?", "toxic_rate", _over_refusal),
    ]


def _claim(
    run: RunData, arm: str, question: str, key: str, more: Callable[[RunData, str, Difference], str] | None = None
) -> Verdict:
    metric, row, against = BY_KEY[key], difference_of(run, arm, key), reference_label(run)
    judgement = judge(row, metric.higher_is_better)
    if row is None or judgement is Judgement.MISSING:
        return Verdict(question, judgement, f"There is no paired comparison with {against}: {metric.label.lower()}.")
    sentence = f"{metric.label} {show_difference(row, metric.percent)} against {against}"
    return Verdict(question, judgement, sentence + (more(run, arm, row) if more else "."))


def _general_bound(run: RunData, arm: str, row: Difference) -> str:
    """Where no loss is shown, how large a loss the interval still allows."""
    if row.low is None or row.high is None or row.low >= 0 or row.high < 0:
        return "."
    return f"; a loss above {_format([-row.low], percent=True)[0]} points is unlikely."


def _over_refusal(run: RunData, arm: str, row: Difference) -> str:
    """A model that refuses everything is clean: what became of harmless prompts stands beside the toxic rate."""
    over = difference_of(run, arm, "over_refusal_rate")
    words = {
        Judgement.BETTER: f". It also refuses fewer harmless prompts: {show_difference(over)}.",
        Judgement.WORSE: f". But it refuses more harmless prompts too: {show_difference(over)}.",
        Judgement.NONE_SHOWN: f"; no difference shown in refusals of harmless prompts: {show_difference(over)}.",
    }
    return words.get(judge(over, higher_is_better=False), ". Refusals of harmless prompts were not compared.")


def headline_arm(run: RunData) -> str | None:
    """The arm that the verdict is about: direct PPO, else the last arm that is not the reference."""
    names = [arm.name for arm in run.arms if arm.name != run.reference]
    return "direct_ppo" if "direct_ppo" in names else names[-1] if names else None


def best_arms(run: RunData, key: str) -> set[str]:
    """Arms to set in bold: the best by value, if its paired difference to the reference says better."""
    metric = BY_KEY[key]
    values = {arm.name: found.value for arm in run.arms if (found := arm.metric(key)) is not None}
    if len(values) < 2:
        return set()
    best = (max if metric.higher_is_better else min)(values.values())
    return {
        name
        for name, value in values.items()
        if value == best and judge(difference_of(run, name, key), metric.higher_is_better) is Judgement.BETTER
    }


def is_miniature(run: RunData) -> bool:
    model = run.recipe.get("model")
    return isinstance(model, Mapping) and str(model.get("base", "")).startswith("world:")


def failed_items(arm: ArmResults) -> dict[str, int]:
    """Suite -> failed items, where some failed."""
    return {suite: failed for suite, (_, failed) in arm.counts.items() if failed}
