"""The mixture of the training pairs, from its stage's record: how much of each kind, chosen how, at what conflict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from direct_rlhf.report.parts import Cell, Links, Table, run_labels
from direct_rlhf.report.read import RunData, count, estimate, mapping, number
from direct_rlhf.report.samples import visible
from direct_rlhf.report.words import NOT_MEASURED, show_estimate, show_number

NAMES = {
    "heuristic": "by shares",
    "reward_selected": "selected by reward models",
    "low_conflict": "without conflicts between reward models",
}
REASONS = {
    "below_min_margin": "at or below the least margin",
    "not_best": "not among the best",
    "disagrees": "on which the models do not agree with the label",
    "conflict": "in conflict",
    "not_drawn": "not drawn",
}
MISSING = Cell(NOT_MEASURED, tone="missing")


@dataclass(frozen=True)
class MixtureSection:
    title: str
    text: str
    href: str | None
    kinds: Table
    further: list[tuple[Table, str]]  # with a note above each


def mixtures(runs: Sequence[RunData], links: Links) -> list[MixtureSection]:
    """One section for each run that trained on a mixture."""
    labels = run_labels(runs) if len(runs) > 1 else [""] * len(runs)
    return [
        _section(mapping(run.stages["mixture"].get("facts")), label, links.to(run, "mixture.jsonl"))
        for run, label in zip(runs, labels, strict=True)
        if "mixture" in run.stages
    ]


def in_words(run: RunData) -> str:
    """How the pairs of the run were mixed, and how many of each kind; empty without a mixture."""
    facts = mapping(mapping(run.stages.get("mixture")).get("facts"))
    counts = [(kind, count(mapping(one).get("total"))) for kind, one in mapping(facts.get("kinds")).items()]
    pairs = ", ".join(f"{visible(kind)} {n:,}" for kind, n in counts if n is not None)
    return f"{NAMES.get(str(facts.get('type')), visible(facts.get('type')))}; pairs: {pairs}" if pairs else ""


def _section(facts: Mapping[str, Any], label: str, href: str | None) -> MixtureSection:
    how = NAMES.get(str(facts.get("type")), visible(facts.get("type")))
    title = f"Mixture {how}"
    return MixtureSection(
        title=f"{label} · {title}" if label else title,
        text=" ".join(_sentences(facts)),
        href=href,
        kinds=_kinds(facts),
        further=[(table, note) for table, note in (_models(facts), _conflicts(facts), _gates(facts)) if table.rows],
    )


def _sentences(facts: Mapping[str, Any]) -> list[str]:
    pairs, lengths = mapping(facts.get("pairs")), mapping(facts.get("lengths"))
    before, after = count(pairs.get("before")), count(pairs.get("after"))
    if before is None or after is None:
        return ["What the mixture holds is not recorded."]
    said = [f"Trained on {after:,} pairs, from {before:,} different ones."]
    reasons = [
        f"{n:,} {REASONS.get(str(name), visible(name))}"
        for name, value in mapping(facts.get("reasons")).items()
        if (n := count(value))
    ]
    said += [f"Left out: {', '.join(reasons)}."] if reasons else []
    means = [
        f"{words} {chosen:.1f} / {rejected:.1f}"
        for key, words in (("kept", "in the mixture"), ("dropped", "left out"))
        for one in [mapping(lengths.get(key))]
        if (chosen := number(one.get("chosen"))) is not None and (rejected := number(one.get("rejected"))) is not None
    ]
    said += [f"Mean length of chosen / rejected answers in tokens: {', '.join(means)}."] if means else []
    alike = number(mapping(facts.get("agreement")).get("decision"))
    said += (
        [] if alike is None else [f"Reward models of another seed decide alike on {show_number(alike)} of the pairs."]
    )
    return said


def _kinds(facts: Mapping[str, Any]) -> Table:
    columns = (
        *("Kind", "Pairs", "Selected", "Used", "Used, with repeats", "Share", "Most uses of a pair"),
        "Effective number",
    )
    rows = []
    for kind, value in mapping(facts.get("kinds")).items():
        one = mapping(value)
        counts = [_count(one.get(key)) for key in ("pairs", "selected", "used", "total")]
        effective = number(one.get("effective"))
        last = MISSING if effective is None else Cell(f"{effective:,.0f}")
        rows.append(
            (Cell(visible(kind), strong=True), *counts, _share(one.get("share")), _count(one.get("most")), last)
        )
    return Table(columns, tuple(rows))


def _models(facts: Mapping[str, Any]) -> tuple[Table, str]:
    """The kinds' reward models: fitness, which labels they agree with, and how far a second seed agrees."""
    cards, right = mapping(facts.get("objectives")), mapping(facts.get("right"))
    side = mapping(mapping(facts.get("agreement")).get("side"))
    rows = []
    for kind, value in cards.items():
        card = mapping(value)
        accuracy = show_estimate(estimate(card.get("accuracy"), card.get("ci")))
        n = count(card.get("n"))
        agrees = [_share(mapping(right.get(kind)).get(other)) for other in cards]
        rows.append(
            (
                Cell(visible(kind), strong=True, sub="given" if card.get("given") is True else ""),
                Cell(visible(card["verdict"])) if card.get("verdict") else MISSING,
                Cell(accuracy, sub="" if n is None else f"n = {n}") if n else MISSING,
                *agrees,
                *([_share(side.get(kind))] if side else []),
            )
        )
    columns = ("Reward model of", "Fitness", "Held-out accuracy", *(f"Right on {visible(kind)}" for kind in cards))
    note = "The kinds' reward models. “Right on”: share of a kind's training pairs that the model orders as labelled."
    if side:
        note += " “Two seeds”: share of the pairs whose margin is on the same side of ±delta with another seed."
    return Table((*columns, *(["Two seeds"] if side else [])), tuple(rows)), note


def _conflicts(facts: Mapping[str, Any]) -> tuple[Table, str]:
    """The conflict of every two kinds, before and after."""
    found = mapping(facts.get("conflicts"))
    names = found.get("kinds")
    kinds = [visible(kind) for kind in names] if isinstance(names, list) else []
    before, after = found.get("before"), found.get("after")
    rows = [
        (
            Cell(kind, strong=True),
            *(
                Cell("") if column == row else Cell(f"{_at(before, row, column)} → {_at(after, row, column)}")
                for column in range(len(kinds))
            ),
        )
        for row, kind in enumerate(kinds)
    ]
    delta = show_number(number(found.get("delta")), percent=False)
    note = (
        "Conflict, before → in the mixture: share of the pairs that one kind's model favours and the other's opposes, "
        f"each by more than delta = {delta}."
    )
    return Table(("", *kinds), tuple(rows)), note


def _gates(facts: Mapping[str, Any]) -> tuple[Table, str]:
    gates = mapping(facts.get("gates"))
    rows = tuple(
        (Cell(visible(kind), strong=True), *(_share(mapping(gate).get(other)) for other in gates))
        for kind, gate in gates.items()
    )
    columns = ("Pairs of kind", *(visible(kind) for kind in gates))
    return Table(columns, rows), "Gate: the weight of each kind's model in the margin that decides."


def _at(matrix: object, row: int, column: int) -> str:
    try:
        found = number(matrix[row][column])  # type: ignore[index]
    except (TypeError, IndexError, KeyError):
        found = None
    return show_number(found)


def _share(value: object) -> Cell:
    found = number(value)
    return MISSING if found is None else Cell(show_number(found))


def _count(value: object) -> Cell:
    found = count(value)
    return MISSING if found is None else Cell(f"{found:,}")
