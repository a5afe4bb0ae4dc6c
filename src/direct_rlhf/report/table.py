"""The terminal's last word: arms by headline metrics, what differs in words, and where the report is."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from direct_rlhf.report.parts import Links
from direct_rlhf.report.read import RunData, read_run
from direct_rlhf.report.samples import visible
from direct_rlhf.report.three_h import PARADIGMS, Study, balance_table, claims, read_study
from direct_rlhf.report.words import (
    HEADLINES,
    NOT_MEASURED,
    Judgement,
    arm_label,
    best_arms,
    is_miniature,
    reference_label,
    show_estimate,
    verdicts,
)

STYLES = {Judgement.BETTER: "green", Judgement.WORSE: "red"}


def print_results(run: Path, console: Console) -> None:
    """Print the results of a run directory, one column an arm."""
    data = read_run(run)
    study = read_study([data])
    if study is not None:
        _print_study(study, console)
    else:
        _print_arms(data, console)
    if is_miniature(data):
        console.print(Text("A miniature: the base is the embedded world's small model.", style="dim"))
    for name in ("report.html", "results.json"):
        if (run / name).is_file():
            console.print(Text(f"{name.split('.')[0].capitalize()}: {run / name}"), soft_wrap=True)


def _print_study(study: Study, console: Console) -> None:
    """Each paradigm's routes, and the claims."""
    for paradigm in study.paradigms:
        found = balance_table(study, paradigm, Links(study.runs[0].path))
        title = PARADIGMS.get(paradigm, paradigm)
        table = Table(title=visible(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, column in enumerate(found.columns):
            table.add_column(column, justify="right" if place else "left")
        for name, *cells in found.rows:
            beside = Text(f" {name.sub.split(':')[0]}" if name.sub else "", style="dim")
            table.add_row(Text(name.text).append_text(beside), *(Text(cell.text) for cell in cells))
        console.print(table)
        for claim in claims(study, paradigm):
            judged = Text(f"  {claim.question} ", end="")
            judged.append(claim.judgement, style=STYLES.get(Judgement(claim.judgement), "dim"))
            judged.append(f". {claim.sentence}")
            console.print(judged)


def _print_arms(data: RunData, console: Console) -> None:
    console.print(_table(data))
    for arm in data.arms:
        if arm.name == data.reference:
            continue
        console.print(Text(f"{visible(arm_label(arm.name))} against {visible(reference_label(data))}", style="bold"))
        for verdict in verdicts(data, arm.name):
            judged = Text(f"  {verdict.question} ", end="")
            judged.append(verdict.judgement, style=STYLES.get(verdict.judgement, "dim"))
            judged.append(f". {verdict.sentence}")
            console.print(judged)


def _table(run: RunData) -> Table:
    caption = "[..]: 95 % interval. ↑ higher is better, ↓ lower. Bold: best, if its paired interval says so."
    table = Table(title=visible(run.name), caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", min_width=12)
    for arm in run.arms:
        table.add_column(visible(arm_label(arm.name)), justify="right")
    for metric in HEADLINES:
        bold = best_arms(run, metric.key)
        cells = []
        for arm in run.arms:
            text = show_estimate(arm.metric(metric.key), metric.percent)
            style = "dim" if text == NOT_MEASURED else "bold" if arm.name in bold else ""
            cells.append(Text(text.replace(" [", "\n["), style=style))
        table.add_row(f"{metric.label} {'↑' if metric.higher_is_better else '↓'}", *cells)
    return table
