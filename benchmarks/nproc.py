"""The quickstart in four processes against one: the same results within noise.

A run of four processes makes the sums of one in another order. Over a whole run of PPO the last bits grow into other
samples, so that two such runs differ as two seeds do. The noise is therefore measured: three runs of one process, each
with its seed, give for every figure of results.json the 95 % prediction interval of one more run (Student's t with two
degrees of freedom). The run of four processes has the first of these seeds, and has to lie inside of all of them.
"""

import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, finish, run_recipe
from direct_rlhf.report.three_h import student_95

GOALS = {"every figure": "inside of the 95 % prediction interval of one more run of one process"}
HEADER = ["figure", "1 process, by seed", "interval of one more run", "{} processes", "inside"]
NOTE = """\
Seconds: {one:.0f} for one process (median), {many:.0f} for {nproc} on {cores} cores. Arms: {arms}."""


def figures(results: dict[str, Any]) -> dict[str, float]:
    """What a run came to, by name."""
    found = {"reward model: accuracy": results["reward_model"]["accuracy"]}
    for arm, measured in results["arms"].items():
        if arm == "base":
            continue
        found[f"{arm}: conversation"] = measured["conversation"]["score"]
        found[f"{arm}: general"] = measured["general"]["mean"]
        rates = ("toxic_rate", "bad_word_probability", "refusal_rate", "over_refusal_rate")
        found |= {f"{arm}: {rate}": measured["toxicity"][rate] for rate in rates}
    return found


def one_more(values: list[float]) -> tuple[float, float]:
    """The 95 % prediction interval of another draw from where ``values`` came from (normal)."""
    mean = statistics.mean(values)
    half = student_95(len(values) - 1) * statistics.stdev(values) * math.sqrt(1 + 1 / len(values))
    return mean - half, mean + half


def run(name: str, root: Path, *arguments: str) -> tuple[dict[str, float], float, list[str]]:
    """Figures, wall time in seconds, arms."""
    start = time.monotonic()
    path = run_recipe("quickstart", name, root, *arguments)
    results = json.loads((path / "results.json").read_text(encoding="utf-8"))
    return figures(results), time.monotonic() - start, list(results["arms"])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="a.b=c, for studies; never for the recorded figures")
    options = parser.parse_args()
    seeds = options.seeds[:2] if options.quick else options.seeds
    if len(seeds) < 2:
        raise SystemExit("--seeds: give two or more of them")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ones = [run(f"one-{seed}", root, f"seed={seed}", *options.overrides) for seed in seeds]
        several = ("--nproc", str(options.nproc))
        many, seconds, arms = run("many", root, f"seed={seeds[0]}", *options.overrides, *several)
    table = [[cell.format(options.nproc) for cell in HEADER]]
    measured: dict[str, Any] = {}
    held = True
    for name, value in many.items():
        values = [found[name] for found, _, _ in ones]
        low, high = one_more(values)
        inside = low - 1e-9 <= value <= high + 1e-9  # a figure that no seed moves has an interval of no width
        held = held and inside
        measured[name] = {"one": values, "interval": [low, high], "many": value, "inside": inside}
        shown = ", ".join(f"{one:.3f}" for one in values)
        table.append([name, shown, f"[{low:.3f}, {high:.3f}]", f"{value:.3f}", "yes" if inside else "no"])
    wall = statistics.median(taken for _, taken, _ in ones)
    measured["seconds"] = {"one": wall, "many": seconds}
    cores = len(os.sched_getaffinity(0))
    note = NOTE.format(one=wall, many=seconds, nproc=options.nproc, cores=cores, arms=", ".join(arms))
    finish("nproc", measured, GOALS, held=held, options=options, table=table, note=note)


if __name__ == "__main__":
    main()
