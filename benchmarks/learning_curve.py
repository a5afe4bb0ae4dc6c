"""Does PPO learn as well after a change as before it? The quickstart's PPO on two source trees, three seeds each.

    git worktree add ../before COMMIT && python benchmarks/learning_curve.py --before ../before

Rewards of the rollouts are compared at equal KL from the base (each run's reward as a function of its KL, averaged over
three iterations and interpolated), and so is the held-out reward at the end.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, finish, rows

SEEDS = (0, 1, 2)
LEVELS = (1.0, 2.0, 3.0, 4.0, 5.0)  # nats an answer
T_95 = 4.303  # two degrees of freedom: three seeds
GOAL = "the 95 % interval of the difference in reward at equal KL, over the seeds, covers 0"
NOTE = """\
The quickstart's direct PPO (24 iterations of 96 answers, evaluation left out) from {before} and from this tree, seeds
{seeds}; one thread each, two runs at a time. Reward: normalised units, of the iteration's rollouts. Differences are
after minus before, mean and 95 % interval over the seeds (Student's t, paired by seed)."""


def run(tree: Path, seed: int, root: Path, quick: bool) -> "subprocess.Popen[bytes]":
    """One quickstart without SFT and evaluation, from a tree's own source."""
    settings = [f"seed={seed}", "name=run", "arms=[base,direct_ppo]", "evaluation.suites=[]", "threads=1"]
    settings += ["ppo.iterations=4", "reward.max_steps=10"] if quick else []
    command = [sys.executable, "-m", "direct_rlhf", "run", "quickstart", "--root", str(root), *settings]
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def curve(root: Path) -> dict[str, Any]:
    """Reward at each KL level (None beyond what the run reached), the last held-out reward, seconds of PPO."""
    lines = [row for row in rows(root / "run" / "metrics.jsonl") if row["stage"] == "direct_ppo"]
    reward, kl = (np.array([row[name] for row in lines if name in row]) for name in ("reward_mean", "kl_sequence"))
    window = min(3, len(reward))
    reward, kl = (np.convolve(x, np.ones(window) / window, "valid") for x in (reward, kl))
    order = np.argsort(kl)
    at = {
        str(level): float(np.interp(level, kl[order], reward[order])) if kl.min() <= level <= kl.max() else None
        for level in LEVELS
    }
    held_out = [row["held_out_reward"] for row in lines if "held_out_reward" in row]
    return {"at": at, "held_out": held_out[-1], "largest_kl": float(kl.max()), "final": float(reward[-1])}


def interval(differences: list[float]) -> tuple[float, float, float]:
    mean = statistics.fmean(differences)
    spread = T_95 * statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 2 else float("inf")
    return mean, mean - spread, mean + spread


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the older commit")
    options = parser.parse_args()
    seeds = SEEDS[:1] if options.quick else SEEDS
    trees = {"before": options.before.resolve(), "after": Path(__file__).resolve().parents[1]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            roots = {side: Path(name) / f"{side}-{seed}" for side in trees}
            running = {side: run(tree, seed, roots[side], options.quick) for side, tree in trees.items()}
            for side, process in running.items():
                if process.wait():
                    raise SystemExit(f"the run of {side}, seed {seed}, ended with {process.returncode}")
                found[side].append(curve(roots[side]))
    commit = subprocess.run(
        ["git", "-C", str(trees["before"]), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    table, measured, held = [["reward", "before", "after", "difference"]], {}, True
    pairs = list(zip(found["before"], found["after"], strict=True))
    for what in [*map(str, LEVELS), "held_out"]:
        both = [(b["at"].get(what, b.get(what)), a["at"].get(what, a.get(what))) for b, a in pairs]
        both = [(b, a) for b, a in both if b is not None and a is not None]
        label = "held out, at the end" if what == "held_out" else f"at {what} nats"
        if not both:
            table.append([label, "-", "-", "no run came there"])
            continue
        mean, low, high = interval([a - b for b, a in both])
        held &= low <= 0 <= high
        measured[label] = {"difference": mean, "low": low, "high": high, "before": [b for b, _ in both]}
        measured[label]["after"] = [a for _, a in both]
        shown = [f"{statistics.fmean(side):+.3f}" for side in zip(*both, strict=True)]
        table.append([label, *shown, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] ({len(both)} seeds)"])
    note = NOTE.format(before=commit or "another tree", seeds=", ".join(map(str, seeds)))
    measured["before"] = commit
    finish("learning_curve", measured, {"every row": GOAL}, held=held, options=options, table=table, note=note)


if __name__ == "__main__":
    main()
