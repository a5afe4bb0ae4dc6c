"""The fitness cards of the reward model and, after PPO-Lagrangian, of the cost model, from their fitness.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from direct_rlhf.report import plots
from direct_rlhf.report.parts import Cell, Links, Picture, Table, run_labels
from direct_rlhf.report.read import RunData, count, estimate, mapping, number
from direct_rlhf.report.samples import visible
from direct_rlhf.report.words import NOT_MEASURED, show_estimate, show_number

SHARES = (
    ("longer_is_chosen", "Rule “the longer answer” (for comparison)"),
    ("empty_below_chosen", "Chosen scores above an empty answer"),
    ("cut_below_chosen", "Chosen scores above its own first half"),
)
GAINS = (
    ("praise_before_gain", "Praise before the answer adds (sd)"),
    ("praise_after_gain", "Praise after the answer adds (sd)"),
    ("repetition_gain", "Saying the answer twice adds (sd)"),
)
COST_NOTE = "It scores as a reward model does, the harmless answer above the harmful one; a cost is minus its score."
VERDICT_TONES = {"pass": "good", "warn": "none", "fail": "bad"}


@dataclass(frozen=True)
class Card:
    label: str  # "" where there is no other to tell it from
    note: str
    verdict: str | None
    tone: str
    reasons: list[str]
    table: Table
    pictures: list[Picture]
    href: str | None


def cards(runs: Sequence[RunData], links: Links) -> list[list[Card]]:
    """For each run the card of its reward model and, where there is one, that of its cost model."""
    return [
        _cards(run, label, links) for run, label in zip(runs, run_labels(runs) if len(runs) > 1 else [""], strict=True)
    ]


def _cards(run: RunData, label: str, links: Links) -> list[Card]:
    reward, cost = (links.to(run, f"{which}_model/fitness.json") for which in ("reward", "cost"))
    if not run.cost_fitness:
        return [_card(run.fitness, label, "", reward)]
    before = f"{label} · " if label else ""
    return [
        _card(run.fitness, f"{before}Reward model", "", reward),
        _card(run.cost_fitness, f"{before}Cost model", COST_NOTE, cost),
    ]


def _card(content: Mapping[str, Any], label: str, note: str, href: str | None) -> Card:
    """The card; with no file every part of it is empty and the verdict None."""
    verdict = str(content["verdict"]) if content.get("verdict") else None
    reasons = content.get("reasons")
    return Card(
        label=label,
        note=note,
        verdict=verdict and visible(verdict),
        tone=VERDICT_TONES.get(str(verdict).lower(), "missing"),
        reasons=[visible(reason) for reason in reasons] if isinstance(reasons, list) else [],
        table=_table(content),
        pictures=[
            Picture(svg, caption)
            for svg, caption in (
                (
                    _histogram(content),
                    "Score of the chosen minus the rejected answer; left of the line: the wrong order.",
                ),
                (_calibration(content), "A point's size is its share of the pairs; on the dashed line: calibrated."),
            )
            if svg is not None
        ],
        href=href,
    )


def _table(content: Mapping[str, Any]) -> Table:
    """The checks in the card's order; one that the card does not hold is left out, one without a number is said so."""
    shares = [("Held-out accuracy", content)] if "accuracy" in content else []
    shares += [(f"Accuracy, {visible(kind)}", mapping(one)) for kind, one in mapping(content.get("by_kind")).items()]
    shares += [(label, mapping(content[key])) for key, label in SHARES if key in content]
    rows = [
        (label, show_estimate(estimate(one.get("accuracy"), one.get("ci"))), count(one.get("n")))
        for label, one in shares
    ]
    for key, label in GAINS:
        if key in content:
            one = mapping(content[key])
            gain = show_estimate(estimate(one.get("mean"), one.get("ci")), percent=False)
            rows.append((label, gain, count(one.get("n"))))
    if "length_correlation" in content:
        rows.append(
            ("Score and length, Spearman", show_number(number(content["length_correlation"]), percent=False), None)
        )
    if "calibration" in content:
        error = number(mapping(content["calibration"]).get("error"))
        rows.append(("Calibration error", show_number(error, percent=False), None))
    return Table(
        ("Check", "Result"),
        tuple((Cell(label, strong=True), _result(text, pairs)) for label, text, pairs in rows),
    )


def _result(text: str, pairs: int | None) -> Cell:
    if text == NOT_MEASURED:
        return Cell(text, tone="missing")
    return Cell(text, sub="" if pairs is None else f"n = {pairs}")


def _number_list(value: object) -> list[float]:
    """The list's numbers, or nothing if one of its entries is none."""
    entries = value if isinstance(value, Sequence) and not isinstance(value, str) else []
    found = [x for entry in entries if (x := number(entry)) is not None]
    return found if len(found) == len(entries) else []


def _histogram(content: Mapping[str, Any]) -> Any:
    histogram = mapping(content.get("margin_histogram"))
    edges, counts = _number_list(histogram.get("edges")), _number_list(histogram.get("counts"))
    return plots.histogram("Score margins", edges, counts, "score(chosen) − score(rejected), base-model sd")


def _calibration(content: Mapping[str, Any]) -> Any:
    """Bins with a predicted and an observed probability; empty bins are left out."""
    bins = mapping(content.get("calibration")).get("bins")
    rows = [mapping(entry) for entry in bins] if isinstance(bins, list) else []
    points = [(number(row.get("predicted")), number(row.get("observed")), number(row.get("n"))) for row in rows]
    full = [(p, o, n) for p, o, n in points if p is not None and o is not None and n]
    if not full:
        return None
    predicted, observed, sizes = zip(*full, strict=True)
    return plots.calibration(predicted, observed, sizes)
