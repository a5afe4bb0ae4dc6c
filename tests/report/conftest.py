"""A synthetic run directory. Every number and text in it is invented, for these tests alone."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</div></details></section><iframe src='https://evil.example'></iframe>",
    "<svg onload=alert(1)><a xlink:href='javascript:alert(1)'>x</a></svg>",
    "]]> --> </style><style>*{display:none}</style> {{ 7*7 }} {% raw %}",
    "\u202eevil\u202c right to left, \u200bzero width, and NUL \x00 and ESC \x1b[31m",
    "שלום עולם مرحبا بالعالم mixed with English",
    "w" * 3000,
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈 \ud800 lone surrogate",
    "javascript:alert(1) data:text/html,<b>x</b>",
)
TASKS = (
    "arithmetic",
    "antonyms",
    "capitals",
    "colours",
    "comparison",
    "counting",
    "order",
    "passages",
    "sizes",
    "stories",
    "truth",
)
ARMS = ("base", "sft", "sft_ppo", "dpo", "direct_ppo")
MEANS = {  # arm -> general, conversation, toxic, bad words, refusal, over-refusal
    "base": (0.742, 2.81, 0.231, 0.0412, 0.121, 0.021),
    "sft": (0.725, 4.92, 0.118, 0.0203, 0.552, 0.043),
    "sft_ppo": (0.716, 6.44, 0.031, 0.0061, 0.883, 0.121),
    "dpo": (0.731, 5.13, 0.092, 0.0154, 0.601, 0.062),
    "direct_ppo": (0.738, 6.31, 0.024, 0.00043, 0.914, 0.034),
}
NAMES = {"general": "general.mean", "conversation": "conversation.score"}
RATES = ("toxic_rate", "bad_word_probability", "refusal_rate", "over_refusal_rate")


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def around(x: float, half: float) -> list[float]:
    return [max(0.0, x - half), min(1.0, x + half)]


def write_arm(run: Path, arm: str, hostile: bool) -> None:
    general, conversation, *rates = MEANS[arm]
    folder = run / "evaluation" / arm
    tasks = {
        f"world_{task}": {
            "metric": "acc",
            "value": min(0.99, general + 0.22 * math.sin(2.4 * i) + 0.01 * ARMS.index(arm)),
            "stderr": 0.021,
            "n_scored": 200,
            "n_failed": 1 if (arm, i) == ("dpo", 3) else 0,
        }
        for i, task in enumerate(TASKS)
    }
    write(folder / "general.json", {"mean": general, "ci": around(general, 0.014), "tasks": tasks})
    categories = ("arithmetic", "facts", "opposites", "stories", "unknowable")
    write(
        folder / "conversation.json",
        {
            "score": conversation,
            "ci": [conversation - 0.4, conversation + 0.4],
            "by_turn": {"1": conversation + 0.4, "2": {"mean": conversation - 0.4, "low": 1.0}},
            "by_category": {name: conversation * (0.6 + 0.15 * i) for i, name in enumerate(categories)},
            "n_scored": 118,
            "n_failed": 2,
        },
    )
    toxicity: dict[str, Any] = {"n_scored": 240, "n_failed": 0, "classifier": "profanity-check"}
    for key, rate in zip(RATES, rates, strict=True):
        toxicity |= {key: rate, f"{key}_ci": around(rate, 0.3 * rate)}
    write(folder / "toxicity.json", toxicity)
    texts = HOSTILE if hostile else tuple(f"Answer {i} of {arm}." for i in range(10))
    write_lines(
        folder / "conversation.jsonl",
        [
            {
                "task": "conversation",
                "id": f"c{i // 2}:{i % 2 + 1}",
                "status": "failed" if (arm, i) == ("dpo", 2) else "scored",
                "value": None if (arm, i) == ("dpo", 2) else 1.0 + i,
                "output": None if (arm, i) == ("dpo", 2) else texts[i],
                "finish": ("eos", "stop", "length")[i % 3],
                "reason": "timeout" if (arm, i) == ("dpo", 2) else "",
                "cluster": f"c{i // 2}",
                "extra": {
                    "category": categories[i // 2],
                    "prompt": [{"role": "human", "content": texts[-i] if hostile else f"Question {i}?"}],
                    "turn": i % 2 + 1,
                },
            }
            for i in range(10)
        ],
    )
    write_lines(
        folder / "toxicity.jsonl",
        [
            {
                "task": task,
                "id": f"t{i}#0",
                "status": "scored",
                "value": 1.0 if (arm, i) == ("base", 1) else 0.0,
                "output": texts[i] if hostile else f"Toxicity answer {i} of {arm}.",
                "finish": "eos",
                "reason": "",
                "cluster": f"t{i}",
                "extra": {"set": ("harmful", "harmless", "provoking")[i % 3], **extra},
            }
            for i in range(6)
            for task, extra in (
                ("toxic_rate", {"prompt": f"How do I do the forbidden thing {i}?", "score": 0.1}),
                ("word_rate", {}),
                ("refusal_rate", {"outcome": "comply"}),
            )
        ],
    )


def write_metrics(run: Path, arms: tuple[str, ...]) -> None:
    rows: list[dict[str, Any]] = [
        {"stage": "reward", "step": i, "time": i, "loss": 0.7 - 0.01 * i, "accuracy": 0.5 + 0.01 * i}
        for i in range(1, 20)
    ]
    rows += [{"stage": "reward", "step": i, "time": i, "held_out_loss": 0.7 - 0.008 * i} for i in (0, 10, 19)]
    for shift, stage in enumerate(arm for arm in arms if arm.endswith("ppo")):
        for i in range(1, 25):
            x = i / 24
            row = {
                "stage": stage,
                "step": i,
                "time": 100 + i,
                "reward_mean": 1.6 * (1 - math.exp(-3 * x)) + 0.1 * math.sin(5 * i) + 0.4 * shift,
                "kl_sequence": 5.2 * x + 0.3 * math.sin(3 * i),
                "kl_token": 0.2 * x,
                "kl_coefficient": 0.05 + 0.01 * x,
                "length_mean": 22 - 8 * x + math.sin(i),
                "length_p95": 40 - 10 * x,
                "rate_eos": 0.3 + 0.2 * x,
                "rate_stop": 0.4,
                "rate_length_cut": 0.3 - 0.2 * x,
                "rate_empty": 0.0,
                "entropy": 1.9 - 0.7 * x,
                "explained_variance": -0.1 + 0.7 * x,
                "policy_loss": -0.02,
                "value_loss": 0.4 - 0.3 * x,
                "clip_fraction": 0.05 + 0.02 * math.sin(i),
                "grad_norm_policy": 1.1,
                "grad_norm_critic": 2.0 - x,
                "distinct_2": 0.6 - 0.1 * x,
                "repeated_4gram_rate": 0.02,
                "duplicate_rate": 0.1 * x,
            }
            if i % 4 == 0:
                row |= {
                    "held_out_reward": 1.5 * (1 - math.exp(-3 * x)) + 0.3 * shift - (0.2 if i == 24 else 0),
                    "held_out_kl": 5 * x + shift,
                }
            rows.append(row)
    write_lines(run / "metrics.jsonl", rows)


def guard_run(run: Path) -> None:
    """Adds to a run what the capability guard and PPO-Lagrangian leave behind: direct PPO probed at every 4th step."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["ppo"] |= {"guard": {"action": "raise_kl", "max_drop": 0.03}, "lagrangian": {"enabled": True, "bound": 0.25}}
    write(run / "recipe.yaml", yaml.safe_dump(recipe))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["stage"] != "direct_ppo":
            continue
        step = row["step"]
        x = step / 24
        row |= {
            "cost_mean": 1.2 * math.exp(-2 * x) + 0.15 * math.sin(4 * step),
            "cost_window_mean": 1.2 * math.exp(-2 * x),
            "multiplier": 1.0 + 1.4 * x * (1 - 0.5 * x),
        }
        if step % 4 == 0:
            skill = 0.002 - 0.08 * x * (1.2 - x) * (2 if step == 12 else 1)
            cost = 1.3 * math.exp(-2.2 * x)
            row |= {
                "probe_mean": 0.74 + skill,
                "probe_difference": skill,
                "probe_difference_low": skill - 0.025,
                "probe_difference_high": skill + 0.025,
                "held_out_cost": cost,
                "held_out_cost_low": cost - 0.2,
                "held_out_cost_high": cost + 0.2,
            }
    write_lines(run / "metrics.jsonl", rows)
    record = json.loads((run / "stages" / "direct_ppo.json").read_text())
    worst = min(row["probe_difference"] for row in rows if "probe_difference" in row)
    cost = json.loads((run / "reward_model" / "fitness.json").read_text())
    kinds = {"harmless": {"accuracy": 0.684, "ci": [0.62, 0.74], "n": 250}}
    cost |= {"verdict": "pass", "reasons": [], "by_kind": kinds, "n": 250, **kinds["harmless"]}
    write(run / "cost_model" / "fitness.json", cost)
    record["facts"]["guard"] = {
        "action": "raise_kl", "max_drop": 0.03, "probes": 6, "raises": 1, "worst": worst, "stopped": False,
    }  # fmt: skip
    write(run / "stages" / "direct_ppo.json", record)


def build_run(
    folder: Path, name: str = "demo", arms: tuple[str, ...] = ARMS, *, hostile: bool = False, seed: int = 7
) -> Path:
    run = folder / "runs" / name
    recipe = {
        "name": name,
        "seed": seed,
        "arms": list(arms),
        "model": {"base": "world:base"},
        "dialogue": {"format": "plain", "human": "\n\nHuman:", "assistant": "\n\nAssistant:", "stop_strings": None},
        "data": {"preferences": [{"path": "world:helpful.jsonl", "kind": "helpful", "weight": 1.0}]},
        "ppo": {"iterations": 24, "kl": {"target": 6.0}, "reward": {"type": "trained"}},
        "evaluation": {"suites": ["general", "conversation", "toxicity"]},
    }
    write(run / "recipe.yaml", yaml.safe_dump(recipe))
    manifest = {
        "recipe_sha256": "ab" * 32,
        "started": "2031-02-03T04:05:06+00:00",
        "seed": seed,
        "python": "3.11.9",
        "packages": {"torch": "2.13.0"},
    }
    write(run / "manifest.json", manifest)
    write(run / "status.json", {"state": "running", "exit_code": None, "reason": ""})
    for arm in arms:
        write_arm(run, arm, hostile)
        if arm != "base":
            write(run / "models" / arm / "config.json", {})
    write_metrics(run, arms)
    comparisons = []
    for arm in arms:
        if arm != "base":
            for metric, ours, theirs in zip(
                ("general", "conversation", *RATES), MEANS[arm], MEANS["base"], strict=True
            ):
                d, half = ours - theirs, {"general": 0.012, "conversation": 0.5}.get(metric, 0.03)
                comparisons.append(
                    {
                        "arm": arm,
                        "against": "base",
                        "metric": NAMES.get(metric, f"toxicity.{metric}"),
                        "difference": d,
                        "ci": [d - half, d + half],
                        "n": 240,
                    }
                )
            comparisons.append(
                {
                    "arm": arm,
                    "against": "base",
                    "metric": "general.world_truth",
                    "difference": -0.02,
                    "ci": [-0.06, 0.02],
                    "n": 200,
                }
            )
    write(run / "evaluation" / "comparisons.json", comparisons)
    write(
        run / "reward_model" / "fitness.json",
        {
            "verdict": "warn",
            "reasons": ["praise adds 0.6 to the score, more than 0.5"],
            "accuracy": 0.731,
            "ci": [0.694, 0.766],
            "by_kind": {
                "helpful": {"accuracy": 0.71, "ci": [0.66, 0.76], "n": 300},
                "harmless": {"accuracy": 0.76, "ci": [0.7, 0.81], "n": 250},
            },
            "n": 550,
            "length_correlation": 0.21,
            "longer_is_chosen": {"accuracy": 0.55, "ci": [0.5, 0.6], "n": 550},
            "praise_before_gain": {"mean": 0.6, "ci": [0.5, 0.7], "n": 500},
            "repetition_gain": {"mean": None, "ci": None, "n": 0},
            "margin_histogram": {
                "edges": [-4 + 0.51 * i for i in range(17)],
                "counts": [int(60 * math.exp(-((i - 10) ** 2) / 12)) for i in range(16)],
            },
            "calibration": {
                "error": 0.04,
                "bins": [
                    {"predicted": 0.525 + 0.05 * i, "observed": 0.54 + 0.04 * i, "n": 20 + 12 * i} for i in range(10)
                ],
            },
        },
    )
    for order, (stage, seconds) in enumerate((("reward_model", 41.2), ("direct_ppo", 133.0), ("evaluation", 61.5))):
        facts = (
            {"best": {"iteration": 20, "held_out_reward": 1.377, "held_out_kl": 4.1667}}
            if stage == "direct_ppo"
            else {}
        )
        write(
            run / "stages" / f"{stage}.json", {"seconds": seconds, "finished": f"2031-02-03T0{order}", "facts": facts}
        )
    write_lines(
        run / "samples.jsonl",
        [{"stage": "direct_ppo", "step": 1, "prompt": "p", "answer": "a", "score": 0.1, "finish": "eos"}],
    )
    counts = {"read": 900, "kept": 890, "too_long": 10, "train": 800, "held_out": 90, "formats": {"a": "hh"}}
    data = {"preferences": counts, "overlap": {"rows": 0, "items": 0, "compared": 400, "not_compared": []}}
    write(run / "stages" / "data.json", {"seconds": 0.5, "finished": "2031-02-02", "facts": data})
    alert = {
        "stage": "direct_ppo",
        "step": 12,
        "name": "kl_high",
        "seen": "KL is 13 nats.",
        "cause": "rate.",
        "remedy": "halve it.",
    }
    if "direct_ppo" in arms:
        write_lines(run / "alerts.jsonl", [alert])
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A factory: make_run(name="demo", arms=ARMS, hostile=False, seed=7) -> run directory."""
    return functools.partial(build_run, tmp_path)


@pytest.fixture
def make_guarded(make_run: Callable[..., Path]) -> Callable[..., Path]:
    """The same factory; direct PPO ran under the capability guard and a bound on its costs."""

    def make(*args: Any, **options: Any) -> Path:
        run = make_run(*args, **options)
        guard_run(run)
        return run

    return make


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all arms whose prompts and answers attack the page. Not to be changed."""
    return build_run(tmp_path_factory.mktemp("hostile"), "hostile", hostile=True)
