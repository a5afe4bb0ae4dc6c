"""Reward-model training on the tiny Mistral against TRL 1.16's RewardTrainer: pairs a second and peak memory.

Both sides train a full model of the same shape and trunk (`tiny.py`) on the same token ids, 32 pairs a step, each pair
once, with the same loss (Bradley-Terry, centring 0.01), AdamW and a linear schedule; only the steps are timed.

equal   every prompt has 32 tokens and every answer 64.
skewed  prompts of 17 to 32 tokens; answers of about exp(N(ln 40, 0.9^2)) tokens, kept within 8 and 256, each side of a
        pair drawn alone: median 40, mean 57, one in twenty above 170, as in dialogue data. Seed 0.

TRL has its default data loader and collator and no evaluation, logging service or saving. Gradient checkpointing is on
by default there, which costs time and saves memory; it is measured on and off, and the faster one is what the goals are
compared with. bfloat16 is autocast over float32 weights on both sides. Ours is the real stage, without held-out pairs.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, finish, rows
from peers.measuring import Clock, Ticks
from peers.side_by_side import (
    OURS,
    PEERS,
    PREPARE,
    WARM_UP,
    Rounds,
    measure,
    memory_ratio,
    middle,
    pace,
    peer_python,
    run_side,
    speed_up,
    unlike,
    verdict,
)

GOALS = {"skewed": ">= 2x", "equal": ">= 1x at the same dtype", "memory": "<= 0.6x"}
LEAST = {"equal": 1.0, "skewed": 2.0}
MOST_MEMORY = 0.6
NOTE = """\
Ratios: TRL over ours for time, ours over TRL for memory, against the faster of TRL's two; median of {rounds} rounds and
the farthest of them. A step is the median of {steps} steps after {warm} of warm-up. Memory is the most the whole
process ever held; what it held before the model was loaded (Python and its packages) is in brackets."""

JOB = {"batch_size": 32, "learning_rate": 1e-4, "centring": 0.01}
LONGEST_PROMPT, EQUAL_ANSWER, LONGEST_ANSWER = 32, 64, 256
ALIKE = {"threads": 0.0, "optimiser_steps": 0.0, "tokens": 0.0}
CHECKPOINTING, PLAIN = "TRL, gradient checkpointing", "TRL, without"
HEADER = ["lengths, dtype", "ours, pairs/s", "TRL", "TRL without checkpointing", "faster by", "goal"]
HEADER += ["ours, MB", "TRL, MB", "without, MB", "memory", "goal"]


def recipe(job: dict[str, Any]) -> dict[str, Any]:
    """Our side of a job as a recipe."""
    folder = Path(job["folder"])
    return {
        "name": "reward",
        "model": {"base": str(folder / "base"), "dtype": job["dtype"]},
        "data": {
            "preferences": [{"path": str(folder / "pairs.jsonl")}],
            "held_out": 0.0,
            "max_answer_tokens": LONGEST_ANSWER,
        },
        "reward": {
            "batch_size": job["batch_size"],
            "centring": job["centring"],
            "optimiser": {"learning_rate": job["learning_rate"]},
            "normalisation_prompts": 8,  # comes after the steps and is not timed
        },
        "ppo": {"sampling": {"max_new_tokens": 1}},
    }


def answer_lengths(lengths: str, count: int, seed: int = 0) -> list[int]:
    """Tokens of ``count`` answers, EOS included."""
    import numpy as np

    if lengths == "equal":
        return [EQUAL_ANSWER] * count
    drawn = np.random.default_rng(seed).lognormal(np.log(40), 0.9, size=count)
    return [int(length) for length in drawn.round().clip(8, LONGEST_ANSWER)]


def prepare(job: dict[str, Any]) -> None:
    """The model and the pairs of both sides, in the job's folder: text for ours, the same as token ids for theirs."""
    import numpy as np

    import tiny
    from direct_rlhf.data.dialogue import DialogueFormat
    from direct_rlhf.data.load import load_preferences
    from direct_rlhf.data.tokens import load_tokens
    from direct_rlhf.recipe.schema import Recipe
    from direct_rlhf.train.pairs import encode_pairs

    folder, count = Path(job["folder"]), job["batch_size"] * job["steps"]
    base = tiny.save(folder / "base")
    shortest = LONGEST_PROMPT if job["lengths"] == "equal" else None
    asked = tiny.questions(folder, count, LONGEST_PROMPT, shortest=shortest)
    draw = np.random.default_rng(1)

    def answer(length: int) -> str:
        return " ".join(f"w{index}" for index in draw.integers(6, tiny.VOCABULARY, size=length - 1))

    sides = [answer_lengths(job["lengths"], count, seed) for seed in (0, 1)]
    lines = [
        json.dumps(question | {"chosen": answer(chosen), "rejected": answer(rejected)})
        for question, chosen, rejected in zip(rows(asked), *sides, strict=True)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = Recipe.model_validate(recipe(job | {"dtype": "float32"}))
    data = load_preferences(made.data, folder=folder, seed=made.seed)
    pairs = encode_pairs(data.train, DialogueFormat(made.dialogue, load_tokens(str(base))), made.data)
    if len(pairs) != count:
        raise SystemExit(f"{len(pairs)} of {count} pairs were kept")
    ids = {
        "chosen_ids": [pair.prompt_ids + pair.chosen_ids for pair in pairs],
        "rejected_ids": [pair.prompt_ids + pair.rejected_ids for pair in pairs],
    }
    (folder / "pairs.json").write_text(json.dumps(ids), encoding="utf-8")


def ours(job: dict[str, Any]) -> None:
    """Our side: the stage as `direct-rlhf run` calls it, with a clock for a progress bar."""
    import torch

    from direct_rlhf.data.load import load_preferences
    from direct_rlhf.precision import has_bfloat16, settled
    from direct_rlhf.recipe.load import LoadedRecipe
    from direct_rlhf.recipe.schema import Recipe
    from direct_rlhf.run.context import StageContext
    from direct_rlhf.run.directory import RunDirectory
    from direct_rlhf.train.reward import train_reward_model

    clock = Clock()
    folder = Path(job["folder"])
    made = Recipe.model_validate(recipe(job))
    run = RunDirectory.open(folder / "runs", LoadedRecipe.of(made, folder), resume=False, overwrite=True)
    data = load_preferences(made.data, folder=folder, seed=made.seed)
    train_reward_model(StageContext(settled(made, "cpu"), run, "cpu", progress=Ticks(clock, "reward model")), data)
    lines = [line for line in rows(run.path / "metrics.jsonl") if "loss" in line]
    ids = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    clock.finish(
        threads=torch.get_num_threads(),
        optimiser_steps=len(lines),
        tokens=sum(len(row) for side in ids.values() for row in side) / len(lines),
        loss=sum(line["loss"] for line in lines) / len(lines),
        faults=sum("batch" in row for row in rows(run.path / "alerts.jsonl")),
        native_bfloat16=has_bfloat16(),
    )


def cases(folder: Path, steps: int, *, quick: bool) -> dict[str, dict[str, Any]]:
    """Name -> job."""
    shared = JOB | {"steps": steps}
    return {
        f"{lengths}, {dtype}": shared | {"folder": str(folder / lengths), "lengths": lengths, "dtype": dtype}
        for lengths in LEAST
        for dtype in ("float32", "bfloat16")[: 1 if quick else 2]
    }


def summary(job: dict[str, Any], found: dict[str, Rounds]) -> dict[str, Any]:
    """The figures of one case."""
    mine = found[OURS]
    faster = max((CHECKPOINTING, PLAIN), key=lambda side: pace(found[side]))
    figures: dict[str, Any] = {
        "compared with": faster,
        "faster": speed_up(mine, found[faster]),
        "memory": memory_ratio(mine, found[faster]),
    }
    for side, reports in found.items():
        figures[side] = {"pairs_per_second": job["batch_size"] * pace(reports)}
        keys = ("peak_mb", "training_peak_mb", "before_models_mb", "tokens", "loss")
        figures[side] |= {key: middle(reports, key) for key in keys}
        figures[side]["steps"] = [report["steps"] for report in reports]
    figures[OURS]["native_bfloat16"] = mine[0]["native_bfloat16"]
    figures[PLAIN] |= {key: found[PLAIN][0][key] for key in ("slots", "precision")}
    return figures


def differences(found: dict[str, Rounds]) -> list[str]:
    """Where the two sides did not do the same work."""
    pairs = [
        (our, their) for side in (CHECKPOINTING, PLAIN) for our, their in zip(found[OURS], found[side], strict=True)
    ]
    return [text for our, their in pairs for text in unlike(our, their, ALIKE)] + [
        f"ours: {report['faults']} faulty steps" for report in found[OURS] if report["faults"]
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured, after the warm-up")
    options = parser.parse_args()
    steps, n_rounds = (2, 1) if options.quick else (options.steps, options.rounds)
    this = [sys.executable, __file__]
    theirs = [peer_python("trl-reward"), str(PEERS / "trl_reward.py")]
    sides = {OURS: [*this, OURS], CHECKPOINTING: [*theirs, "checkpointing"], PLAIN: [*theirs, "plain"]}
    with tempfile.TemporaryDirectory() as name:
        jobs = cases(Path(name), WARM_UP + steps + 1, quick=options.quick)
        for lengths in LEAST:
            run_side([*this, PREPARE], jobs[f"{lengths}, float32"])
        found = measure(jobs, sides, n_rounds)
    measured: dict[str, Any] = {}
    table, held, unlike_work = [HEADER], True, []
    for case, job in jobs.items():
        figures = measured[case] = summary(job, found[case])
        unlike_work += [f"{case}: {text}" for text in differences(found[case])]
        faster, memory, least = figures["faster"], figures["memory"], LEAST[job["lengths"]]
        held = held and faster.value >= least and memory.value <= MOST_MEMORY
        rates = [f"{figures[side]['pairs_per_second']:.1f}" for side in sides]
        sizes = [f"{figures[side]['peak_mb']:.0f} ({figures[side]['before_models_mb']:.0f})" for side in sides]
        goals = (
            verdict(faster.value >= least, f">= {least:g}"),
            verdict(memory.value <= MOST_MEMORY, f"<= {MOST_MEMORY:g}"),
        )
        table.append([case, *rates, str(faster), goals[0], *sizes, str(memory), goals[1]])
    measured["unlike_work"] = unlike_work
    for text in unlike_work:
        print(f"the sides did not do the same work: {text}", file=sys.stderr)
    note = NOTE.format(rounds=n_rounds, steps=steps, warm=WARM_UP)
    held = held and not unlike_work
    finish("reward_model", measured, GOALS, held=held, options=options, table=table, note=note)


if __name__ == "__main__":
    if sys.argv[1:2] == [PREPARE]:
        prepare(json.loads(sys.argv[2]))
    elif sys.argv[1:2] == [OURS]:
        ours(json.loads(sys.argv[2]))
    else:
        main()
