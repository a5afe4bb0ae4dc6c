"""Training curves: which metrics are drawn, in what unit, and from which stages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from direct_rlhf.report import plots
from direct_rlhf.report.parts import Picture, stage_label
from direct_rlhf.report.plots import Line
from direct_rlhf.report.read import RunData, mapping, number
from direct_rlhf.report.samples import visible
from direct_rlhf.report.words import arm_label

Row = Mapping[str, Any]
Read = Callable[[Row], float | None]
STAGE_LABELS = {"reward": "reward model", "reward_model": "reward model"}


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
    level: tuple[str, ...] = ()  # where the recipe holds the dashed line's height


def _key(name: str) -> Read:
    return lambda row: number(row.get(name))


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
)
ENDINGS = (
    Panel("Ended by itself", "share of answers", _finished, share=True, caption="By EOS or by a stop string."),
    Panel("Cut by the length cap", "share of answers", _key("rate_length_cut"), share=True),
    Panel("Empty answers", "share of answers", _key("rate_empty"), share=True),
)
MORE = (
    Panel("KL weight", "coefficient", _key("kl_coefficient"), zero=True),
    Panel("Policy clip fraction", "share of tokens", _key("clip_fraction"), zero=True),
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
            level=level,
            level_label="target" if level is not None else "",
        )
        if svg is not None:
            found.append(Picture(svg, panel.caption))
    return found


def _level(run: RunData, keys: Sequence[str]) -> float | None:
    inner: Any = run.recipe
    for key in keys:
        inner = mapping(inner).get(key)
    return number(inner)


def _lines(runs: Sequence[RunData], panel: Panel) -> list[Line]:
    lines = []
    for index, run in enumerate(runs):
        for stage, rows in run.metrics.items():
            for read, light in ((panel.light, True), (panel.read, False)):
                if read is not None:
                    x, y = _points(rows, _key("step"), read)
                    lines.append(Line(stage, x, y, run=index, markers=panel.markers, light=light))
    return lines


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


def alerts(runs: Sequence[RunData]) -> list[str]:
    """What the collapse detectors said: what was seen, the usual cause, and what to do."""
    said = []
    for index, run in enumerate(runs):
        for alert in run.alerts:
            where = f"{stage_label(str(alert.get('stage')), index, runs)}, iteration {alert.get('step')}"
            seen = alert.get("seen") or str(alert.get("name")).replace("_", " ")
            more = [
                f"{word}: {alert[key]}"
                for key, word in (("cause", "Usual cause"), ("remedy", "What to do"))
                if alert.get(key)
            ]
            said.append(visible(" ".join([f"{where}: {seen}", *more])))
    return said
