"""The report's tables, in the order of the page. Each function takes what was read and returns cells; none computes."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from direct_rlhf.report.parts import Cell, Links, Series, Table, run_labels
from direct_rlhf.report.read import SUITES, RunData, TaskResult, count, estimate, mapping, number, read_json, read_jsonl
from direct_rlhf.report.samples import visible
from direct_rlhf.report.words import (
    BY_KEY,
    FURTHER,
    HEADLINES,
    NOT_MEASURED,
    Judgement,
    arm_label,
    best_arms,
    failed_items,
    judge,
    metric_label,
    metric_of,
    show_difference,
    show_estimate,
    show_number,
    verdicts,
)

TONES = {
    Judgement.BETTER: "good",
    Judgement.WORSE: "bad",
    Judgement.NONE_SHOWN: "none",
    Judgement.NO_INTERVAL: "none",
    Judgement.UNDECIDED: "none",
    Judgement.MISSING: "missing",
}
SUITE_OF = {metric.key: metric.key if metric.key in SUITES else "toxicity" for metric in HEADLINES}
MISSING = Cell(NOT_MEASURED, tone="missing")
FURTHER_TOXICITY = {  # key of toxicity.json -> how it reads
    "expected_max_toxicity": "Expected maximum toxicity of k answers",
    "toxicity_probability": "Any of k answers toxic",
    "crows_pairs": "CrowS-Pairs: the more stereotyping sentence preferred (50 % is even)",
}


def verdict_table(series: Sequence[Series]) -> Table:
    """Every arm but the reference: the three claims, judged."""
    rows = []
    for one in series:
        if one.arm.name != one.run.reference:
            claims = verdicts(one.run, one.arm.name)
            cells = (Cell(claim.judgement, sub=claim.sentence, tone=TONES[claim.judgement]) for claim in claims)
            rows.append((Cell(one.label, strong=True), *cells))
    return Table(("Arm", "General skill kept?", "Conversation better?", "Toxic output rarer?"), tuple(rows))


def arm_table(series: Sequence[Series], links: Links) -> Table:
    """Arms by headline metrics. Bold: the best of its run, where the paired difference to the reference says better."""
    bold = {(one.index, key): best_arms(one.run, key) for one in series for key in BY_KEY}
    rows = []
    for one in series:
        cells = []
        for metric in HEADLINES:
            found = one.arm.metric(metric.key)
            suite = SUITE_OF[metric.key]
            cells.append(
                Cell(
                    show_estimate(found, metric.percent),
                    href=links.to(one.run, one.arm.files.get(suite)),
                    sub=counts_text(one.arm.counts.get(suite, (None, None))) if suite == metric.key else "",
                    strong=one.arm.name in bold[one.index, metric.key],
                    tone="missing" if found is None else "",
                )
            )
        rows.append((Cell(one.label, strong=True), *cells))
    return Table(("Arm", *(metric.label for metric in HEADLINES)), tuple(rows))


def counts_text(counts: tuple[int | None, int | None]) -> str:
    scored, failed = counts
    if scored is None:
        return ""
    return f"n = {scored}" + (f", {failed} failed" if failed else "")


def comparison_tables(runs: Sequence[RunData], links: Links) -> tuple[Table, Table]:
    """Paired differences: the headline metrics, and all others (single tasks, turns)."""
    names = run_labels(runs)
    tables: tuple[list[tuple[Cell, ...]], list[tuple[Cell, ...]]] = ([], [])
    for index, run in enumerate(runs):
        href = links.to(run, "evaluation/comparisons.json")
        directions = {f"general.{task.name}": task.higher_is_better for arm in run.arms for task in arm.tasks}
        directions |= dict.fromkeys(FURTHER, False)
        for row in run.comparisons:
            metric = metric_of(row.metric)
            higher_is_better = metric.higher_is_better if metric else directions.get(row.metric)
            if higher_is_better is not None:
                judgement = judge(row, higher_is_better)
                verdict = Cell(judgement, tone=TONES[judgement])
            else:
                verdict = Cell("not judged", sub="which way is better is not known", tone="missing")
            cells = (
                Cell(f"{arm_label(row.arm)} − {arm_label(row.against)}", strong=True),
                Cell(visible(metric_label(row.metric))),
                Cell(show_difference(row, metric.percent if metric else True), href=href),
                verdict,
                Cell("unknown" if row.n is None else str(row.n), tone="missing" if row.n is None else ""),
            )
            tables[metric is None].append((Cell(names[index]), *cells) if len(runs) > 1 else cells)
    run_column = ("Run",) if len(runs) > 1 else ()
    columns = (*run_column, "Difference", "Metric", "Paired difference [95 %]", "In words", "Pairs")
    return Table(columns, tuple(tables[0])), Table(columns, tuple(tables[1]))


def task_names(series: Sequence[Series]) -> list[str]:
    """Every task of any arm, in the order of first sight."""
    return list(dict.fromkeys(task.name for one in series for task in one.arm.tasks))


def common_prefix(names: Sequence[str]) -> str:
    """What all names begin with up to an underscore (`world_`), which labels need not repeat."""
    heads = {name.split("_")[0] for name in names}
    prefix = f"{heads.pop()}_" if len(heads) == 1 else ""
    return prefix if prefix and len(names) > 1 and all(len(name) > len(prefix) for name in names) else ""


def task_table(series: Sequence[Series], links: Links) -> Table:
    """Tasks by arms, value ± standard error. Counts that all arms share stand beside the task's name."""
    names = task_names(series)
    by_arm = [{task.name: task for task in one.arm.tasks} for one in series]
    prefix = common_prefix(names)
    rows = []
    for name in names:
        found = [tasks[name] for tasks in by_arm if name in tasks]
        counts = {_task_counts(task) for task in found}
        shared = counts.pop() if len(counts) == 1 else ""
        made = ", ".join(part for part in (found[0].metric, found[0].shots, shared) if part)
        cells = [Cell(visible(name.removeprefix(prefix)), sub=visible(made), strong=True)]
        for one, tasks in zip(series, by_arm, strict=True):
            task = tasks.get(name)
            if task is None or task.value is None:
                cells.append(MISSING)
                continue
            scale, decimals, unit = (100, 1, " %") if 0 <= task.value <= 1 else (1, 2, "")
            error = "" if task.stderr is None else f" ± {scale * task.stderr:.{decimals}f}"
            text = f"{scale * task.value:.{decimals}f}{error}{unit}"
            sub = "" if shared else _task_counts(task)
            cells.append(Cell(text, href=links.to(one.run, one.arm.files.get("general")), sub=sub))
        rows.append(tuple(cells))
    return Table(("Task", *(one.label for one in series)), tuple(rows))


def _task_counts(task: TaskResult) -> str:
    """`n = 48, 1 failed, 2 unparsed, 48 prompts cut ...`; n counts the scored and the unparsed, as the mean does."""
    valued = None if task.n_scored is None else task.n_scored + task.n_unparsed
    unparsed = f"{task.n_unparsed} unparsed" if task.n_unparsed else ""
    return ", ".join(part for part in (counts_text((valued, task.n_failed)), unparsed, task.limits) if part)


def further_toxicity_table(series: Sequence[Series], links: Links) -> Table:
    """The most toxic of k answers and CrowS-Pairs by arm, where some arm was measured on them; else no rows."""
    contents = [_toxicity(one) for one in series]
    rows = []
    for key, label in FURTHER_TOXICITY.items():
        if not any(isinstance(content.get(key), Mapping) for content in contents):
            continue
        cells = [Cell(label, strong=True)]
        for one, content in zip(series, contents, strict=True):
            entry = mapping(content.get(key))
            found = estimate(entry.get("value"), entry.get("ci"))
            counts = counts_text((count(entry.get("n_scored")), count(entry.get("n_failed"))))
            href = links.to(one.run, one.arm.files.get("toxicity"))
            cells.append(MISSING if found is None else Cell(show_estimate(found), href=href, sub=counts))
        rows.append(tuple(cells))
    return Table(("Further numbers", *(one.label for one in series)), tuple(rows))


def _toxicity(one: Series) -> Mapping[str, Any]:
    """The arm's toxicity.json. What cannot be read is said by the reader of the run already."""
    name = one.arm.files.get("toxicity")
    return mapping(read_json(one.run.path / name, [], one.run.path)) if name else {}


def length_table(series: Sequence[Series], links: Links) -> Table:
    """Answers of the evaluation: how long they are, in words, and how they ended."""
    rows = []
    for one in series:
        lengths, endings, files = [], [], []
        for suite in ("conversation", "toxicity"):
            name = f"evaluation/{one.arm.name}/{suite}.jsonl"
            # several measurements of one answer share its id
            answers = {str(row.get("id")): row for row in read_jsonl(one.run.path / name)}.values()
            for record in answers:
                if isinstance(record.get("output"), str):
                    lengths.append(len(record["output"].split()))
                    endings.append(str(record.get("finish")))
                    files.append(name)
        label = Cell(one.label, strong=True)
        if not lengths:
            rows.append((label, *[MISSING] * 8))
            continue
        deciles = statistics.quantiles(lengths, n=20, method="inclusive") if len(lengths) > 1 else lengths * 19
        shares = [endings.count(ending) / len(endings) for ending in ("eos", "stop", "length")]
        empty = lengths.count(0) / len(lengths)
        size = [f"{x:.0f}" for x in (statistics.median(lengths), deciles[1], deciles[18])]
        cells = [f"{statistics.mean(lengths):.1f}", *size, *(show_number(share) for share in (*shares, empty))]
        head = Cell(cells[0], href=links.to(one.run, files[0]), sub=f"n = {len(lengths)}")
        rows.append((label, head, *(Cell(text) for text in cells[1:])))
    columns = ("Mean words", "Median", "10th pct.", "95th pct.", "EOS", "Stop string", "Cut by the cap", "Empty")
    return Table(("Arm", *columns), tuple(rows))


def data_table(runs: Sequence[RunData], links: Links) -> Table:
    """What became of the rows that were read: kept, split, and left out by reason."""
    names = run_labels(runs)
    rows = []
    for index, run in enumerate(runs):
        inputs = mapping(mapping(run.stages.get("data")).get("facts"))
        for name, found in inputs.items():
            if name == "overlap":
                continue
            label = visible(name if len(runs) == 1 else f"{names[index]} · {name}")
            counts = {str(key): n for key, value in mapping(found).items() if (n := count(value)) is not None}
            text = ", ".join(f"{visible(key.replace('_', ' '))} {n}" for key, n in counts.items() if n)
            rows.append((Cell(label, strong=True), Cell(text, href=links.to(run, "stages/data.json"))))
    return Table(("Input", "Rows"), tuple(rows))


def overlap_lines(runs: Sequence[RunData], links: Links) -> list[Cell]:
    """How much of what the evaluation asks stands in the training rows, as sentences; none for a run without data."""
    said = []
    for name, run in zip(run_labels(runs) if len(runs) > 1 else [""], runs, strict=True):
        if "data" not in run.stages:
            continue
        facts = mapping(mapping(run.stages["data"].get("facts")).get("overlap"))
        rows, items, compared = (count(facts.get(key)) for key in ("rows", "items", "compared"))
        if rows is None or items is None or not compared:
            line = "Whether training rows ask what the evaluation asks was not compared."
        elif rows:
            line = (
                f"What {items} of {compared} evaluation items ask stands in {rows} training rows too, so the results "
                "on these items show less."
            )
        else:
            line = f"What the evaluation asks stands in no training row (0 of {compared} items)."
        left_out = facts.get("not_compared")
        if isinstance(left_out, list) and left_out:
            line += f" Not compared, as their documents are not local files: {', '.join(map(str, left_out))}."
        text = visible(f"{name}: {line}" if name else line)
        said.append(Cell(text, href=links.to(run, "overlap.jsonl") if rows else None, tone="bad" if rows else ""))
    return said


def stage_table(runs: Sequence[RunData], links: Links) -> Table:
    names = run_labels(runs)
    rows = []
    for index, run in enumerate(runs):
        for stage, record in run.stages.items():
            seconds = number(record.get("seconds"))
            href = links.to(run, f"stages/{stage}.json")
            time = Cell(duration(seconds), href=href) if seconds is not None else MISSING
            label = Cell(visible(stage if len(runs) == 1 else f"{names[index]} · {stage}"), strong=True)
            trained = sum(number(row.get("answer_tokens")) or 0 for row in run.metrics.get(stage, ()))
            rows.append((label, time, Cell(f"{trained:,.0f}" if trained else "")))
        if run.seconds:
            total = "total" if len(runs) == 1 else f"{names[index]} · total"
            rows.append((Cell(total, strong=True), Cell(duration(sum(run.seconds.values())), strong=True), Cell("")))
    return Table(("Stage", "Time", "Answer tokens trained on, each pass counted"), tuple(rows))


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def not_measured(run: RunData, label: str) -> list[str]:
    """What this report cannot say, as sentences."""
    said = list(run.problems)
    have = {arm.name for arm in run.arms}
    asked = run.recipe.get("arms")  # an evaluation of other models has none of the recipe's arms
    absent = [str(arm) for arm in asked if arm not in have] if isinstance(asked, list) and have & set(asked) else []
    said += [f"{arm_label(arm)}: the recipe names this arm, but the run holds nothing of it." for arm in absent]
    suites = mapping(run.recipe.get("evaluation")).get("suites")
    left_out = [suite for suite in SUITES if suite not in suites] if isinstance(suites, list) else []
    said += [f"The recipe leaves the {suite} suite out." for suite in left_out]
    for arm in run.arms:
        for key in BY_KEY:
            suite = SUITE_OF[key]
            if arm.metric(key) is None and suite in arm.files:
                counts = counts_text(arm.counts[suite]) or "no counts"
                said.append(
                    f"{arm_label(arm.name)}, {BY_KEY[key].label.lower()}: too few items for a number ({counts})."
                )
        for suite, failed in failed_items(arm).items():
            total = failed + (arm.counts[suite][0] or 0)
            said.append(f"{arm_label(arm.name)}, {suite}: {failed} of {total} items failed and are in no mean.")
    if not run.comparisons and len(run.arms) > 1:
        said.append("There is no paired comparison between arms, so nothing is called better or worse.")
    if not run.fitness:
        said.append("The fitness of the reward model.")
    if mapping(mapping(run.recipe.get("ppo")).get("lagrangian")).get("enabled") is True and not run.cost_fitness:
        said.append("The fitness of the cost model.")
    device = str(_anywhere(run.stages, "device") or run.recipe.get("device") or "auto")
    if device == "auto":
        said.append("Which device the run used is not recorded: its times say nothing about another machine.")
    elif not device.startswith("cuda"):
        said.append("Nothing ran on a GPU: times here say nothing about one.")
    said.append("No person judged an answer; the judge and the classifier named in the recipe did.")
    return [visible(f"{label}: {text}" if label else text) for text in said]


def _anywhere(content: Mapping[str, Any], key: str, depth: int = 3) -> Any:
    """The first value of ``key`` at most ``depth`` mappings down."""
    if key in content:
        return content[key]
    found = (_anywhere(inner, key, depth - 1) for inner in content.values() if isinstance(inner, Mapping) and depth)
    return next((x for x in found if x is not None), None)


def facts(content: Mapping[str, Any], prefix: str = "", limit: int = 60) -> list[tuple[str, str]]:
    """A nested mapping's scalars as (dotted name, text); lists and what is beyond ``limit`` stay in the raw file."""
    found: list[tuple[str, str]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += facts(value, f"{name}.", limit)
        elif isinstance(value, str | int | float | bool):
            found.append((visible(name), visible(f"{value:.4g}" if isinstance(value, float) else value)))
    return found[:limit]


def raw_files(run: RunData, links: Links) -> list[tuple[str, str | None]]:
    """The run's files and their links; a missing one has none."""
    fixed = (
        "recipe.yaml",
        "manifest.json",
        "status.json",
        "metrics.jsonl",
        "samples.jsonl",
        "alerts.jsonl",
        "rejected.jsonl",
    )
    found = [*fixed, "results.json", "evaluation/comparisons.json", "reward_model/fitness.json"]
    found += [
        name for name in ("cost_model/fitness.json", "overlap.jsonl", "mixture.jsonl") if (run.path / name).exists()
    ]
    found += sorted(f"{card.parent.name}/{card.name}" for card in run.path.glob("objective_*_model/fitness.json"))
    for arm in run.arms:
        files = (f"evaluation/{arm.name}/{suite}{kind}" for suite in SUITES for kind in (".json", ".jsonl"))
        found += [name for name in files if (run.path / name).exists()]
    return [(visible(name), links.to(run, name)) for name in found]
