"""PPO on the tiny Mistral against TRL 1.12.0's PPOTrainer: samples a second and peak memory, side by side.

Policy, reference, value model and reward model are full models of the same shape and trunk (`tiny.py`). Both sides
sample 64 answers of at most 48 tokens at temperature 1 to the same prompts of 17 to 32 tokens, score them, and take one
optimiser step on all 64 for the policy and for the value model (a row with 4 epochs takes four).

TRL has `local_rollout_forward_batch_size` 64 (its default), `stop_token` eos (it then cuts answers there, and sampling
ends once every answer of the batch has; see `decode_steps`), no gradient accumulation (its optimiser
would step at every part of a batch), no evaluation, logging service or saving. Its `bf16` and `gradient_checkpointing`
are never read by PPOTrainer: bfloat16 there is models in bfloat16 throughout, ours is float32 master weights under
autocast. Ours is the real stage with its defaults, metrics and samples written at every iteration; held-out
evaluation, critic warm-up and the guard are off.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import arguments, finish, rows
from peers.measuring import Clock, Ticks
from peers.side_by_side import (
    OURS,
    PEERS,
    PREPARE,
    TRL,
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

GOALS = {
    "fixed, float32": ">= 1.5x",
    "fixed, bfloat16": ">= 2x; >= 4x TRL's default, which is float32",
    "natural, either dtype": ">= 4x",
    "memory": "<= 0.4x",
}
LEAST = {"fixed, float32": 1.5, "fixed, bfloat16": 2.0, "natural, float32": 4.0, "natural, bfloat16": 4.0}
LEAST_OVER_DEFAULT = 4.0
MOST_MEMORY = 0.4
NOTE = """\
Ratios: TRL over ours for time, ours over TRL for memory; median of {rounds} rounds and the farthest of them. A step is
the median of {steps} iterations after {warm} of warm-up. Memory is the most the whole process ever held, saving at the
end included; what it held before the models were loaded (Python and its packages) is in brackets."""

LENGTHS = {"fixed": None, "natural": 12.0}  # mean answer tokens; None: up to the cap
JOB = {"answers": 64, "new_tokens": 48, "longest_prompt": 32, "learning_rate": 3e-6, "prompts": 512}
# Two programs draw the answers: the means of 512 geometric lengths differ by chance, 6 % in standard deviation
ALIKE = {"threads": 0.0, "optimiser_steps": 0.0, "answer_tokens": 0.25, "prompt_tokens": 0.05}
MOST_FIRST_KL = {"float32": 0.01, "bfloat16": 0.5}  # nats an answer: the policy starts as the reference
HEADER = ["lengths, dtype, epochs", "ours, samples/s", "TRL, samples/s", "faster by", "goal"]
HEADER += ["ours, MB", "TRL, MB", "memory", "goal"]


def recipe(job: dict[str, Any]) -> dict[str, Any]:
    """Our side of a job as a recipe."""
    rate = {"learning_rate": job["learning_rate"], "warmup": 0.0}
    folder = Path(job["folder"])
    return {
        "name": "ppo",
        "model": {"base": str(folder / "base"), "dtype": job["dtype"]},
        "data": {"prompts": [{"path": str(folder / "prompts.jsonl")}], "held_out": 0.0},
        "ppo": {
            "iterations": job["iterations"],
            "rollouts": job["answers"],
            "minibatch_size": job["answers"],
            "epochs": job["epochs"],
            "optimiser": rate,
            "critic": {"warmup": 0, "optimiser": rate},
            "reward": {"type": "model", "path": str(folder / "reward_model")},
            "sampling": {"max_new_tokens": job["new_tokens"]},
            "kl": {"inner_limit": 1e6},  # no epoch is left early
            "evaluate_every": 10**6,
            "checkpoint_every": 10**6,
        },
    }


def prepare(job: dict[str, Any]) -> None:
    """The models and prompts of both sides, in the job's folder."""
    import torch

    import tiny
    from direct_rlhf.data.dialogue import DialogueFormat
    from direct_rlhf.data.load import load_prompts
    from direct_rlhf.data.tokens import load_tokens
    from direct_rlhf.models.loading import base_sha256, load_causal_lm
    from direct_rlhf.models.reward_model import Facts, Normalisation, RewardModel
    from direct_rlhf.models.scalar import ScalarModel
    from direct_rlhf.recipe.schema import Recipe
    from direct_rlhf.train.prompts import encode_prompts, sampling_settings

    folder = Path(job["folder"])
    base = tiny.save(folder / "base", job["mean_length"])
    tiny.questions(folder, job["prompts"], job["longest_prompt"])
    made, tokens = Recipe.model_validate(recipe(job)), load_tokens(str(base))
    dialogue = DialogueFormat(made.dialogue, tokens)
    found = load_prompts(made.data, folder=folder, seed=made.seed)
    encoded = encode_prompts(found.train, dialogue, made.data.max_prompt_tokens)
    (folder / "prompts.json").write_text(json.dumps([ids for _, ids in encoded]), encoding="utf-8")
    model = load_causal_lm(base)
    identity = base_sha256(model)
    scalar = ScalarModel.from_base(model, seed=1)
    settings = asdict(sampling_settings(made.ppo, dialogue))
    # what its scores are does not matter here, so that they are taken as they come
    normalisation = Normalisation(0.0, 1.0, {"0.05": -1.6}, job["prompts"], True, identity, settings, "")
    facts = Facts(made.dialogue, 128, 3 * job["new_tokens"] + 1, str(base), None, identity, tokens.sha256, "full")
    with torch.no_grad():
        RewardModel(scalar, tokens, facts, normalisation, "cpu", "float32").save(folder / "reward_model")


def ours(job: dict[str, Any]) -> None:
    """Our side: the stage as `direct-rlhf run` calls it, with a clock for a progress bar."""
    import torch

    from direct_rlhf.data.load import load_prompts
    from direct_rlhf.data.tokens import load_tokens
    from direct_rlhf.precision import has_bfloat16, settled
    from direct_rlhf.recipe.load import LoadedRecipe
    from direct_rlhf.recipe.schema import Recipe
    from direct_rlhf.run.context import StageContext
    from direct_rlhf.run.directory import RunDirectory
    from direct_rlhf.train.ppo import Inputs, train_ppo
    from direct_rlhf.train.start import Sources

    clock = Clock()
    folder = Path(job["folder"])
    made = Recipe.model_validate(recipe(job))
    run = RunDirectory.open(folder / "runs", LoadedRecipe.of(made, folder), resume=False, overwrite=True)
    data = load_prompts(made.data, folder=folder, seed=made.seed)
    context = StageContext(settled(made, "cpu"), run, "cpu", progress=Ticks(clock, "PPO"))
    sources = Sources(folder / "reward_model", folder)
    train_ppo(context, data, Inputs("direct_ppo", made.model.base, load_tokens(made.model.base), sources))
    lines = rows(run.path / "metrics.jsonl")
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    clock.finish(
        threads=torch.get_num_threads(),
        optimiser_steps=sum(line["steps"] for line in lines) / len(lines),
        answer_tokens=sum(line["length_mean"] for line in lines) / len(lines),
        prompt_tokens=sum(map(len, prompts)) / len(prompts),
        first_kl=lines[0]["kl_sequence"],
        skipped_steps=sum(line["steps_skipped"] for line in lines),
        faults=sum("batch" in row for row in rows(run.path / "alerts.jsonl")),
        native_bfloat16=has_bfloat16(),
    )


def cases(folder: Path, iterations: int, *, quick: bool) -> dict[str, dict[str, Any]]:
    """Name -> job. A name is that of its goal, or says what is extra."""
    jobs = {}
    for lengths in LENGTHS:
        shared = JOB | {"folder": str(folder / lengths), "iterations": iterations, "epochs": 1}
        shared |= {"answers": 16} if quick else {}
        for dtype in ("float32", "bfloat16"):
            jobs[f"{lengths}, {dtype}"] = shared | {"dtype": dtype}
        if not quick:
            jobs[f"{lengths}, float32, 4 epochs"] = shared | {"dtype": "float32", "epochs": 4}
    return jobs


def differences(job: dict[str, Any], mine: Rounds, theirs: Rounds) -> list[str]:
    """Where the two sides did not do the same work; nothing is compared then."""
    found = [text for ours_, trl in zip(mine, theirs, strict=True) for text in unlike(ours_, trl, ALIKE)]
    most = MOST_FIRST_KL[job["dtype"]]
    for side, reports in ((OURS, mine), (TRL, theirs)):
        found += [f"{side}: first KL {report['first_kl']:.3g}" for report in reports if abs(report["first_kl"]) > most]
    return found + [f"ours: {report['faults']} faulty steps" for report in mine if report["faults"]]


def summary(job: dict[str, Any], mine: Rounds, theirs: Rounds) -> dict[str, Any]:
    """The figures of one case."""
    figures: dict[str, Any] = {"faster": speed_up(mine, theirs), "memory": memory_ratio(mine, theirs)}
    for side, reports in ((OURS, mine), (TRL, theirs)):
        figures[side] = {"samples_per_second": job["answers"] * pace(reports)}
        keys = ("peak_mb", "training_peak_mb", "before_models_mb", "answer_tokens", "first_kl")
        figures[side] |= {key: middle(reports, key) for key in keys}
        figures[side]["steps"] = [report["steps"] for report in reports]
    figures[OURS]["native_bfloat16"] = mine[0]["native_bfloat16"]
    figures[TRL] |= {key: theirs[0][key] for key in ("decode_steps", "precision")}
    return figures


def row(case: str, figures: dict[str, Any]) -> list[str]:
    faster, memory = figures["faster"], figures["memory"]
    goal = LEAST.get(case)
    rates = [f"{figures[side]['samples_per_second']:.1f}" for side in (OURS, TRL)]
    sizes = [f"{figures[side]['peak_mb']:.0f} ({figures[side]['before_models_mb']:.0f})" for side in (OURS, TRL)]
    return [
        case,
        *rates,
        str(faster),
        "-" if goal is None else verdict(faster.value >= goal, f">= {goal:g}"),
        *sizes,
        str(memory),
        verdict(memory.value <= MOST_MEMORY, f"<= {MOST_MEMORY:g}"),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="iterations that are measured, after the warm-up")
    options = parser.parse_args()
    steps, n_rounds = (2, 1) if options.quick else (options.steps, options.rounds)
    this = [sys.executable, __file__]
    sides = {OURS: [*this, OURS], TRL: [peer_python("trl-ppo"), str(PEERS / "trl_ppo.py")]}
    with tempfile.TemporaryDirectory() as name:
        jobs = cases(Path(name), WARM_UP + steps + 1, quick=options.quick)
        for lengths, mean_length in LENGTHS.items():
            run_side([*this, PREPARE], jobs[f"{lengths}, float32"] | {"mean_length": mean_length})
        found = measure(jobs, sides, n_rounds)
    measured: dict[str, Any] = {}
    table, held, unlike_work = [HEADER], True, []
    for case, job in jobs.items():
        mine, theirs = found[case][OURS], found[case][TRL]
        figures = measured[case] = summary(job, mine, theirs)
        unlike_work += [f"{case}: {text}" for text in differences(job, mine, theirs)]
        held = held and figures["faster"].value >= LEAST.get(case, 0.0) and figures["memory"].value <= MOST_MEMORY
        table.append(row(case, figures))
    over_default = speed_up(found["fixed, bfloat16"][OURS], found["fixed, float32"][TRL])
    measured["fixed, ours bfloat16 over TRL's default"] = over_default
    held = held and over_default.value >= LEAST_OVER_DEFAULT and not unlike_work
    goal = verdict(over_default.value >= LEAST_OVER_DEFAULT, f">= {LEAST_OVER_DEFAULT:g}")
    table.append(["fixed, ours bfloat16, TRL float32", "", "", str(over_default), goal, "", "", "", ""])
    measured["unlike_work"] = unlike_work
    for text in unlike_work:
        print(f"the sides did not do the same work: {text}", file=sys.stderr)
    note = NOTE.format(rounds=n_rounds, steps=steps, warm=WARM_UP)
    finish("ppo_vs_trl", measured, GOALS, held=held, options=options, table=table, note=note)


if __name__ == "__main__":
    if sys.argv[1:2] == [PREPARE]:
        prepare(json.loads(sys.argv[2]))
    elif sys.argv[1:2] == [OURS]:
        ours(json.loads(sys.argv[2]))
    else:
        main()
