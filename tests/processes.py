"""Runs of several processes for the tests: faults in one of them, and the comparison of runs within a tolerance."""

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from faults import Ended, run_cli
from toys import toy_folder

RECIPE = """
arms: [base, sft, dpo, direct_ppo]
threads: 1
device: cpu
model: {base: base}
data: {preferences: [{path: pairs.jsonl}], max_prompt_tokens: 64, max_answer_tokens: 32}
reward: {max_steps: 3, batch_size: 5, normalisation_prompts: 16, fitness: {on_fail: continue}}
sft: {max_steps: 3, batch_size: 5}
dpo: {max_steps: 3, batch_size: 5}
ppo:
  iterations: 3
  rollouts: 8
  minibatch_size: 4
  micro_batch_tokens: 100  # two answers
  epochs: 2
  evaluate_every: 2
  evaluate_prompts: 4
  checkpoint_every: 2
  optimiser: {learning_rate: 1.0e-3}
  critic: {warmup: 2}
  sampling: {max_new_tokens: 8}
evaluation: {suites: [toxicity], toxicity: {limit: 1}, max_new_tokens: 8, bootstrap_draws: 100}
"""

# Runs at the start of every process that finds the folder in PYTHONPATH. faults.json: a list of `Fault`, which happen in
# processes that torchrun has not started again. Evaluation and report are left out.
DRIVER = """
import json, os, pathlib, time

folder = pathlib.Path(__file__).parent
rank = os.environ.get("RANK")
if rank is not None and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    from direct_rlhf.run import points

    faults = [fault for fault in json.loads((folder / "faults.json").read_text()) if fault["rank"] == int(rank)]

    def happen(fault):
        if fault["what"] != "signal":
            return
        with open(folder / "sent", "a") as out:
            print(time.time(), file=out)
        os.kill(os.getpid(), fault["signal"])

    def reached(name):
        for fault in faults:
            fault["hit"] -= fault["point"] == name
            if fault["point"] == name and fault["hit"] == 0:
                happen(fault)

    points.hook.set(reached)

    nan = [fault for fault in faults if fault["what"] == "nan"]
    if nan:
        from direct_rlhf.maths import losses

        plain = losses.bradley_terry

        def broken(*arguments, **options):
            nan[0]["calls"] -= 1
            return plain(*arguments, **options) * (float("nan") if nan[0]["calls"] == 0 else 1.0)

        losses.bradley_terry = broken
if rank is not None:
    from direct_rlhf import stages

    stages.Study.evaluate = lambda self, models: None
    stages.Study._report = lambda self: None
"""


@dataclass(frozen=True)
class Fault:
    """What happens in the process ``rank``: a signal at the ``hit``-th time of a point, or a loss that is NaN."""

    rank: int
    point: str = ""
    hit: int = 1
    signal: int = 0
    what: str = "signal"  # or nan, of the reward model's loss at the ``calls``-th call
    calls: int = 0


def make_study(folder: Path) -> Path:
    """Recipe, base model and pairs; answers of very unlike lengths, so that shares differ."""
    toy_folder(folder / "base")
    draw = random.Random(0)
    pairs = [
        {
            "prompt": f"What is thing {i}?",
            "chosen": f"It is {draw.choice(['red', 'blue'])}" + " and old" * draw.choice([0, 0, 2]) + ".",
            "rejected": f"No, {i}.",
        }
        for i in range(60)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "toy.yaml").write_text(RECIPE)
    return folder


class Processes:
    """``runs/toy`` of a study in a folder of its own, made by several processes."""

    def __init__(self, study: Path, folder: Path, *overrides: str) -> None:
        self.study, self.overrides = study, overrides
        self.root, self.path = folder / "runs", folder / "runs" / "toy"
        self.driver = folder / "driver"
        self.driver.mkdir(parents=True)
        (self.driver / "sitecustomize.py").write_text(DRIVER)

    def run(self, *faults: Fault, options: Sequence[str] = (), nproc: int = 2) -> Ended:
        """`direct-rlhf run --nproc` with these faults; it goes on with what is there."""
        (self.driver / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))
        (self.driver / "sent").unlink(missing_ok=True)
        arguments = ["run", "toy.yaml", *self.overrides, "--root", str(self.root), "--resume", "--nproc", str(nproc)]
        self.started = time.time()
        ended = run_cli([*arguments, *options], env={"PYTHONPATH": str(self.driver)}, cwd=self.study)
        assert ended.children == (), ended.err
        return ended

    def seconds_after_the_fault(self, ended: Ended) -> float:
        return self.started + ended.seconds - float((self.driver / "sent").read_text().split()[0])

    def status(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "status.json").read_text()))


def metrics(path: Path) -> list[dict[str, Any]]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def samples(path: Path) -> list[dict[str, Any]]:
    lines = (path / "samples.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("time", "score")} for line in lines]


def assert_runs_close(
    a: Path, b: Path, *, relative: float = 1e-4, absolute: float = 1e-5, weights: float = 1e-5
) -> None:
    """Two runs have the same lines and samples, numbers within the tolerance, and weights within ``weights``."""
    one, other = metrics(a), metrics(b)
    assert [(row["stage"], row["step"], *sorted(row)) for row in one] == [
        (row["stage"], row["step"], *sorted(row)) for row in other
    ]
    for left, right in zip(one, other, strict=True):
        for name, value in left.items():
            if isinstance(value, float):
                close = math.isclose(value, right[name], rel_tol=relative, abs_tol=absolute)
                assert close, f"{left['stage']} step {left['step']}, {name}: {value} and {right[name]}"
            else:
                assert value == right[name]
    assert samples(a) == samples(b)
    for name, tensors in models(a).items():
        theirs = models(b)[name]
        assert tensors.keys() == theirs.keys(), name
        for key, tensor in tensors.items():
            assert tensor.dtype == theirs[key].dtype
            apart = float((tensor - theirs[key]).abs().max()) if tensor.numel() else 0.0
            assert apart <= weights, f"{name}, {key}: {apart} apart"


def models(path: Path) -> Mapping[str, dict[str, Any]]:
    files = [file for place in ("models", "reward_model") for file in sorted((path / place).rglob("*.safetensors"))]
    return {str(file.relative_to(path)): safetensors.torch.load_file(file) for file in files}
