"""The page of a study of helpful, honest and harmless, from the `three_h.json` of one run or of several seeds.

One run: values with their 95 % intervals over questions. Several: means over the runs, with the 95 % interval of
Student's t over them (of differences: paired by run), which is wide for few runs and honest about what varies.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from scipy.special import stdtrit

from direct_rlhf.report import plots
from direct_rlhf.report.parts import Cell, Links, Picture, Table
from direct_rlhf.report.read import Difference, Estimate, RunData, estimate, mapping, number, read_json
from direct_rlhf.report.samples import visible
from direct_rlhf.report.sections import MISSING, TONES
from direct_rlhf.report.words import Judgement, judge, show_estimate

FILE = "three_h.json"
MEAN, WORST, GENERAL = "mean", "worst", "general"
ROUTES = {"base": "base", "expert": "expert", "mixture": "data mixture", "merge": "merge"}
PARADIGMS = {"dpo": "DPO", "direct_ppo": "direct PPO"}
R_TSVM, TSV_M = "r_tsvm", "tsv_m"
OWN_READING = "R-TSVM is this project's own reading of its paper's abstract."


@dataclass(frozen=True)
class Study:
    """The tables of all runs of a page. Models are those of the first; a run without one of them leaves it out."""

    runs: tuple[RunData, ...]
    tables: tuple[Mapping[str, Any], ...]

    @property
    def kinds(self) -> list[str]:
        return [str(kind) for kind in self.tables[0].get("kinds", [])]

    @property
    def paradigms(self) -> list[str]:
        return [str(name) for name in self.tables[0].get("paradigms", [])]

    def models(self, paradigm: str, *routes: str) -> list[str]:
        """Names, without those that repeat another with other masks."""
        return [
            str(one["name"])
            for one in self.tables[0].get("models", [])
            if one.get("route") in routes and one.get("paradigm") in ("", paradigm) and not one.get("masks_of")
        ]

    def of(self, name: str) -> list[Mapping[str, Any]]:
        """The model in each run that has it."""
        return [one for table in self.tables for one in table.get("models", []) if one.get("name") == name]

    def masks(self, name: str) -> list[float]:
        """Means of the same merge with other random masks, of all runs."""
        models = [one for table in self.tables for one in table.get("models", [])]
        values = [number(mapping(one.get(MEAN)).get("value")) for one in models if one.get("masks_of") == name]
        return [x for x in values if x is not None]

    def value(self, name: str, metric: str) -> Estimate | None:
        """One metric of one model: an H, the mean, the worst H or the general mean."""
        return over_runs([_value(one, metric) for one in self.of(name)])

    def difference(self, arm: str, against: str, metric: str) -> Difference | None:
        """Of one run: paired over its questions. Of several: of their values, paired by run, in all that have both."""
        if len(self.tables) == 1:
            return _row(self.tables[0], arm, against, metric)
        pairs = [tuple(self._in(table, name, metric) for name in (arm, against)) for table in self.tables]
        values = [ours.value - theirs.value for ours, theirs in pairs if ours and theirs]
        merged = over_runs([Estimate(value) for value in values]) if len(values) > 1 else None
        if merged is None:
            return None
        return Difference(arm, against, metric, merged.value, merged.low, merged.high, len(values))

    @staticmethod
    def _in(table: Mapping[str, Any], name: str, metric: str) -> Estimate | None:
        models = (one for one in table.get("models", []) if one.get("name") == name)
        return next((_value(one, metric) for one in models), None)


def read_study(runs: Sequence[RunData]) -> Study | None:
    """The study that the runs are; None if one of them is none."""
    problems: list[str] = []
    tables = [mapping(read_json(run.path / FILE, problems, run.path)) for run in runs if (run.path / FILE).exists()]
    return Study(tuple(runs), tuple(tables)) if len(tables) == len(runs) and all(tables) else None


def over_runs(found: Sequence[Estimate | None]) -> Estimate | None:
    """The one estimate there is, or the mean over runs with the interval of Student's t."""
    values = [one.value for one in found if one is not None]
    if len(found) == 1 or not values:
        return found[0] if found else None
    if len(values) == 1:
        return Estimate(values[0])
    half = student_95(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean(values), mean(values) - half, mean(values) + half)


def student_95(freedom: int) -> float:
    """97.5 % quantile of Student's t."""
    return float(stdtrit(freedom, 0.975))


def _value(one: Mapping[str, Any], metric: str) -> Estimate | None:
    by_kind = mapping(one.get("by_kind"))
    if metric == WORST:
        metric = str(one.get(WORST))
    found = mapping(by_kind.get(metric) if metric in by_kind else one.get(metric))
    return estimate(found.get("value"), found.get("ci"))


def _row(table: Mapping[str, Any], arm: str, against: str, metric: str) -> Difference | None:
    for row in table.get("differences", []):
        if (row.get("arm"), row.get("against"), row.get("metric")) == (arm, against, metric):
            low, high = row.get("ci") or (None, None)
            decided = row.get("verdict") != "not decided"
            return Difference(
                arm, against, metric, number(row.get("difference")), low, high, row.get("n"), row.get("n_dropped"),
                decided, row.get("p_holm"),
            )  # fmt: skip
    return None


# What the page shows


def page(study: Study, links: Links) -> dict[str, Any]:
    return {
        "study": [_paradigm(study, paradigm, links) for paradigm in study.paradigms],
        "several_runs": len(study.runs),
        "own_reading": OWN_READING,
        "marks": legend_marks(),
    }


def _paradigm(study: Study, paradigm: str, links: Links) -> dict[str, Any]:
    return {
        "label": PARADIGMS.get(paradigm, visible(paradigm)),
        "name": paradigm,
        "claims": claims(study, paradigm),
        "table": balance_table(study, paradigm, links),
        "pictures": pictures(study, paradigm),
        "effects": effects_table(study, paradigm),
        "vectors": vectors_table(study, paradigm),
        "tsvm": against_table(study, paradigm, R_TSVM, ("merge", "mixture")),
        "ablation": ablation_table(study, paradigm),
        "costs": costs_table(study, paradigm),
    }


def label(study: Study, name: str) -> str:
    one = study.of(name)[0] if study.of(name) else {}
    return visible(str(one.get("title") or name).replace("_", " "))


def chosen(study: Study, paradigm: str, route: str, *, but: str = "") -> str | None:
    """The model of a route with the best score on the validation questions, in the mean over the runs."""
    best: tuple[float, str] | None = None
    for name in study.models(paradigm, route):
        if name == but:
            continue
        values = [x for one in study.of(name) if (x := number(one.get("validation"))) is not None]
        if values and (best is None or mean(values) > best[0]):
            best = (mean(values), name)
    return best[1] if best else None


def by_method(study: Study, paradigm: str, method: str) -> str | None:
    """The merge by this method."""
    found = (
        name
        for name in study.models(paradigm, "merge")
        if mapping(study.of(name)[0].get("settings")).get("method") == method
    )
    return next(found, None)


@dataclass(frozen=True)
class Claim:
    question: str
    judgement: str
    tone: str
    sentence: str


def claims(study: Study, paradigm: str) -> list[Claim]:
    """The papers' two claims, each judged by paired differences on the test questions."""
    merge, mixture, tsvm = (
        chosen(study, paradigm, "merge"),
        chosen(study, paradigm, "mixture"),
        by_method(study, paradigm, R_TSVM),
    )
    found = []
    if merge and mixture:
        found.append(_claim(study, "Does merging balance better than mixing?", merge, mixture))
    if tsvm and mixture and tsvm != merge:
        found.append(_claim(study, "Does R-TSVM balance better than mixing?", tsvm, mixture))
    if tsvm and (other := chosen(study, paradigm, "merge", but=tsvm)):
        found.append(_claim(study, "Does R-TSVM beat the best other merge?", tsvm, other))
    if tsvm and (plain := by_method(study, paradigm, TSV_M)):
        found.append(_claim(study, "Does R-TSVM beat plain TSV-M?", tsvm, plain))
    return found


def _claim(study: Study, question: str, arm: str, against: str) -> Claim:
    difference = study.difference(arm, against, MEAN)
    judgement = judge(difference, True)
    worst = study.difference(arm, against, WORST)
    theirs = study.value(against, MEAN)
    share = ""
    if difference and difference.difference is not None and theirs and theirs.value:
        share = f" ({_signed(100 * difference.difference / theirs.value, 1)} %)"
    sentence = (
        f"{label(study, arm)} against {label(study, against)}: mean of the H's {_difference(difference)}{share}, "
        f"worst H {_difference(worst)}."
    )
    return Claim(question, str(judgement), TONES[judgement], sentence)


def _signed(x: float, digits: int = 2) -> str:
    return f"{x:+.{digits}f}".replace("-", "−")


def _difference(found: Difference | None) -> str:
    if found is None or found.difference is None:
        return "not measured"
    ends = "" if found.low is None or found.high is None else f" [{_signed(found.low)}, {_signed(found.high)}]"
    return _signed(found.difference) + ends


def balance_table(study: Study, paradigm: str, links: Links) -> Table:
    """Every route: each H, their mean, the worst, the general mean; settings and mask draws below the name."""
    columns = ("Model", *(visible(kind) for kind in study.kinds), "Mean", "Worst H", "General")
    rows = []
    for name in study.models(paradigm, "base", "expert", "mixture", "merge"):
        one = study.of(name)[0]
        href = links.to(study.runs[0], f"evaluation/{name}/conversation.json")
        route = ROUTES.get(str(one.get("route")), "")
        below = _below(study, name)
        sub = f"{route}: {below}" if below else route
        cells = [Cell(label(study, name), sub=sub if one.get("route") != "base" else "", strong=True)]
        cells += [_cell(study.value(name, metric), href) for metric in (*study.kinds, MEAN)]
        worst = _cell(study.value(name, WORST), href)
        kinds = sorted({visible(str(run.get(WORST))) for run in study.of(name)})
        cells += [Cell(worst.text, worst.href, sub=", ".join(kinds), tone=worst.tone)]
        general = study.value(name, GENERAL)
        file = links.to(study.runs[0], f"evaluation/{name}/general.json")
        cells.append(Cell(show_estimate(general, True), href=file) if general else MISSING)
        rows.append(tuple(cells))
    return Table(columns, tuple(rows))


def _cell(found: Estimate | None, href: str | None) -> Cell:
    return Cell(show_estimate(found, False), href=href) if found else MISSING


def _below(study: Study, name: str) -> str:
    settings = {
        ", ".join(f"{key} {_plain(value)}" for key, value in mapping(one.get("settings")).items() if key != "method")
        for one in study.of(name)
    }
    text = " / ".join(sorted(settings - {""}))
    masks = study.masks(name)
    own = [x for one in study.of(name) if (x := number(mapping(one.get(MEAN)).get("value"))) is not None]
    if masks:
        every = [*own, *masks]
        text += f"; {len(every)} mask draws {min(every):.2f}–{max(every):.2f}"
    return visible(text.strip("; "))


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def effects_table(study: Study, paradigm: str) -> Table:
    """What training for one H does to the others: each expert against the base."""
    rows = []
    for name in study.models(paradigm, "expert"):
        cells = [Cell(f"trained for {label(study, name)}", strong=True)]
        for metric in (*study.kinds, MEAN):
            found = study.difference(name, "base", metric)
            judgement = judge(found, True)
            tone = TONES[judgement] if judgement in (Judgement.BETTER, Judgement.WORSE) else ""
            cells.append(Cell(_difference(found), tone=tone or ("missing" if found is None else "")))
        rows.append(tuple(cells))
    return Table(("Expert", *(visible(kind) for kind in study.kinds), "Mean"), tuple(rows))


def vectors_table(study: Study, paradigm: str) -> Table:
    """How alike the experts' task vectors are."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for table in study.tables:
        for pair in mapping(mapping(table.get("conflicts")).get(paradigm)).get("pairs", []):
            found.setdefault(tuple(pair["kinds"]), []).append(pair)
    rows = [
        (
            Cell(f"{visible(a)} and {visible(b)}", strong=True),
            _cell(over_runs([estimate(pair.get("cosine"), None) for pair in pairs]), None),
            _percent(over_runs([estimate(pair.get("sign_conflict"), None) for pair in pairs])),
        )
        for (a, b), pairs in found.items()
    ]
    return Table(("Task vectors of", "Cosine", "Entries of opposite sign"), tuple(rows))


def _percent(found: Estimate | None) -> Cell:
    return Cell(show_estimate(found, True)) if found else MISSING


def against_table(study: Study, paradigm: str, method: str, routes: Sequence[str]) -> Table:
    """One merge against all others of these routes, Holm's correction within a route (single runs)."""
    arm = by_method(study, paradigm, method)
    rows = []
    for name in study.models(paradigm, *routes) if arm else []:
        found = study.difference(str(arm), name, MEAN)
        if name == arm or found is None:
            continue
        judgement = judge(found, True)
        cells = [Cell(label(study, name), strong=True), Cell(ROUTES[str(study.of(name)[0].get("route"))])]
        cells += [Cell(_difference(study.difference(str(arm), name, metric))) for metric in (*study.kinds, MEAN, WORST)]
        rows.append((*cells, Cell(str(judgement), tone=TONES[judgement])))
    columns = ("Against", "Route", *(visible(kind) for kind in study.kinds), "Mean", "Worst H", "In words (mean)")
    return Table(columns, tuple(rows))


def ablation_table(study: Study, paradigm: str) -> Table:
    names = study.models(paradigm, "ablation")
    rows = []
    for name in names:
        cells = [Cell(label(study, name), sub=_below(study, name), strong=True)]
        cells += [_cell(study.value(name, metric), None) for metric in (*study.kinds, MEAN, WORST)]
        cells.append(
            Cell("the one compared with" if name == names[0] else _difference(study.difference(name, names[0], MEAN)))
        )
        rows.append(tuple(cells))
    columns = ("Variant", *(visible(kind) for kind in study.kinds), "Mean", "Worst H", "Mean against the first")
    return Table(columns, tuple(rows))


def costs_table(study: Study, paradigm: str) -> Table:
    """Seconds by route: training, and for merges what the search took (of the first run, or means over runs)."""
    costs = [mapping(mapping(table.get("costs")).get(paradigm)) for table in study.tables]

    def seconds(*keys: str) -> float:
        values = [x for cost in costs if (x := number(_inside(cost, keys))) is not None]
        return mean(values) if values else 0.0

    rows = []
    for title in mapping(costs[0].get("mixtures")):
        train = sum(seconds("mixtures", title, part) for part in ("train", "objectives"))
        rows.append(_cost_row(f"mixture {title}", train, None, None))
    for name in study.models(paradigm, "merge"):
        tries, merge, measure = (seconds("merges", name, part) for part in ("tries", "merge", "measure"))
        rows.append(_cost_row(f"merge {label(study, name)}", seconds("experts", "train"), tries, (merge, measure)))
    return Table(("Route", "Training", "Settings tried", "Merging them", "Measuring them"), tuple(rows))


def _inside(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        value = mapping(value).get(key)
    return value


def _cost_row(title: str, train: float, tries: float | None, searching: tuple[float, float] | None) -> tuple[Cell, ...]:
    cells = [Cell(visible(title), strong=True), Cell(f"{train:.0f} s")]
    cells.append(Cell("–" if tries is None else f"{tries:.0f}"))
    return (*cells, *(Cell(f"{x:.1f} s") for x in searching)) if searching else (*cells, Cell("–"), Cell("–"))


# Pictures


@dataclass(frozen=True)
class Point:
    """One model in a plane of two scores."""

    label: str
    route: str
    x: float
    y: float


COLOUR_OF = {"base": "base", "expert": "sft", "mixture": "dpo", "merge": "direct_ppo"}
MARKER_OF = {"base": "s", "expert": "^", "mixture": "D", "merge": "o"}


def pictures(study: Study, paradigm: str) -> list[Picture]:
    """Every two H's against each other, and the mean against the worst H."""
    kinds = study.kinds
    planes = [(a, b) for at, a in enumerate(kinds) for b in kinds[at + 1 :]] + [(MEAN, WORST)]
    found = []
    for x, y in planes:
        points = [
            Point(label(study, name), str(study.of(name)[0].get("route")), one.value, other.value)
            for name in study.models(paradigm, "base", "expert", "mixture", "merge")
            if (one := study.value(name, x)) and (other := study.value(name, y))
        ]
        if points:
            found.append(Picture(pareto(points, _axis(x), _axis(y)), ""))
    return found


def _axis(metric: str) -> str:
    return {MEAN: "mean of the H's", WORST: "worst H"}.get(metric, visible(metric))


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other is at least as good as in both and better in one."""
    points = list(points)
    return [
        one
        for one in points
        if not any(other.x >= one.x and other.y >= one.y and (other.x > one.x or other.y > one.y) for other in points)
    ]


def pareto(points: Sequence[Point], x: str, y: str) -> Markup:
    """A scatter by route; the front is joined and named."""
    best = sorted(front(points), key=lambda point: (point.x, -point.y))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(title=f"{x} and {y}", xlabel=f"{x} (1 to 10)", ylabel=f"{y} (1 to 10)")
        axes.step([p.x for p in best], [p.y for p in best], where="post", color=plots.MUTED, linewidth=0.9, alpha=0.7)
        for point in points:
            axes.plot(
                point.x,
                point.y,
                marker=MARKER_OF.get(point.route, "o"),
                color=plots.colour(COLOUR_OF.get(point.route, "base")),
                markersize=6 if point in best else 4.5,
                alpha=1.0 if point in best else 0.7,
                linestyle="none",
            )
        for place, point in enumerate(best):
            axes.annotate(
                plots.shorten(point.label, 18),
                (point.x, point.y),
                xytext=(4, 4 if place % 2 else -9),
                textcoords="offset points",
                fontsize=6.5,
            )
        axes.margins(x=0.15, y=0.15)

    return plots.draw(f"{x} against {y}, by route", paint, (4.4, 3.2))


def legend_marks() -> list[tuple[str, str, str]]:
    """(label, CSS variable, CSS class) of each route."""
    shapes = {"s": "square", "^": "triangle", "D": "diamond", "o": "disc"}
    return [(ROUTES[route], plots.colour_variable(name), shapes[MARKER_OF[route]]) for route, name in COLOUR_OF.items()]
