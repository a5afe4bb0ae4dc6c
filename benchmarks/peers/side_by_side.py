"""Two programs on the same work, one after the other, in turn: seconds of a step, memory, and their ratios.

Each side is a process of its own that ends with the line of `measuring.Clock.finish`. One round runs every case once,
its sides next to each other and in the opposite order from the round before, so that what else the machine does hits
both. A ratio is taken within a round; its median over the rounds is what a goal is compared with.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

PEERS = Path(__file__).parent
OURS, TRL = "ours", "TRL"
PREPARE = "prepare"
WARM_UP = 2  # steps that are left out, as is the last one, after which a run may save

Report = dict[str, Any]  # what a side printed
Rounds = list[Report]  # of one side, one a round


class Ratio(NamedTuple):
    """The median over the rounds and the two rounds farthest from it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def peer_python(name: str) -> str:
    """The interpreter of a peer's environment."""
    python = PEERS.parent / ".venvs" / name / "bin" / "python"
    if not python.exists():
        raise SystemExit(
            f"{python}: the peer's environment is not there. Make it once with: benchmarks/peers.sh {name}"
        )
    return str(python)


def run_side(command: Sequence[str], job: Mapping[str, Any]) -> Report:
    """What a side measured on ``job``, which it gets as JSON. SystemExit with its last words if it fails."""
    done = subprocess.run(
        [*command, json.dumps(dict(job))],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(command)} {json.dumps(dict(job))}: ended with {done.returncode}\n{done.stderr[-3000:]}"
        )
    report: Report = json.loads((done.stdout.splitlines() or ["{}"])[-1])
    return report


def measure(
    cases: Mapping[str, Mapping[str, Any]], sides: Mapping[str, Sequence[str]], rounds: int
) -> dict[str, dict[str, Rounds]]:
    """Case -> side -> its reports, one a round. ``cases`` maps names to jobs, ``sides`` names to commands."""
    found: dict[str, dict[str, Rounds]] = {case: {side: [] for side in sides} for case in cases}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for case, job in cases.items():
            for side in order:
                report = run_side(sides[side], job)
                found[case][side].append(report)
                shown = f"{seconds(report):.3f} s a step, peak {report['peak_mb']:.0f} MB"
                print(f"round {number + 1} of {rounds}, {case}, {side}: {shown}", file=sys.stderr, flush=True)
    return found


def seconds(report: Report) -> float:
    """The median step, without the warm-up and the last one."""
    steady = report["steps"][WARM_UP:-1]
    if not steady:
        raise ValueError(f"{len(report['steps'])} steps were timed: too few to leave out the warm-up and the last one")
    return float(median(steady))


def pace(rounds: Rounds) -> float:
    """Steps a second: the median over the rounds."""
    return float(median(1 / seconds(report) for report in rounds))


def speed_up(ours: Rounds, theirs: Rounds) -> Ratio:
    """How many times faster our step is."""
    return _ratio([seconds(their) / seconds(our) for our, their in zip(ours, theirs, strict=True)])


def memory_ratio(ours: Rounds, theirs: Rounds) -> Ratio:
    """Our peak memory over theirs, whole processes."""
    return _ratio([our["peak_mb"] / their["peak_mb"] for our, their in zip(ours, theirs, strict=True)])


def _ratio(values: Sequence[float]) -> Ratio:
    return Ratio(float(median(values)), min(values), max(values))


def middle(rounds: Rounds, key: str) -> float:
    """The median over the rounds of one number of the reports."""
    return float(median(report[key] for report in rounds))


def unlike(ours: Report, theirs: Report, tolerances: Mapping[str, float]) -> list[str]:
    """What the two sides did not do alike: facts that differ by more than the tolerance, relative to theirs."""
    return [
        f"{key} {ours[key]:.4g} against {theirs[key]:.4g}"
        for key, tolerance in tolerances.items()
        if abs(ours[key] - theirs[key]) > tolerance * abs(theirs[key])
    ]


def verdict(held: bool, goal: str) -> str:
    """A cell of the table."""
    return f"{goal}: {'held' if held else '**missed**'}"
