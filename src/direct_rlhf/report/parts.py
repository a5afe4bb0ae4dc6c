"""The pieces that a report page is made of, and how runs and arms become labelled series."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from direct_rlhf.report.plots import colour_variable
from direct_rlhf.report.read import ArmResults, RunData
from direct_rlhf.report.samples import visible
from direct_rlhf.report.words import arm_label


@dataclass(frozen=True)
class Cell:
    """One table cell. ``tone`` is "", "good", "bad", "none" (no difference shown) or "missing"."""

    text: str
    href: str | None = None
    sub: str = ""
    strong: bool = False
    tone: str = ""


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Picture:
    svg: Markup
    caption: str = ""
    wide: bool = False  # takes two places where there is room


@dataclass(frozen=True)
class Series:
    """One arm of one run, with the label that tells it apart from all others of the page."""

    run: RunData
    index: int  # of the run on this page
    arm: ArmResults
    label: str


def series_of(runs: Sequence[RunData]) -> list[Series]:
    return [
        Series(run, index, arm, stage_label(arm.name, index, runs))
        for index, run in enumerate(runs)
        for arm in run.arms
    ]


def stage_label(stage: str, index: int, runs: Sequence[RunData]) -> str:
    """The arm's label; with several runs, which run it is of stands before it."""
    label = visible(arm_label(stage))
    return label if len(runs) == 1 else f"{run_labels(runs)[index]} · {label}"


def run_labels(runs: Sequence[RunData]) -> list[str]:
    """Run names, made unique: by seed if that tells them apart, else by folder and number."""
    names = [visible(run.name) for run in runs]
    if len(set(names)) == len(names):
        return names
    seeds = [f"{name}, seed {run.seed}" for name, run in zip(names, runs, strict=True)]
    if len(set(seeds)) == len(seeds):
        return seeds
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


@dataclass(frozen=True)
class Legend:
    """One line of a legend: label, CSS variable of the colour, CSS border style."""

    label: str
    colour: str
    style: str


def legend(runs: Sequence[RunData], names: Callable[[RunData], Iterable[str]]) -> list[Legend]:
    """A legend of the stages or arms that ``names`` gives for each run."""
    styles = ("solid", "dashed", "dotted", "double")
    return [
        Legend(stage_label(name, index, runs), colour_variable(name), styles[index % len(styles)])
        for index, run in enumerate(runs)
        for name in names(run)
    ]


@dataclass(frozen=True)
class Links:
    """Relative links from the page to raw files. Colons are quoted, so a folder's name can be no URL scheme."""

    folder: Path  # where the page is written

    def to(self, run: RunData, name: str | None) -> str | None:
        """The link to file ``name`` of ``run``, or None where there is no such file."""
        if name is None or not (run.path / name).exists():
            return None
        relative = os.path.relpath((run.path / name).resolve(), self.folder.resolve())
        return quote(Path(relative).as_posix(), safe="/")
