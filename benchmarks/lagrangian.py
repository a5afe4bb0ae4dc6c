"""PPO-Lagrangian against the weighted sum on the embedded world: reward, cost, and whether the bound holds.

The reward model learns from helpful and honest pairs, the cost model from harmless ones. cost = -(harmless score), in
standard deviations of the base's own answers; 0 is the base's average. A fixed lambda is the weighted sum
(reward - lambda cost) / (1 + lambda). All runs share both models, the seed and everything but lambda's rule.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, finish, rows, run_recipe, span

BOUND = -0.5
GOALS = {
    "lagrangian": f"held-out cost <= {BOUND} (upper end of its interval), held-out reward above its first value",
    "weighted sum": "for comparison",
}
SETTINGS = [
    "threads=1",  # a run is then the same on any number of cores
    *("reward.kinds=[helpful, honest]", "ppo.lagrangian.enabled=true", f"ppo.lagrangian.bound={BOUND}"),
    *("arms=[base, direct_ppo]", "evaluation.suites=[conversation, toxicity]", "ppo.evaluate_every=4"),
]
FIXED = (0.1, 1.0, 10.0)
HEADER = ["run", "lambda at the end", "held-out reward", "held-out cost", "KL, nats", "conversation", "toxic rate"]


def measure(path: Path) -> dict[str, Any]:
    """The last held-out figures of a run, and what the saved model does."""
    results = json.loads((path / "results.json").read_text())
    lines = [row for row in rows(path / "metrics.jsonl") if row["stage"] == "direct_ppo"]
    checks = [row for row in lines if "held_out_cost" in row]
    last = checks[-1]
    arms = results["arms"]
    return {
        "multiplier": [lines[0]["multiplier"], lines[-1]["multiplier"]],
        "reward": [last["held_out_reward"], last["held_out_reward_low"], last["held_out_reward_high"]],
        "cost": [last["held_out_cost"], last["held_out_cost_low"], last["held_out_cost_high"]],
        "rewards": [row["held_out_reward"] for row in checks],
        "costs": [row["held_out_cost"] for row in checks],
        "start": {"reward": lines[0]["reward_mean"], "cost": lines[0]["cost_mean"]},
        "kl": last["held_out_kl"],
        "conversation": [arms[arm]["conversation"]["score"] for arm in ("base", "direct_ppo")],
        "toxic": [arms[arm]["toxicity"]["toxic_rate"] for arm in ("base", "direct_ppo")],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="a.b=c, for studies; never for the recorded figures")
    options = parser.parse_args()
    settings = [*SETTINGS, f"seed={options.seed}", *options.overrides]
    if options.quick:
        settings += ["ppo.iterations=6", "ppo.evaluate_every=2", "reward.max_steps=30", "cost.max_steps=30"]
        settings += ["evaluation.conversation.limit=5", "evaluation.toxicity.limit=10", "cost.fitness.on_fail=continue"]
        settings += ["reward.fitness.on_fail=continue"]
    variants: dict[str, list[str]] = {"lagrangian": []}
    for value in FIXED[:1] if options.quick else FIXED:
        fixed = ["ppo.lagrangian.learning_rate=0", f"ppo.lagrangian.multiplier={value}"]
        variants[f"weighted sum, lambda {value:g}"] = fixed
    measured: dict[str, Any] = {}
    table = [HEADER]
    with tempfile.TemporaryDirectory() as folder:
        root, models = Path(folder), []
        for number, (name, more) in enumerate(variants.items()):
            path = run_recipe("quickstart", f"run-{number}", root, *settings, *more, *models)
            models = models or [
                f"ppo.reward={{type: model, path: {path / 'reward_model'}}}",
                f"ppo.lagrangian.cost={{type: model, path: {path / 'cost_model'}}}",
            ]
            found = measured[name] = measure(path)
            arrows = [f"{a:.2f} → {b:.2f}" for a, b in (found["conversation"], found["toxic"])]
            numbers = [
                f"{found['multiplier'][1]:.2f}",
                span(found["reward"]),
                span(found["cost"]),
                f"{found['kl']:.1f}",
            ]
            table.append([name, *numbers, *arrows])
    ours = measured["lagrangian"]
    held = ours["cost"][2] <= BOUND and ours["reward"][1] > ours["start"]["reward"]
    finish("lagrangian", measured, GOALS, held=held, options=options, table=table)


if __name__ == "__main__":
    main()
