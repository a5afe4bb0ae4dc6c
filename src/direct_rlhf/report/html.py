"""The report: one HTML file that carries all it needs and runs nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from direct_rlhf import __version__
from direct_rlhf.errors import ConfigError
from direct_rlhf.report import fitness, lens, mixture, plots, sections, three_h, training
from direct_rlhf.report.conversation import conversation_section
from direct_rlhf.report.parts import Links, Picture, Series, legend, run_labels, series_of
from direct_rlhf.report.read import RunData, mapping, read_run
from direct_rlhf.report.samples import SideBySide, side_by_side, visible
from direct_rlhf.report.words import (
    BY_KEY,
    HEADLINES,
    RATE_KEYS,
    arm_label,
    headline_arm,
    is_miniature,
    reference_label,
    show_number,
    verdicts,
)
from direct_rlhf.run.atomic import write_atomic


def write_report(runs: Sequence[Path], out: Path | None = None, *, redact_samples: bool = False) -> Path:
    """Write the report of one run (`report.html` in it) or of several (`comparison.html` beside the first).

    ``redact_samples`` leaves every model answer and prompt out. Errors: DataError if a folder is no run directory,
    ConfigError if none is given.
    """
    if not runs:
        raise ConfigError("report: no run directory was given; name at least one, such as runs/quickstart")
    if out is None:
        out = runs[0] / "report.html" if len(runs) == 1 else runs[0].resolve().parent / "comparison.html"
    page = render([read_run(path) for path in runs], Links(out.parent), redact_samples=redact_samples)
    write_atomic(out, page.encode("utf-8", "replace"))
    return out


def render(runs: Sequence[RunData], links: Links, *, redact_samples: bool = False) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("direct_rlhf.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["colour_variable"] = plots.colour_variable
    study = three_h.read_study(runs)
    if study is not None:
        return environment.get_template("three_h.html.j2").render(_frame(runs, links) | three_h.page(study, links))
    return environment.get_template("report.html.j2").render(_frame(runs, links) | _page(runs, links, redact_samples))


def _frame(runs: Sequence[RunData], links: Links) -> dict[str, Any]:
    """What stands at the head and the foot of every page."""
    return {
        "version": __version__,
        "title": " and ".join(run_labels(runs)) if len(runs) < 4 else f"{len(runs)} runs",
        "colours": _css(),
        "facts": [(label, _head_facts(run)) for label, run in zip(run_labels(runs), runs, strict=True)],
        "unfinished": [line for run in runs for line in _unfinished(run)],
        "miniature": any(is_miniature(run) for run in runs),
        "several": len(runs) > 1,
        "stages": sections.stage_table(runs, links),
        "reproduce": [_reproduce(label, run, links) for label, run in zip(run_labels(runs), runs, strict=True)],
    }


def _page(runs: Sequence[RunData], links: Links, redact_samples: bool) -> dict[str, Any]:
    series = series_of(runs)
    single = runs[0] if len(runs) == 1 else None
    arm = headline_arm(single) if single else None
    comparisons, further = sections.comparison_tables(runs, links)
    return {
        "headline": visible(arm_label(arm)) if arm else None,
        "reference": visible(reference_label(single)) if single else "the base",
        "verdicts": [(one, sections.TONES[one.judgement]) for one in verdicts(single, arm)] if single and arm else [],
        "verdict_table": sections.verdict_table(series),
        "legend": legend(runs, lambda run: [arm.name for arm in run.arms]),
        "training_legend": legend(
            runs, lambda run: [name for name, rows in run.metrics.items() if training.is_rl(rows)]
        ),
        "arms": sections.arm_table(series, links),
        "metrics": HEADLINES,
        "comparisons": comparisons,
        "further_comparisons": further,
        "trained": not all(map(_only_measured, runs)),
        "curves": training.main_curves(runs),
        "more_curves": training.more_curves(runs),
        "alerts": training.alerts(runs),
        "guard": training.guard_lines(runs),
        "metric_files": _files(runs, "metrics.jsonl", links),
        "frontier": training.frontier(runs),
        "general": _pictures(
            [(_radar(series), "Each task from 0 to 100 per cent; a gap is a task that was not measured.")]
        ),
        "tasks": sections.task_table(series, links),
        "conversation": _conversation(series),
        "judged": conversation_section(runs, series, links),
        "toxicity": _pictures([(_bars(series, key), BY_KEY[key].note) for key in RATE_KEYS]),
        "lens": lens.lens_pictures(series),
        "lens_notes": lens.lens_notes(series),
        "further_toxicity": sections.further_toxicity_table(series, links),
        "classifiers": sorted({one.arm.classifier for one in series if one.arm.classifier}),
        "fitness": fitness.cards(runs, links),
        "ending_curves": training.ending_curves(runs),
        "lengths": sections.length_table(series, links),
        "redacted": redact_samples,
        "samples": [] if redact_samples else [_samples(run, links) for run in runs],
        "missing": [line for label, run in _named(runs) for line in sections.not_measured(run, label)],
        "data": sections.data_table(runs, links),
        "overlap": sections.overlap_lines(runs, links),
        "mixtures": mixture.mixtures(runs, links),
    }


def _only_measured(run: RunData) -> bool:
    """Whether the run is an evaluation of models that were not trained in it."""
    return bool(run.stages) and all(name.startswith(("evaluation-", "report")) for name in run.stages)


def _named(runs: Sequence[RunData]) -> Iterable[tuple[str, RunData]]:
    return zip(run_labels(runs) if len(runs) > 1 else [""], runs, strict=True)


def _css() -> Markup:
    return Markup("; ".join(f"{name}: {value}" for name, value in plots.css_variables().items()))


def _head_facts(run: RunData) -> list[tuple[str, str]]:
    model = mapping(run.recipe.get("model")).get("base")
    found = {
        "Run": run.name,
        "Base model": model,
        "Date": _date(run.manifest.get("started")),
        "Seed": run.seed,
        "Recipe": run.recipe_sha256[:12] if run.recipe_sha256 else None,
    }
    return [(name, visible("not recorded" if value is None else value)) for name, value in found.items()]


def _date(started: object) -> str | None:
    """`2031-02-03T04:05:06+00:00` as `2031-02-03 04:05 UTC`; another form as it is."""
    text = str(started or "")
    return f"{text[:10]} {text[11:16]} UTC" if text.endswith("+00:00") else text or None


def _unfinished(run: RunData) -> list[str]:
    """A sentence if the run's last attempt ended badly. (While the run itself writes its report, it is `running`.)"""
    if run.status.get("exit_code") in (None, 0):
        return []
    reason = f" ({run.status['reason']})" if run.status.get("reason") else ""
    return [
        visible(f"{run.name}: the last attempt ended as “{run.status.get('state')}”{reason}. Results may be partial.")
    ]


def _files(runs: Sequence[RunData], name: str, links: Links) -> list[tuple[str, str]]:
    found = [(label, links.to(run, name)) for label, run in zip(run_labels(runs), runs, strict=True)]
    return [(f"{label}/{name}" if len(runs) > 1 else name, href) for label, href in found if href]


def _pictures(found: Iterable[tuple[Markup | None, str]]) -> list[Picture]:
    return [Picture(svg, caption) for svg, caption in found if svg is not None]


def _radar(series: Sequence[Series]) -> Markup | None:
    """Tasks whose values are shares; another unit (perplexity, say) has no place on a scale to 100."""
    names = [
        name
        for name in sections.task_names(series)
        if all(0 <= x <= 1 for one in series if (x := _task_value(one, name)) is not None)
    ]
    profiles = [plots.Profile(one.arm.name, [_task_value(one, name) for name in names], one.index) for one in series]
    prefix = sections.common_prefix(names)
    return plots.radar([name.removeprefix(prefix) for name in names], profiles)


def _task_value(one: Series, name: str) -> float | None:
    return next((task.value for task in one.arm.tasks if task.name == name), None)


def _bars(series: Sequence[Series], key: str) -> Markup | None:
    metric = BY_KEY[key]
    found = [(one, one.arm.metric(key)) for one in series]
    entries = [
        plots.Bar(one.label, one.arm.name, x, show_number(x.value if x else None, metric.percent)) for one, x in found
    ]
    return plots.bars(metric.label, entries, percent=metric.percent)


def _conversation(series: Sequence[Series]) -> list[Picture]:
    percent = BY_KEY["conversation"].percent
    found = []
    for title, attribute, before in (("by turn", "by_turn", "turn "), ("by category", "by_category", "")):
        rows: list[Mapping[str, float]] = [getattr(one.arm, attribute) for one in series]
        groups = sorted({group for row in rows for group in row})
        profiles = [
            plots.Profile(one.arm.name, [row.get(group) for group in groups], one.index)
            for one, row in zip(series, rows, strict=True)
        ]
        names = [before + visible(group) for group in groups]
        svg = plots.grouped_bars(f"Conversation {title}", names, profiles, percent=percent, unit="score (1 to 10)")
        if svg is not None:
            found.append(Picture(svg, wide=plots.is_wide(groups, profiles)))
    return found


@dataclass(frozen=True)
class Samples:
    """One run's side-by-side answers; each with the link to its raw file."""

    label: str
    shown: list[tuple[SideBySide, str | None]]
    folded: list[tuple[SideBySide, str | None]]


def _samples(run: RunData, links: Links) -> Samples:
    found = [(one, links.to(run, one.source)) for one in side_by_side(run)]
    return Samples(
        visible(run.name), [pair for pair in found if not pair[0].folded], [pair for pair in found if pair[0].folded]
    )


@dataclass(frozen=True)
class Reproduce:
    label: str
    command: str
    recipe_sha256: str | None
    facts: list[tuple[str, str]]
    files: list[tuple[str, str | None]]


def _reproduce(label: str, run: RunData, links: Links) -> Reproduce:
    facts = [fact for fact in sections.facts(run.manifest) if fact[0] not in ("host", "pid", "format")]
    return Reproduce(
        label=label,
        command=visible(f"direct-rlhf run {links.to(run, 'recipe.yaml') or 'recipe.yaml'} name={run.name}-again"),
        recipe_sha256=run.recipe_sha256 and visible(run.recipe_sha256),
        facts=facts,
        files=sections.raw_files(run, links),
    )
