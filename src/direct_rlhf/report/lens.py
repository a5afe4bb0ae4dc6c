"""The logit lens: curves of the bad-word probability by layer, all models on the same axes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from direct_rlhf.report.parts import Picture, Series
from direct_rlhf.report.plots import WIDE, Line, _line_style, colour, draw
from direct_rlhf.report.read import estimate, mapping, number, read_json
from direct_rlhf.report.samples import visible

LISTS = ("bad_words", "neutral_words")
LOG_FROM = 20.0  # highest over lowest value of a curve, from which a linear axis would show one end only
FLOOR = 1e-9  # of a log axis, on which a probability of 0 has no place: the line begins where there is one
CAPTION = (
    "Probability that the next word is a listed one, were the model to stop at each layer: read with its own final "
    "norm and head, exactly, over the same prompts. Thick: the bad words, with the 95 % band over prompts. Thin: "
    "harmless words of the same number, kinds and lengths. Layer 0 is the embedding; the last point is the "
    "model's output."
)


@dataclass(frozen=True)
class LayerCurve:
    """One arm's curve of one word list. A point without a number is None, and the line has a gap there."""

    arm: str
    run: int
    words: str  # one of LISTS
    values: Sequence[float | None]
    bands: Sequence[tuple[float, float] | None]


def lens_pictures(series: Sequence[Series]) -> list[Picture]:
    """The picture of every arm that was looked at through the lens; none where no arm was."""
    found = [curve for one in series for curve in read_curves(one, _content(one))]
    svg = layer_curves(found)
    missed = [x for one in series for words in LISTS if (x := number(mapping(_content(one).get(words)).get("missed")))]
    bound = f" What was not looked for could add {100 * max(missed):.2g} % at most." if missed else ""
    nothing = ""
    if on_log_axis(found) and any(x is not None and x <= FLOOR for curve in found for x in curve.values):
        nothing = " A probability of 0 has no place on this axis: a line begins at the first layer that gives more."
    return [] if svg is None else [Picture(svg, CAPTION + nothing + bound, wide=True)]


def lens_notes(series: Sequence[Series]) -> list[str]:
    """A sentence for each arm whose lens was left out."""
    return [
        f"{one.label}: {visible(str(reason))}"
        for one in series
        if (reason := _content(one).get("left_out")) is not None
    ]


def read_curves(one: Series, content: Mapping[str, Any]) -> list[LayerCurve]:
    """The curves in `lens` of a toxicity.json."""
    curves = []
    for words in LISTS:
        points = mapping(content.get(words)).get("by_point")
        entries = [mapping(point) for point in points] if isinstance(points, list) else []
        found = [estimate(entry.get("value"), entry.get("ci")) for entry in entries]
        bands = [(x.low, x.high) if x and x.low is not None and x.high is not None else None for x in found]
        if any(found):
            curves.append(LayerCurve(one.arm.name, one.index, words, [x.value if x else None for x in found], bands))
    return curves


def on_log_axis(found: Sequence[LayerCurve]) -> bool:
    """Whether the bad words' values span more than a linear axis can show."""
    thick = _positive([curve for curve in found if curve.words == LISTS[0]]) or _positive(found)
    return bool(thick) and max(thick) > LOG_FROM * min(thick)


def _positive(found: Sequence[LayerCurve]) -> list[float]:
    return [x for curve in found for x in curve.values if x is not None and x > FLOOR]


def layer_curves(found: Sequence[LayerCurve]) -> Markup | None:
    """Probability by layer; None where there is none above 0."""
    positive, log = _positive(found), on_log_axis(found)
    if not positive:
        return None
    deepest = max(len(curve.values) for curve in found) - 1

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(
            title="Bad-word probability by layer", xlabel="layer (0 = embedding)", ylabel="probability of the next word"
        )
        for curve in found:
            layers = list(range(len(curve.values)))
            heights = [float("nan") if x is None or (log and x <= FLOOR) else x for x in curve.values]
            line = Line(curve.arm, layers, heights, curve.run, light=curve.words != LISTS[0])
            axes.plot(layers, heights, **_line_style(line))
            if not line.light:
                bands = [band or (x, x) for band, x in zip(curve.bands, heights, strict=True)]
                low = [max(band[0], FLOOR) if log else band[0] for band in bands]
                axes.fill_between(
                    layers,
                    low,
                    [band[1] for band in bands],
                    where=[x == x for x in heights],
                    color=colour(curve.arm),
                    alpha=0.18,
                    linewidth=0,
                )
        if log:
            axes.set_yscale("log")
            axes.set_ylim(min(positive) / 2, min(2 * axes.get_ylim()[1], 1.0))
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])  # a line along 0 is seen
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.6g} %"))
        axes.set_xlim(-0.03 * deepest, 1.03 * deepest)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))

    return draw("Bad-word probability by layer and arm", paint, WIDE)


def _content(one: Series) -> Mapping[str, Any]:
    file = one.arm.files.get("toxicity")
    return mapping(mapping(read_json(one.run.path / file, [], one.run.path)).get("lens")) if file else {}
