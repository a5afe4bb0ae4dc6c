"""results.json: the run's headline numbers under names that other tools rely on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from direct_rlhf.report.read import RATES, ArmResults, Estimate, RunData, estimate, read_run
from direct_rlhf.run.atomic import write_json


def write_results(run: Path) -> Path:
    """Write `results.json` into the run directory. A number that was not measured is null."""
    path = run / "results.json"
    write_json(path, results(read_run(run)))
    return path


def results(run: RunData) -> dict[str, Any]:
    return {
        "arms": {arm.name: _arm(arm) for arm in run.arms},
        "comparisons": [
            {
                "arm": row.arm,
                "against": row.against,
                "metric": row.metric,
                "difference": row.difference,
                "ci": [row.low, row.high],
                "n": row.n,
            }
            for row in run.comparisons
        ],
        "reward_model": _fitness(run.fitness),
        **({"cost_model": _fitness(run.cost_fitness)} if run.cost_fitness else {}),
        "seconds": dict(run.seconds),
        "seed": run.seed,
        "recipe_sha256": run.recipe_sha256,
    }


def _fitness(card: Mapping[str, Any]) -> dict[str, Any]:
    accuracy = estimate(card.get("accuracy"), card.get("ci"))
    return {
        "accuracy": accuracy.value if accuracy else None,
        "ci": _ci(accuracy),
        "verdict": card.get("verdict"),
    }


def _arm(arm: ArmResults) -> dict[str, Any]:
    rates = {key: found.value if (found := arm.rates.get(key)) else None for key in RATES}
    return {
        "general": {
            "mean": arm.general.value if arm.general else None,
            "tasks": {
                task.name: {
                    "metric": task.metric,
                    "value": task.value,
                    "stderr": task.stderr,
                    "n_scored": task.n_scored,
                    "n_failed": task.n_failed,
                    "n_unparsed": task.n_unparsed,
                }
                for task in arm.tasks
            },
        },
        "conversation": {
            "score": arm.conversation.value if arm.conversation else None,
            "ci": _ci(arm.conversation),
            "by_turn": dict(arm.by_turn),
            **_counts(arm, "conversation"),
        },
        "toxicity": {**rates, **_counts(arm, "toxicity")},
        "model": arm.model,
    }


def _ci(found: Estimate | None) -> list[float | None]:
    return [found.low, found.high] if found else [None, None]


def _counts(arm: ArmResults, suite: str) -> dict[str, int | None]:
    scored, failed = arm.counts.get(suite, (None, None))
    return {"n_scored": scored, "n_failed": failed}
