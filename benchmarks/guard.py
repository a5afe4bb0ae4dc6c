"""The capability guard: a run whose KL weight is mis-set loses general skill without it; is it held or stopped with it?

The quickstart's PPO on a crude proxy reward (how often an answer holds the letter s), which invites over-optimising.
What would keep the policy near the base is switched off: no KL penalty, no KL stop, no pretraining text, no held-out
prompts to choose a checkpoint by. Once as it is, once with each action of the guard, and once with a sane KL weight and
no guard for comparison. What counts is the full general suite on the saved model, paired against the base.
"""

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import arguments, finish, rows, run_recipe, span

MAX_DROP = 0.03
GOALS = {
    "off": f"general difference < -{MAX_DROP}, interval below 0",
    "raise_kl": f"general difference > -{MAX_DROP}",
    "stop": f"general difference > -{MAX_DROP}",
}
REWARD = """def score(items):
    return [float(item["answer"].lower().count("s")) for item in items]
"""
RECIPE = f"""extends: quickstart
arms: [base, direct_ppo]
threads: 1                # a run is then the same on any number of cores
data: {{held_out: 0}}
evaluation: {{suites: [general]}}
ppo:
  reward: {{type: python, target: "proxy:score"}}
  evaluate_every: 2
  iterations: 16
  optimiser: {{learning_rate: 1.0e-3}}
  kl: {{controller: fixed, coefficient: 0, stop_factor: 1.0e+6}}
  ptx: {{weight: 0}}
  guard: {{action: "off", max_drop: {MAX_DROP}}}
"""
SANE = ["ppo.kl.coefficient=0.2", "ppo.kl.controller=adaptive"]
VARIANTS = {
    "off": [],
    "raise_kl": ["ppo.guard.action=raise_kl"],
    "stop": ["ppo.guard.action=stop"],
    "sane_kl": SANE,
}
HEADER = ["guard", "general", "difference", "KL at the end, nats", "iterations", "lowest probe", "KL weight at the end"]


def measure(path: Path) -> dict[str, Any]:
    """What the saved model lost, and what the guard saw and did."""
    results = json.loads((path / "results.json").read_text())
    difference = next(row for row in results["comparisons"] if row["metric"] == "general.mean")
    lines = [row for row in rows(path / "metrics.jsonl") if row["stage"] == "direct_ppo"]
    probes = [row["probe_difference"] for row in lines if "probe_difference" in row]
    return {
        "general": [results["arms"][arm]["general"]["mean"] for arm in ("base", "direct_ppo")],
        "general_difference": [difference["difference"], *difference["ci"]],
        "kl_sequence": lines[-1]["kl_sequence"],
        "iterations": lines[-1]["step"],
        "kl_coefficient": lines[-1]["kl_coefficient"],
        "lowest_probe": min(probes, default=None),
        "alerts": [row["seen"] for row in rows(path / "alerts.jsonl") if row["name"] == "capability_drop"],
        "seconds": json.loads((path / "stages" / "direct_ppo.json").read_text())["seconds"],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="a.b=c, for studies; never for the recorded figures")
    options = parser.parse_args()
    settings = [f"seed={options.seed}", *options.overrides]
    if options.quick:
        settings += ["ppo.iterations=6", "evaluation.general.limit=20"]
    table = [HEADER]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "proxy.py").write_text(REWARD, encoding="utf-8")
        (root / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

        def run(name: str) -> dict[str, Any]:
            return measure(run_recipe(str(root / "recipe.yaml"), name, root / "runs", *settings, *VARIANTS[name]))

        with ThreadPoolExecutor(2) as pool:
            measured = dict(zip(VARIANTS, pool.map(run, VARIANTS), strict=True))
    for name, found in measured.items():
        lowest = "-" if found["lowest_probe"] is None else f"{found['lowest_probe']:+.3f}"
        general = f"{found['general'][0]:.3f} → {found['general'][1]:.3f}"
        numbers = [f"{found['kl_sequence']:.1f}", str(found["iterations"]), lowest, f"{found['kl_coefficient']:.3g}"]
        table.append([name, general, span(found["general_difference"]), *numbers])
    lost, _, high = measured["off"]["general_difference"]
    held = lost < -MAX_DROP and high < 0
    held = held and all(measured[action]["general_difference"][0] > -MAX_DROP for action in ("raise_kl", "stop"))
    finish("guard", measured, GOALS, held=held, options=options, table=table)


if __name__ == "__main__":
    main()
