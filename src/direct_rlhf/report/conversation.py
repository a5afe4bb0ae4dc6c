"""The conversation part of the report: what the judge is worth, scores by category and turn, arms side by side.

What is said of the judge stands above the scores: they are worth no more than it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from direct_rlhf.report import plots
from direct_rlhf.report.parts import Cell, Links, Picture, Series, Table, run_labels
from direct_rlhf.report.read import RunData, count, estimate, mapping, number, read_json
from direct_rlhf.report.samples import visible
from direct_rlhf.report.words import NOT_MEASURED, Judgement, arm_label, show_estimate, show_number

MISSING = Cell(NOT_MEASURED, tone="missing")
SHOWN_TO_THE_JUDGE = {  # key of conversation.json -> how it reads
    "none": "Questions without a reference answer",
    "given": "Questions with one, judged by it",
    "sound": "the same, without references reported wrong",
    "given_but_not_shown": "Questions with one, judged without it",
}
_IN_WORDS = {
    "higher": (Judgement.BETTER, "good"),
    "lower": (Judgement.WORSE, "bad"),
    "no difference shown": (Judgement.NONE_SHOWN, "none"),
    "not decided": (Judgement.UNDECIDED, "none"),
}


@dataclass(frozen=True)
class ConversationSection:
    """``checks`` are sentences on the judges; tables without rows and no pictures where nothing was measured."""

    checks: tuple[Cell, ...]
    scores: Table
    references: Table
    pairs: Table
    pictures: tuple[Picture, ...]


def conversation_section(runs: Sequence[RunData], series: Sequence[Series], links: Links) -> ConversationSection:
    """All of it, for the arms of ``series`` (of the runs, in the order of the page)."""
    contents = [_content(one) for one in series]
    return ConversationSection(
        check_lines(series, contents, links),
        score_table(series, contents, links),
        reference_table(series, contents, links),
        pair_table(runs, links),
        _radar(series, contents),
    )


def check_lines(series: Sequence[Series], contents: Sequence[Mapping[str, Any]], links: Links) -> tuple[Cell, ...]:
    """What each judge is worth, one sentence or two; a judge that was not checked is said to be so."""
    said: dict[str, Cell] = {}
    for one, content in zip(series, contents, strict=True):
        judge = content.get("judge")
        if not judge or judge == "scripted":  # rules, which are what they are
            continue
        check = mapping(content.get("self_check"))
        href = links.to(one.run, "evaluation/self_check/items.jsonl")
        name = visible(f"Judge: {judge}.")
        if not check:
            said.setdefault(name, Cell(f"{name} Whether it agrees with people was not checked.", tone="missing"))
        else:
            text, tone = _checked(check)
            said.setdefault(f"{name} {text}", Cell(f"{name} {text}", href=href, tone=tone))
    return tuple(said.values())


def _checked(check: Mapping[str, Any]) -> tuple[str, str]:
    found = estimate(check.get("agreement"), check.get("ci"))
    pairs, failed = count(check.get("n_scored")), count(check.get("n_failed")) or 0
    lost = f" {failed} pairs have no verdict." if failed else ""
    if found is None:
        return f"Too few of the human-labelled pairs were judged to say how far it agrees with people.{lost}", "bad"
    text = f"It agrees with people on {show_estimate(found)} of {pairs} pairs."
    if check.get("better_than_chance") is not True:
        text += " That is no better than chance: its scores say little about quality."
    rate = number(check.get("inconsistency_rate"))
    if rate is not None:
        text += f" With the order of the answers its verdict changed in {show_number(rate)} of them{_favoured(check)}."
    return text + lost, "" if check.get("better_than_chance") is True else "bad"


def _favoured(content: Mapping[str, Any]) -> str:
    """Which place was preferred where the orders disagreed."""
    favoured = mapping(content.get("favoured"))
    first, second = count(favoured.get("first")) or 0, count(favoured.get("second")) or 0
    if not first + second:
        return ""
    if first == second:
        return ", towards each place as often"
    place, often = ("first", first) if first > second else ("second", second)
    return f", {often} of {first + second} times towards the answer shown {place}"


def score_table(series: Sequence[Series], contents: Sequence[Mapping[str, Any]], links: Links) -> Table:
    """Categories by arms and turns, mean score with its interval."""
    columns = [
        (one, content, turn)
        for one, content in zip(series, contents, strict=True)
        for turn in sorted({turn for turns in _cells(content).values() for turn in turns})
    ]
    categories = sorted({category for content in contents for category in _cells(content)})
    rows = []
    for category in categories:
        cells = [Cell(visible(category or "no category"), strong=True)]
        for one, content, turn in columns:
            cell = mapping(mapping(_cells(content).get(category)).get(turn))
            cells.append(_score(cell, links.to(one.run, one.arm.files.get("conversation"))))
        rows.append(tuple(cells))
    return Table(("Category", *(visible(f"{one.label}, turn {turn}") for one, _, turn in columns)), tuple(rows))


def reference_table(series: Sequence[Series], contents: Sequence[Mapping[str, Any]], links: Links) -> Table:
    """Scores by what the judge was shown; no rows where no question has a reference answer."""
    parts = [mapping(content.get("by_reference")) for content in contents]
    rows = []
    for key, label in SHOWN_TO_THE_JUDGE.items():
        if not any(key in part for part in parts):
            continue
        cells = [Cell(label, strong=True)]
        for one, part in zip(series, parts, strict=True):
            cells.append(_score(mapping(part.get(key)), links.to(one.run, one.arm.files.get("conversation"))))
        rows.append(tuple(cells))
    return Table(("Judged", *(one.label for one in series)), tuple(rows))


def pair_table(runs: Sequence[RunData], links: Links) -> Table:
    """Arms side by side: win rate, and beside it how often the verdict hung on the order."""
    names = run_labels(runs)
    rows = []
    for index, run in enumerate(runs):
        file = run.path / "evaluation" / "pairwise.json"
        found = read_json(file, [], run.path) if file.exists() else []
        for row in map(mapping, found if isinstance(found, list) else []):
            label = f"{arm_label(str(row.get('arm')))} against {arm_label(str(row.get('against')))}"
            label = label if len(runs) == 1 else f"{names[index]} · {label}"
            href = links.to(run, "evaluation/pairwise.json")
            rate = estimate(row.get("win_rate"), row.get("ci"))
            words, tone = _IN_WORDS.get(str(row.get("verdict")), (Judgement.MISSING, "missing"))
            judged = Cell(words, tone=tone) if rate is not None else MISSING
            torn = estimate(row.get("inconsistency_rate"), row.get("inconsistency_ci"))
            games = ", ".join(
                f"{n} {word}" for word in ("wins", "ties", "losses") if (n := count(row.get(word))) is not None
            )
            failed = count(row.get("n_failed"))
            rows.append(
                (
                    Cell(visible(label), strong=True),
                    Cell(show_estimate(rate), href=href, sub=games) if rate is not None else MISSING,
                    judged,
                    Cell(show_estimate(torn), sub=_favoured(row).lstrip(", ")) if torn is not None else MISSING,
                    Cell("unknown", tone="missing") if failed is None else Cell(str(failed)),
                )
            )
    return Table(
        ("Arms", "Win rate [95 %], ties as half", "In words", "Verdict changed with the order", "Failed"), tuple(rows)
    )


def _radar(series: Sequence[Series], contents: Sequence[Mapping[str, Any]]) -> tuple[Picture, ...]:
    """Mean score by category; only where a judge gave scores by category and turn."""
    categories = sorted({category for content in contents for category in _cells(content)})
    profiles = [
        plots.Profile(one.arm.name, [one.arm.by_category.get(category) for category in categories], one.index)
        for one in series
    ]
    names = [visible(category) for category in categories]
    svg = plots.radar(names, profiles, what="Judged score by category", percent=False)
    return (
        ()
        if svg is None
        else (Picture(svg, "Mean score by category, both turns; a gap is one without enough verdicts."),)
    )


def _score(cell: Mapping[str, Any], href: str | None) -> Cell:
    """A mean score, its interval, and what it rests on."""
    scored, failed = count(cell.get("n_scored")), count(cell.get("n_failed"))
    counts = "" if scored is None else f"n = {scored}" + (f", {failed} failed" if failed else "")
    found = estimate(cell.get("value"), cell.get("ci"))
    if found is None:
        return Cell(NOT_MEASURED, sub=counts, tone="missing")
    return Cell(show_estimate(found, percent=False), href=href, sub=counts)


def _cells(content: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Category -> turn -> numbers."""
    return {str(category): mapping(turns) for category, turns in mapping(content.get("by_category_and_turn")).items()}


def _content(one: Series) -> Mapping[str, Any]:
    """The arm's conversation.json. What cannot be read is said by the reader of the run already."""
    name = one.arm.files.get("conversation")
    return mapping(read_json(one.run.path / name, [], one.run.path)) if name else {}
