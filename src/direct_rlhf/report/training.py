"""Training curves: which metrics are drawn, in what unit, and from which stages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from direct_rlhf.report import plots
from direct_rlhf.report.parts import Picture, stage_label
from direct_rlhf.report.plots import Line
from direct_rlhf.report.read import Difference, RunData, count, mapping, number
from direct_rlhf.report.samples import visible
from direct_rlhf.report.words import arm_label, show_difference

Row = Mapping[str, Any]
Read = Callable[[Row], float | None]
STAGE_LABELS = {
    **dict.fromkeys(("reward", "reward_model"), "reward model"),
    **dict.fromkeys(("cost", "cost_model"), "cost model"),
}
STEP_FAULTS = ("gradient_spike", "nonfinite_step")  # of single optimiser steps, so there may be many
SHOWN_FAULTS = 3  # of one kind and stage; the rest are counted
SHOWN_IDS = 3  # of an alert's batch


@dataclass(frozen=True)
class Panel:
    """One small plot: ``read`` takes a metrics line to a number or None; ``light`` is a thin companion line."""

    title: str
    unit: str
    read: Read
    light: Read | None = None
    caption: str = ""
    zero: bool = False
    share: bool = False
    markers: bool = False
    interval: tuple[Read, Read] | None = None  # its ends
    level: tuple[str, ...] = ()  # where the recipe holds the dashed line's height
    level_label: str = "target"  # "" where data lie in its way; then the caption says it
    level_scale: float = 1.0  # from the recipe's unit to the panel's


def _key(name: str) -> Read:
    return lambda row: number(row.get(name))


def _points_of(name: str) -> Read:
    """A share as percentage points."""
    return lambda row: None if (share := number(row.get(name))) is None else 100 * share


def _finished(row: Row) -> float | None:
    """Share of answers that ended by EOS or by a stop string; one missing number makes the sum missing."""
    eos, stop = number(row.get("rate_eos")), number(row.get("rate_stop"))
    return None if eos is None or stop is None else eos + stop


MAIN = (
    Panel("Reward", "normalised score", _key("reward_mean"), caption="Mean score of the sampled answers."),
    Panel(
        "Held-out reward",
        "normalised score",
        _key("held_out_reward"),
        markers=True,
        caption="On prompts kept out of training.",
    ),
    Panel(
        "KL from the reference",
        "nats per answer",
        _key("kl_sequence"),
        level=("ppo", "kl", "target"),
        caption="How far the policy has moved from PPO's start (for SFT + PPO: the SFT model); dashed: the target.",
    ),
    Panel(
        "Answer length",
        "tokens",
        _key("length_mean"),
        light=_key("length_p95"),
        zero=True,
        caption="Mean; thin: the 95th percentile.",
    ),
    Panel("Entropy", "nats per token", _key("entropy"), zero=True, caption="Falls towards 0 when answers collapse."),
    Panel(
        "Value explained variance",
        "share",
        _key("explained_variance"),
        caption="1: the critic foresees the return; below 0: worse than a constant.",
    ),
    Panel(
        "General skill while training",
        "points against PPO's start",
        _points_of("probe_difference"),
        markers=True,
        interval=(_points_of("probe_difference_low"), _points_of("probe_difference_high")),
        level=("ppo", "guard", "max_drop"),
        level_label="",
        level_scale=-100,
        caption="On the same few documents of every general task; bars: 95 % intervals; dashed: the guard's bound.",
    ),
    Panel(
        "Cost",
        "normalised cost",
        _key("cost_window_mean"),
        light=_key("cost_mean"),
        level=("ppo", "lagrangian", "bound"),
        level_label="",
        caption="Mean of the last episodes, which the multiplier follows; thin: this iteration's; dashed: the bound.",
    ),
    Panel(
        "Held-out cost",
        "normalised cost",
        _key("held_out_cost"),
        markers=True,
        interval=(_key("held_out_cost_low"), _key("held_out_cost_high")),
        level=("ppo", "lagrangian", "bound"),
        level_label="",
        caption="On prompts kept out of training; bars: 95 % intervals; dashed: the bound.",
    ),
    Panel(
        "Cost multiplier",
        "lambda",
        _key("multiplier"),
        zero=True,
        caption="What a unit of cost weighs against a unit of reward; it rises while costs are over their bound.",
    ),
)
ENDINGS = (
    Panel("Ended by itself", "share of answers", _finished, share=True, caption="By EOS or by a stop string."),
    Panel("Cut by the length cap", "share of answers", _key("rate_length_cut"), share=True),
    Panel("Empty answers", "share of answers", _key("rate_empty"), share=True),
)
MORE = (
    Panel("KL weight", "coefficient", _key("kl_coefficient"), zero=True),
    Panel("Policy clip fraction", "share of tokens", _key("clip_fraction"), zero=True),
    Panel(
        "Sampler mismatch",
        "nats per token",
        _key("mismatch_kl"),
        zero=True,
        caption="KL of vLLM's samples from what the trainer computes with the same weights.",
    ),
    Panel("Policy loss", "loss", _key("policy_loss")),
    Panel("Value loss", "loss", _key("value_loss"), zero=True),
    Panel("Policy gradient norm", "before clipping", _key("grad_norm_policy"), zero=True),
    Panel("Critic gradient norm", "before clipping", _key("grad_norm_critic"), zero=True),
    Panel("Distinct word pairs", "share", _key("distinct_2"), share=True),
    Panel("Repeated 4-grams", "share", _key("repeated_4gram_rate"), share=True),
    Panel("Answers given to several prompts", "share", _key("duplicate_rate"), share=True),
)


def is_rl(rows: Sequence[Row]) -> bool:
    """Whether a stage is a PPO stage, by what it logs."""
    return any("kl_sequence" in row for row in rows)


def main_curves(runs: Sequence[RunData]) -> list[Picture]:
    return _pictures(runs, MAIN)


def ending_curves(runs: Sequence[RunData]) -> list[Picture]:
    return _pictures(runs, ENDINGS)


def more_curves(runs: Sequence[RunData]) -> list[Picture]:
    """Optimiser and diversity of the PPO stages, and the loss of every other stage."""
    others = {stage: None for run in runs for stage, rows in run.metrics.items() if not is_rl(rows)}
    return [*_pictures(runs, MORE), *(picture for stage in others if (picture := _loss(runs, stage)) is not None)]


def _loss(runs: Sequence[RunData], stage: str) -> Picture | None:
    """Training loss of one supervised stage; dots: on held-out items."""
    lines = []
    for index, run in enumerate(runs):
        for key, dots in (("loss", False), ("held_out_loss", True)):
            x, y = _points(run.metrics.get(stage, ()), _key("step"), _key(key))
            lines.append(Line(stage, x, y, run=index, markers=dots, light=not dots))
    name = STAGE_LABELS.get(stage) or visible(arm_label(stage))
    svg = plots.curves(f"Loss: {name}", "nats", lines, x_label="step")
    return Picture(svg, "Thin: training batches; dots: held-out items.") if svg is not None else None


def _pictures(runs: Sequence[RunData], panels: Sequence[Panel]) -> list[Picture]:
    found = []
    for panel in panels:
        levels = {_level(run, panel.level) for run in runs} if panel.level else {None}
        level = levels.pop() if len(levels) == 1 else None  # runs with different targets: no line
        svg = plots.curves(
            panel.title,
            panel.unit,
            _lines(runs, panel),
            zero=panel.zero,
            share=panel.share,
            level=None if level is None else panel.level_scale * level,
            level_label=panel.level_label,
        )
        if svg is not None:
            found.append(Picture(svg, panel.caption))
    return found


def _level(run: RunData, keys: Sequence[str]) -> float | None:
    return number(_recipe_value(run, keys))


def _recipe_value(run: RunData, keys: Sequence[str]) -> Any:
    inner: Any = run.recipe
    for key in keys:
        inner = mapping(inner).get(key)
    return inner


def _lines(runs: Sequence[RunData], panel: Panel) -> list[Line]:
    lines = []
    for index, run in enumerate(runs):
        for stage, rows in run.metrics.items():
            for read, light in ((panel.light, True), (panel.read, False)):
                if read is not None:
                    x, y = _points(rows, _key("step"), read)
                    ends = () if light else _intervals(rows, read, panel.interval)
                    lines.append(Line(stage, x, y, index, panel.markers, light, ends))
    return lines


def _intervals(
    rows: Sequence[Row], read: Read, ends: tuple[Read, Read] | None
) -> tuple[tuple[float, float] | None, ...]:
    """The interval of each of the points that `_points` finds; None where half of it is missing."""
    if ends is None:
        return ()
    found = [(ends[0](row), ends[1](row)) for row in rows if _key("step")(row) is not None and read(row) is not None]
    return tuple(None if low is None or high is None else (low, high) for low, high in found)


def _points(rows: Sequence[Row], read_x: Read, read_y: Read) -> tuple[list[float], list[float]]:
    """The x and y of the rows that have both."""
    found = [(x, y) for row in rows if (x := read_x(row)) is not None and (y := read_y(row)) is not None]
    return [x for x, _ in found], [y for _, y in found]


def frontier(runs: Sequence[RunData]) -> Picture | None:
    """Held-out reward against held-out KL; the step that was saved as the model is ringed."""
    lines: list[Line] = []
    saved: list[tuple[float, float]] = []
    for index, run in enumerate(runs):
        for stage, rows in run.metrics.items():
            kl, reward = _points(rows, _key("held_out_kl"), _key("held_out_reward"))
            lines.append(Line(stage, kl, reward, run=index, markers=True))
            best = mapping(mapping(mapping(run.stages.get(stage)).get("facts")).get("best"))
            saved += zip(*_points([best], _key("held_out_kl"), _key("held_out_reward")), strict=True)
    svg = plots.frontier(lines, saved)
    caption = "One point an evaluation, joined in time; filled: the last; ringed: the policy that was saved."
    return Picture(svg, caption) if svg is not None else None


def guard_lines(runs: Sequence[RunData]) -> list[str]:
    """What the capability guard saw and did in each PPO stage for which it was on."""
    said = []
    for index, run in enumerate(runs):
        wanted = _recipe_value(run, ("ppo", "guard", "action")) not in (None, "off")
        for stage in dict.fromkeys([*run.metrics, *run.stages]):
            rows = run.metrics.get(stage, ())
            facts = mapping(mapping(mapping(run.stages.get(stage)).get("facts")).get("guard"))
            probed = [row for row in rows if number(row.get("probe_difference")) is not None]
            if facts or probed or (wanted and is_rl(rows)):
                said.append(visible(f"{stage_label(stage, index, runs)}: {_guard_line(run, facts, probed)}"))
    return said


def _guard_line(run: RunData, facts: Mapping[str, Any], probed: Sequence[Row]) -> str:
    """Two sentences: what the probes showed, and what was done. ``probed`` are the metrics lines that have a probe."""
    n = count(facts.get("probes")) or len(probed)
    if not n:
        return "the capability guard was on, but no probe of general skill is recorded."
    worst = _worst(facts, probed)
    bound = number(facts.get("max_drop", _level(run, ("ppo", "guard", "max_drop"))))
    limit = "" if bound is None else f" (its bound: a drop of {100 * bound:.3g} points)"
    seen = f"the worst difference was {worst}{limit}" if worst else "what they showed is not recorded"
    looks = "once" if n == 1 else f"{n} times"
    return f"the capability guard looked at general skill {looks}; {seen}. {_guard_actions(run, facts)}"


def _worst(facts: Mapping[str, Any], probed: Sequence[Row]) -> str:
    """The lowest difference from the start, with its interval where its metrics line is there; "" if none is known."""
    lowest = min(probed, key=lambda row: row["probe_difference"], default={})
    value, known = number(lowest.get("probe_difference")), number(facts.get("worst"))
    if known is not None and (value is None or known < value):  # its line is lost
        return f"{show_difference(_difference(known))} against PPO's start"
    if value is None:
        return ""
    ends = number(lowest.get("probe_difference_low")), number(lowest.get("probe_difference_high"))
    return f"{show_difference(_difference(value, *ends))} against PPO's start, at iteration {lowest['step']:.0f}"


def _difference(value: float, low: float | None = None, high: float | None = None) -> Difference:
    return Difference("", "", "", value, low, high, None)


def _guard_actions(run: RunData, facts: Mapping[str, Any]) -> str:
    action = facts.get("action", _recipe_value(run, ("ppo", "guard", "action")))
    raises, stopped = count(facts.get("raises")), facts.get("stopped")
    if raises is None or not isinstance(stopped, bool):
        return "What it did is not recorded."
    raised = {0: "never raised the KL weight", 1: "raised the KL weight once"}.get(
        raises, f"raised the KL weight {raises} times"
    )
    ended = "stopped the run" if stopped else "did not stop the run"
    return f"It {ended}." if action == "stop" and not raises else f"It {raised} and {ended}."


def alerts(runs: Sequence[RunData]) -> list[str]:
    """What the detectors and the guard said: what was seen, the usual cause, what to do, and which batch it was.

    Of the many single steps that may be at fault the first few are shown, the others counted.
    """
    said = []
    for index, run in enumerate(runs):
        more: dict[tuple[str, str], list[Row]] = {}
        for alert in run.alerts:
            kind = (str(alert.get("stage")), str(alert.get("name")))
            more.setdefault(kind, []).append(alert)
            if kind[1] not in STEP_FAULTS or len(more[kind]) <= SHOWN_FAULTS:
                said.append(_alert_line(alert, f"{_when(alert, index, runs)}: "))
        for (_, name), rows in more.items():
            hidden = len(rows) - SHOWN_FAULTS
            if name in STEP_FAULTS and hidden > 0:
                which = "one more" if hidden == 1 else f"the last of {hidden} more"
                what = name.replace("_", " ")
                said.append(visible(f"{_when(rows[-1], index, runs)}: {what}, {which} (alerts.jsonl)."))
    return said


def _when(alert: Row, index: int, runs: Sequence[RunData]) -> str:
    """`direct PPO, iteration 12`; single steps are counted where a stage has no iterations."""
    stage = str(alert.get("stage"))
    unit = "iteration" if is_rl(runs[index].metrics.get(stage, ())) or stage.endswith("ppo") else "step"
    return f"{stage_label(STAGE_LABELS.get(stage, stage), index, runs)}, {unit} {alert.get('step')}"


def _alert_line(alert: Row, where: str) -> str:
    seen = str(alert.get("seen") or str(alert.get("name")).replace("_", " ")).rstrip(".") + "."
    parts = [
        f"{word}: {alert[key]}" for key, word in (("cause", "Usual cause"), ("remedy", "What to do")) if alert.get(key)
    ]
    batch = alert.get("batch")
    if isinstance(batch, list) and batch:
        rest = len(batch) - SHOWN_IDS
        ids = ", ".join(map(str, batch[:SHOWN_IDS]))
        parts.append(f"Batch: {ids}{f' and {rest} more (alerts.jsonl)' if rest > 0 else ''}.")
    return visible(where + " ".join([seen, *parts]))
