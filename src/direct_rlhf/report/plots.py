"""Plots as inline SVG: small panels, text as text, one colour and one marker per arm.

matplotlib draws with sentinel colours, which become CSS variables, so that the page's light and dark themes reach into
the pictures. Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers tell arms apart in print.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from direct_rlhf.report.read import Estimate

INK, MUTED, GRID = "#1a1b1c", "#5a5b5c", "#dadbdc"  # sentinels: text, axes, grid
COLOURS = {
    "base": "#6f7378",
    "sft": "#e69f00",
    "sft_ppo": "#d55e00",
    "dpo": "#cc79a7",
    "direct_ppo": "#0072b2",
    "other_0": "#009e73",
    "other_1": "#56b4e9",
    "other_2": "#8c6bb1",
}
MARKERS = {"base": "s", "sft": "^", "sft_ppo": "v", "dpo": "D", "direct_ppo": "o"}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))  # one a run
PANEL = (3.8, 2.45)  # inches; a third of the desktop page, all of a phone's
WIDE = (7.8, 2.45)  # two panels and the gap between them
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a task called "$x" is no formula
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Line:
    """One line of a panel; ``run`` chooses the dashes. ``light`` marks a companion (a percentile, say).

    ``intervals`` are drawn as upright bars, one a point; None where a point has none.
    """

    arm: str
    x: Sequence[float]
    y: Sequence[float]
    run: int = 0
    markers: bool = False
    light: bool = False
    intervals: Sequence[tuple[float, float] | None] = ()


@dataclass(frozen=True)
class Profile:
    """One arm's values over tasks, turns or categories; None where it was not measured."""

    arm: str
    values: Sequence[float | None]
    run: int = 0


@dataclass(frozen=True)
class Bar:
    """One bar: an arm's estimate and its number as text; None draws words instead of a bar of length 0."""

    label: str
    arm: str
    estimate: Estimate | None
    text: str


def colour(arm: str) -> str:
    """The arm's own colour; names that are no known arm share three others by a stable choice."""
    return COLOURS.get(arm) or COLOURS[f"other_{sum(arm.encode()) % 3}"]


def colour_variable(arm: str) -> str:
    """The CSS variable that holds the arm's colour."""
    wanted = colour(arm)
    return next(name for name, value in css_variables().items() if value == wanted)


def css_variables() -> Mapping[str, str]:
    """CSS variable -> sentinel colour, for the style sheet's light theme."""
    named = {f"--arm-{name}": value for name, value in COLOURS.items()}
    return {"--ink": INK, "--muted": MUTED, "--grid": GRID, **named}


def draw(name: str, paint: Callable[[Figure], None], size: tuple[float, float] = PANEL) -> Markup:
    """Run ``paint`` on a fresh figure and return clean inline SVG; ``name`` says what it shows, for screen readers."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        with (
            warnings.catch_warnings()
        ):  # the reader's browser draws the text, with fonts that this machine need not have
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> Markup:
    """Cut what HTML does not need (prolog, metadata, global style, unused ids) and let CSS set size and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    for variable, value in css_variables().items():
        svg = svg.replace(value, f"var({variable})")
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    width = re.search(r'width="([\d.]+)pt"', opening)
    if box is None or width is None:
        raise ValueError(f"matplotlib's SVG opens without width or viewBox: {opening[:200]}")
    pixels = round(float(width[1]) * 96 / 72)
    label = Markup.escape(name)
    head = f'<svg class="plot" role="img" aria-label="{label}" {box[0]} style="max-width:{pixels * 4 // 3}px"'
    return Markup(f"{head}>{rest.strip()}")


def curves(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    zero: bool = False,
    level: float | None = None,
    level_label: str = "",
    x_label: str = "iteration",
    share: bool = False,
) -> Markup | None:
    """Lines over steps, or None if no line has a point. ``level`` draws a dashed reference line (a target, say)."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return None
    steps = [x for line in lines for x in line.x]
    apart = 0.015 * (max(steps) - min(steps))  # between lines with intervals, which would cover each other

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=unit)
        for place, line in enumerate(lines):
            shift = apart * (place - (len(lines) - 1) / 2) if line.intervals else 0.0
            at = [x + shift for x in line.x]
            axes.plot(at, line.y, **_line_style(line))
            bars = [(x, *ends) for x, ends in zip(at, line.intervals, strict=False) if ends is not None]
            if bars:
                axes.vlines(*zip(*bars, strict=True), color=colour(line.arm), linewidth=1.2, alpha=0.65)
        if level is not None:
            axes.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
            axes.annotate(
                level_label,
                (1, level),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                color=MUTED,
                fontsize=7,
            )
        if zero:
            axes.set_ylim(bottom=0)
        if share:
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        _whole_steps(axes)

    return draw(f"{title} ({unit}) by {x_label}", paint)


def _line_style(line: Line) -> dict[str, Any]:
    style: dict[str, Any] = {"color": colour(line.arm), "linestyle": DASHES[line.run % len(DASHES)]}
    if line.markers or len(line.x) == 1:
        style |= {"marker": MARKERS.get(line.arm, "P"), "markersize": 4.5}
    if line.light:
        style |= {"linewidth": 0.9, "alpha": 0.65}
    return style


def _whole_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def frontier(lines: Sequence[Line], saved: Sequence[tuple[float, float]] = ()) -> Markup | None:
    """Held-out reward against held-out KL, one point an evaluation; the last is filled, ``saved`` are ringed."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(
            title="KL-reward frontier",
            xlabel="held-out KL from the reference (nats per answer)",
            ylabel="held-out reward (normalised)",
        )
        for line in lines:
            axes.plot(line.x, line.y, markerfacecolor="none", **_line_style(line))
            axes.plot(line.x[-1:], line.y[-1:], marker=MARKERS.get(line.arm, "P"), markersize=8, color=colour(line.arm))
        for x, y in saved:
            axes.plot([x], [y], marker="o", markersize=13, markerfacecolor="none", markeredgecolor=INK)
        axes.margins(x=0.1, y=0.15)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0] if min(min(line.x) for line in lines) < 0 else 0.0))

    return draw("Held-out reward against held-out KL", paint, (4.4, 2.9))


def radar(
    tasks: Sequence[str], profiles: Sequence[Profile], *, what: str = "Score on each general task", percent: bool = True
) -> Markup | None:
    """Tasks or categories by arm, shares drawn on a scale from 0 to 100; or scores, from 0 to 10.

    A missing task breaks the line; it is never drawn as 0. Fewer than three tasks make no radar.
    """
    top, scale, unit = (100, 100, " %") if percent else (10, 1, "")
    profiles = [profile for profile in profiles if any(x is not None for x in profile.values)]
    if len(tasks) < 3 or not profiles:
        return None
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)

    def paint(figure: Figure) -> None:
        axes: Any = figure.add_subplot(projection="polar")
        axes.set_theta_offset(np.pi / 2)
        axes.set_theta_direction(-1)
        for one in profiles:
            points = [np.nan if x is None else scale * x for x in one.values]
            line = Line(one.arm, [*angles, angles[0]], [*points, points[0]], one.run, markers=True)
            axes.plot(line.x, line.y, **_line_style(line) | {"linewidth": 1.3, "markersize": 3.5})
        axes.set_ylim(0, top)
        ticks = [top / 4, top / 2, top * 3 / 4, top]
        axes.set_yticks(ticks, ["", f"{top // 2}", "", f"{top}{unit}"], fontsize=7, color=MUTED)
        axes.set_rlabel_position(180 / len(tasks))
        axes.set_xticks(angles, [shorten(task) for task in tasks], fontsize=8)
        for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
            side = np.sin(angle)
            text.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
        axes.spines["polar"].set_color(GRID)

    wide = (5.8, 3.7)  # names of tasks stand beside the circle
    return draw(f"{what} by arm, 0 to {top}{' per cent' if percent else ''}", paint, wide)


def bars(title: str, entries: Sequence[Bar], *, percent: bool = True, unit: str = "") -> Markup | None:
    """Horizontal bars from 0 with 95 % intervals, one an arm; None if nothing was measured."""
    if all(entry.estimate is None for entry in entries):
        return None
    scale = 100 if percent else 1

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(title=title, xlabel="per cent" if percent else unit)
        axes.grid(visible=False, axis="y")
        for row, entry in enumerate(entries):
            found = entry.estimate
            if found is None:
                axes.annotate(
                    entry.text,
                    (0, row),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    color=MUTED,
                )
                continue
            axes.barh(row, scale * found.value, height=0.62, color=colour(entry.arm))
            if found.low is not None and found.high is not None:
                axes.plot(
                    [scale * found.low, scale * found.high],
                    [row, row],
                    color=INK,
                    linewidth=1.2,
                    marker="|",
                    markersize=6,
                )
            end = scale * max(found.value, found.high if found.high is not None else found.value)
            axes.annotate(entry.text, (end, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7.5)
        axes.set_yticks(range(len(entries)), [shorten(entry.label, 24) for entry in entries])
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.set_xlim(0, 1.25 * axes.dataLim.x1 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        if percent and axes.get_xlim()[1] > 100:  # room for the numbers, but no share above 100 %
            axes.set_xticks([0, 25, 50, 75, 100])

    return draw(f"{title} by arm", paint, (PANEL[0], 0.95 + 0.27 * len(entries)))


def grouped_bars(
    title: str, groups: Sequence[str], profiles: Sequence[Profile], *, percent: bool = True, unit: str = ""
) -> Markup | None:
    """Bars from 0 grouped by turn or category, one colour an arm; a missing value leaves its place empty."""
    if not groups or all(x is None for profile in profiles for x in profile.values):
        return None
    scale, width = 100 if percent else 1, 0.8 / len(profiles)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(title=title, ylabel="per cent" if percent else unit)
        axes.grid(visible=False, axis="x")
        for index, one in enumerate(profiles):
            for group, x in enumerate(one.values):
                if x is not None:
                    middle = group - 0.4 + (index + 0.5) * width
                    axes.bar(middle, scale * x, width * 0.9, color=colour(one.arm), alpha=1 if one.run == 0 else 0.6)
        slanted = len(groups) > 4
        axes.set_xticks(
            range(len(groups)),
            [shorten(group, 18) for group in groups],
            rotation=25 if slanted else 0,
            ha="right" if slanted else "center",
            rotation_mode="anchor",
        )
        axes.set_ylim(bottom=0)

    return draw(f"{title} by arm", paint, WIDE if is_wide(groups, profiles) else PANEL)


def is_wide(groups: Sequence[str], profiles: Sequence[Profile]) -> bool:
    """Whether grouped bars need the room of two panels."""
    return len(groups) * len(profiles) > 12


def histogram(title: str, edges: Sequence[float], counts: Sequence[float], x_label: str) -> Markup | None:
    """Counts between ``edges``; bars left of 0 (the wrong order) are grey."""
    if len(edges) != len(counts) + 1 or not counts:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(title=title, xlabel=x_label, ylabel="pairs")
        for low, high, height in zip(edges[:-1], edges[1:], counts, strict=True):
            shade = COLOURS["base" if high <= 0 else "direct_ppo"]
            axes.bar(low, height, high - low, align="edge", color=shade, edgecolor="none", alpha=0.9)
        axes.axvline(0, color=INK, linewidth=1)
        axes.grid(visible=False, axis="x")

    return draw(title, paint)


def calibration(predicted: Sequence[float], observed: Sequence[float], sizes: Sequence[float]) -> Markup | None:
    """How often the likelier side was right against its predicted probability; a marker's area: its share of pairs."""
    if not predicted or not len(predicted) == len(observed) == len(sizes):
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(
            title="Calibration", xlabel="predicted probability of the likelier side", ylabel="share that was right"
        )
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axes.plot(predicted, observed, color=COLOURS["direct_ppo"], linewidth=1)
        area = 12 + 110 * np.asarray(sizes, dtype=float) / max(max(sizes), 1)
        axes.scatter(predicted, observed, s=area, color=COLOURS["direct_ppo"], zorder=3)
        axes.set_xlim(min(0.5, *predicted) - 0.02, 1.02)
        axes.set_ylim(min(0.5, *observed) - 0.06, 1.06)

    return draw("Calibration of the reward model", paint)


def shorten(text: str, limit: int = 20) -> str:
    """A label that fits: control characters gone, the middle cut."""
    text = "".join(c for c in text if c.isprintable()).replace("_", " ").strip() or "?"
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-(limit // 2 - 1) :]}"
