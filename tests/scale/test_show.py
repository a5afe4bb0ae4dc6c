"""`direct-rlhf plan --gpus`: what it prints and refuses, and the page that is made from it."""

import subprocess
import sys
from pathlib import Path

import pytest

from direct_rlhf.cli import main
from direct_rlhf.scale import page

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def shown(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    found = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in found.splitlines()) <= 80
    return " ".join(found.split())


def test_one_number_of_gpus_is_shown_at_length(capsys):
    said = shown(capsys, "mistral-7b-full", "--gpus", "8", "--pairs", "84000")
    assert "Estimates by arithmetic: nothing of it is measured." in said
    for words in ("reward model", "AdamW", "gathered", "A pass of the policy".lower(), "key-value cache", "1,313"):
        assert words in said
    assert "72.0 GB of 80.0 GB are taken to be usable" in said
    assert "Efficiency of PPO against one GPU of unlimited memory:" in said
    assert "Where it stops to scale" not in said


def test_several_numbers_are_a_line_each_with_where_they_stop(capsys):
    said = shown(capsys, "mistral-7b-lora", "--gpus", "1,8,512", "--shape", "llama-2-13b", "--hardware", "h200")
    assert "Where it stops to scale, 512 GPUs" in said
    assert "448 of 512 processes idle" in said


def test_hours_are_not_known_without_the_number_of_pairs(capsys):
    said = shown(capsys, "mistral-7b-lora", "--gpus", "1")
    assert "reward not known" in said
    assert "give the number of training pairs with --pairs N" in said


def test_a_setting_that_cannot_fit_ends_with_2_unless_forced(capsys):
    arguments = ["plan", "mistral-7b-full", "--gpus", "1"]
    assert main(arguments) == 2
    assert "PPO, sample: needs 269 GB of a GPU, 72.0 GB of h100's 80.0 GB are usable" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert "Warning: PPO, sample" in capsys.readouterr().err
    assert main([*arguments, "--memory", "400GB"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "--gpus 0: give a number from 1 to 1024"),
        (["--gpus", "8,many"], "--gpus many: give a number from 1 to 1024"),
        (["--gpus", "2048"], "--gpus 2048: give a number from 1 to 1024"),
        (["--gpus", "8", "--hardware", "abacus"], "--hardware abacus: no such profile"),
        (["--gpus", "8", "--shape", "round"], "--shape round: no such shape"),
        (["--gpus", "6", "parallel.shard_size=4"], "parallel.shard_size = 4: must divide"),
        (["--gpus", "8", "model.quantise=nf4"], "model.quantise = nf4: runs in one process"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_can(capsys, arguments, said):
    assert main(["plan", "mistral-7b-lora", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_reward_of_a_server_and_a_bound_on_costs_are_planned_as_they_are(capsys):
    said = shown(
        capsys,
        "mistral-7b-lora",
        "--gpus",
        "8",
        "ppo.reward={type: http, url: http://x}",
        "ppo.lagrangian.enabled=true",
    )
    assert "cost critic" in said
    assert "cost model" in said
    assert "reward model" not in said


def test_planning_on_gpus_imports_no_torch():
    code = (
        "import sys; from direct_rlhf.cli import main; code = main(['plan', 'mistral-7b-lora', '--gpus', '8']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_of_estimates_is_that_of_this_code():
    written = (ROOT / "docs/reference/scale.md").read_text(encoding="utf-8")
    assert written == page.page(), "run: python -m direct_rlhf.scale.page > docs/reference/scale.md"


def test_the_walk_through_has_the_pages_estimates_of_the_shipped_recipes():
    walk = (ROOT / "docs/how-to/mistral-plus.md").read_text(encoding="utf-8")
    for line in page.recipe_rows():
        assert line in walk, f"docs/how-to/mistral-plus.md lacks: {line}"
