"""PPO of the quickstart, killed at random moments and resumed: does it end as if nothing had happened, bit for bit?

One run is left alone. Each trial is a fresh copy of the same start (reward model trained, PPO not begun), one SIGKILL
at a moment drawn uniformly over the run's time, start-up and writing included, and one `--resume` to the end. A trial
is equal if metrics (times aside), samples, the saved model, and weights, optimisers and state of the last checkpoint
are. A trial that ends before its moment has come is made again with the next moment.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments, finish
from direct_rlhf.maths.intervals import wilson
from direct_rlhf.recipe.load import load_recipe
from direct_rlhf.run import points
from direct_rlhf.run.checkpoints import MARKER, CheckpointStore

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the comparison of two runs is the tests' own

from faults import assert_runs_equal

ARM = "direct_ppo"
NOTE = (
    "Seconds lost: both parts of a trial together, less a run that is left alone. Start-up (imports, models, rehearsal)"
    " is paid twice, and what came after the last checkpoint is done again. One thread a run."
)
SETTINGS = [
    "threads=1",
    "arms=[base, direct_ppo]",
    "reward.max_steps=40",
    "reward.normalisation_prompts=128",
    "reward.fitness.on_fail=continue",
    "ppo.evaluate_every=3",
    "ppo.checkpoint_every=2",
]
PHASES = {  # the last point that was passed, and what comes after it
    "": "start-up and first rollout",
    "ppo.rollout": "scoring",
    "ppo.scored": "critic warm-up",
    "ppo.warmed": "update",
    "ppo.minibatch": "update",
    "ppo.updated": "held-out evaluation",
    "ppo.evaluated": "writing a checkpoint",
    "checkpoint.before_marker": "writing a checkpoint",
    "checkpoint.before_rename": "writing a checkpoint",
    "checkpoint.saved": "writing a checkpoint",
    "ppo.iteration": "rollout",
}


@dataclass(frozen=True)
class Study:
    """One run that is left alone, and how to make its like."""

    arguments: Sequence[str]  # of the command line, without --root and --resume
    name: str  # of the run
    start: Path  # root of the run as it stands before PPO
    iterations: int

    def copy(self, root: Path) -> Path:
        shutil.copytree(self.start, root)
        return root

    def command(self, root: Path) -> list[str]:
        trace = root / "trace"
        own = [sys.executable, str(Path(__file__)), "--child", str(trace), "--"]
        return [*own, *self.arguments, "--root", str(root), "--resume"]

    def run(self, root: Path, *, kill_at: float | None = None, clock_from: int = 0) -> tuple[float, bool]:
        """Runs PPO to its end, or kills it; returns the seconds it took, and whether it was killed.

        ``kill_at`` counts the seconds from when ``clock_from`` points have been passed.
        """
        log = root / "output"
        begin = time.monotonic()
        (root / "trace").unlink(missing_ok=True)
        with log.open("ab") as out:
            process = subprocess.Popen(self.command(root), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            try:
                while len(self.trace(root)) < clock_from and process.poll() is None:
                    time.sleep(0.01)
                code = process.wait(kill_at)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return time.monotonic() - begin, True
            finally:
                process.kill()  # if we are stopped ourselves
        if code != 0:
            said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"{root}: ended with {code}\n{said}")
        return time.monotonic() - begin, False

    def trace(self, root: Path) -> list[tuple[float, str]]:
        """(seconds since the start of its process, name) of each point that was passed."""
        lines = (root / "trace").read_text().splitlines() if (root / "trace").exists() else []
        return [(float(seconds), name) for seconds, name in (line.split() for line in lines)]

    def phase(self, root: Path) -> str:
        """What a killed run was doing."""
        if any((root / self.name / "checkpoints").glob("*/.*")):  # a folder that has not got its name yet
            return "writing a checkpoint"
        passed = [name for _, name in self.trace(root)]
        if passed.count("ppo.iteration") == self.iterations:
            return "saving the model"
        return PHASES[passed[-1] if passed else ""]


@dataclass(frozen=True)
class Trial:
    """One kill and its resume."""

    at: float  # seconds
    phase: str
    difference: str  # the first one from the run that was left alone; empty if there is none
    lost: float  # seconds that the kill cost


def trial(
    study: Study, alone: Path, seconds: float, moments: Iterator[float], root: Path, *, clock_from: int = 0
) -> Trial:
    """Kill and resume a copy; ``alone`` is the root of the run that was left alone, which took ``seconds``."""
    while True:
        at = next(moments)
        study.copy(root)
        before, killed = study.run(root, kill_at=at, clock_from=clock_from)
        if killed:
            break
        shutil.rmtree(root)
    phase = study.phase(root)
    try:
        after, _ = study.run(root)
        unequal = difference(study, alone, root)
    except RuntimeError as error:  # a resume that fails is what this is here to find
        after, unequal = 0.0, str(error)
    shutil.rmtree(root)
    return Trial(at, phase, unequal, before + after - seconds)


def difference(study: Study, one: Path, other: Path) -> str:
    """The first difference of two finished runs; empty if they are equal."""
    runs = [root / study.name for root in (one, other)]
    try:
        assert_runs_equal(*runs)
    except AssertionError as error:
        return str(error)
    files = []
    for run in runs:
        checkpoint = CheckpointStore(run / "checkpoints" / ARM, keep=1).latest()
        assert checkpoint is not None, run
        files.append(json.loads((checkpoint.path / MARKER).read_text())["files"])  # name -> size and SHA-256
    odd = sorted(name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name))
    return f"the last checkpoint: {', '.join(odd)}" if odd else ""


def uniform(seed: str, seconds: float) -> Iterator[float]:
    draw = random.Random(seed)
    while True:
        yield draw.uniform(0, seconds)


def child(trace: Path, command: list[str]) -> None:
    """`python -m direct_rlhf COMMAND` that writes down each named point it passes."""
    begin = time.monotonic()
    out = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    points.hook.set(lambda name: os.write(out, f"{time.monotonic() - begin:.3f} {name}\n".encode()))
    sys.argv[1:] = command
    runpy.run_module("direct_rlhf", run_name="__main__", alter_sys=True)


def prepare(root: Path, recipe: Path) -> None:
    """Train the reward model once."""
    for stage in ("reward_model", "fitness"):
        command = ["run", str(recipe), "--root", str(root), "--resume", "--only", stage]
        subprocess.run([sys.executable, "-m", "direct_rlhf", *command], check=True, stdout=sys.stderr)


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Trial], float, str]:
    """The trials, the seconds of a run that is left alone, and how two such runs differ (they must not)."""
    settings = [*SETTINGS, f"ppo.iterations={options.iterations}", *options.overrides]
    start, recipe = folder / "start", folder / "quickstart.yaml"
    recipe.write_text(load_recipe("quickstart", settings).yaml, encoding="utf-8")
    prepare(start, recipe)
    study = Study(["run", str(recipe), "--only", ARM], "quickstart", start, options.iterations)
    with ThreadPoolExecutor(options.workers) as pool:
        alone = [study.copy(folder / f"alone{number}") for number in range(options.workers)]
        seconds = statistics.fmean(took for took, _ in pool.map(study.run, alone))  # as loaded as the trials will be
        unequal = difference(study, alone[0], alone[-1])

        def one(number: int) -> Trial:
            moments = uniform(f"{options.seed} {number}", seconds)
            found = trial(study, alone[0], seconds, moments, folder / f"trial{number}")
            words = found.difference or "equal"
            print(f"killed after {found.at:.1f} s, {found.phase}: {words}", file=sys.stderr, flush=True)
            return found

        return list(pool.map(one, range(options.kills))), seconds, unequal


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[4:])
        return
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=8, help="of PPO")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=2, help="trials at a time, one thread each")
    parser.add_argument("overrides", nargs="*", help="a.b=c, for studies; never for the recorded figures")
    options = parser.parse_args()
    if options.quick:
        options.kills, options.iterations = 3, 3
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        trials, seconds, unequal = measure(options, Path(folder))
    equal = sum(not one.difference for one in trials)
    phases: dict[str, list[Trial]] = {}
    for one in sorted(trials, key=lambda one: one.at):
        phases.setdefault(one.phase, []).append(one)
    lost = [one.lost for one in trials]
    measured: dict[str, Any] = {
        "equal": [equal, len(trials)],
        "equal_rate_interval": wilson(equal, len(trials)),
        "alone_equal": not unequal,
        "differences": [one.difference for one in trials if one.difference],
        "seconds_alone": seconds,
        "seconds_lost": {"median": statistics.median(lost), "most": max(lost)},
        "phases": {phase: len(found) for phase, found in phases.items()},
        "iterations": options.iterations,
        "kills_at": [round(one.at, 2) for one in trials],
    }
    table = [["killed during", "kills", "equal afterwards", "seconds lost, median"]]
    for phase, found in [*phases.items(), ("all", trials)]:
        same = sum(not one.difference for one in found)
        table.append([phase, str(len(found)), str(same), f"{statistics.median(one.lost for one in found):.1f}"])
    goals = {"equal": f"{options.kills} of {options.kills}"}
    held = equal == options.kills and not unequal
    finish("kill_resume", measured, goals, held=held, options=options, table=table, note=NOTE)


if __name__ == "__main__":
    main()
