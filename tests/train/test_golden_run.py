"""A golden toy run: three PPO iterations, every metric with all its digits, one file a platform.

Another processor or torch may round differently, so a platform without a file skips, and says how to make one:

    python tests/train/test_golden_run.py > tests/train/golden/PLATFORM.txt
"""

import json
import platform
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # when run as a script
from toys import toy_folder

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("reward_mean", "kl_sequence", "policy_loss", "value_loss", "grad_norm_policy", "grad_norm_critic", "entropy")


def platform_name() -> str:
    """What the rounding depends on: torch, the instruction set it uses, and the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = known.get("model name", platform.processor())
    if not any(letter.isdigit() for letter in model):  # a virtual machine that does not say which
        model += f" {known.get('cpu family')} {known.get('model')}"
    parts = [torch.__version__, torch.backends.cpu.get_cpu_capability(), model]
    return "-".join("".join(c if c.isalnum() or c in ".+" else "_" for c in part) for part in parts)


def golden_lines(root, *, nudge=None):
    """One line a step: the step, then each metric. ``nudge``: add 1e-3 to one weight after that iteration."""
    from direct_rlhf.train import ppo as ppo_module
    from train.test_ppo import recipe, run

    base = toy_folder(root / "base")
    reached = []
    real = ppo_module._iteration

    def watched(trainer):
        values = real(trainer)
        reached.append(1)
        if len(reached) == nudge:
            with torch.no_grad():
                trainer.roles.parameters("policy")[3].view(-1)[0] += 1e-3
        return values

    ppo_module._iteration = watched
    try:
        directory, _ = run(recipe(base, kl={"coefficient": 0.2}), root)
    finally:
        ppo_module._iteration = real
    rows = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
    return [" ".join([str(row["step"]), *(f"{name}={row[name]!r}" for name in NAMES)]) for row in rows]


def first_difference(found, expected):
    """None, or a sentence that names the first step and metric that differ, with both values."""
    for ours, theirs in zip(found, expected, strict=False):
        if ours != theirs:
            pairs = zip(ours.split(), theirs.split(), strict=True)
            one, other = next((a, b) for a, b in pairs if a != b)
            return f"step {ours.split()[0]}: {one}, expected {other}"
    return None if len(found) == len(expected) else f"{len(found)} steps, expected {len(expected)}"


@pytest.mark.promise("D5")
def test_the_golden_run_of_this_platform_is_repeated_to_the_last_digit(tmp_path):
    path = GOLDEN / f"{platform_name()}.txt"
    if not path.exists():
        pytest.skip(f"no golden run of this platform yet: python {Path(__file__).name} > golden/{path.name}")
    assert first_difference(golden_lines(tmp_path), path.read_text().splitlines()) is None


@pytest.mark.promise("D1", "D5")
def test_one_nudged_weight_is_found_and_the_first_step_that_differs_is_named(tmp_path):
    for side in "abc":
        (tmp_path / side).mkdir()
    whole = golden_lines(tmp_path / "a")
    assert first_difference(golden_lines(tmp_path / "b"), whole) is None
    said = first_difference(golden_lines(tmp_path / "c", nudge=2), whole)
    assert said is not None
    assert said.startswith("step 3: ")


if __name__ == "__main__":
    if sys.argv[1:] == ["--name"]:
        print(platform_name())
    else:
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(golden_lines(Path(folder))))
