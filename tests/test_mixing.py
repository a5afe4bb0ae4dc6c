"""What `check`, `plan`, `data show` and the start of a run say of a mixture; none of them trains or scores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from direct_rlhf.cli import main
from toys import toy_folder

SIZES = {"harmless": 30, "helpful": 60, "honest": 12}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A toy base, three files, and the recipe `mine.yaml` over the quickstart."""
    root = tmp_path_factory.mktemp("study")
    toy_folder(root / "base")
    for kind, size in SIZES.items():
        rows = [{"prompt": f"{kind} {i}?", "chosen": "Yes, it is.", "rejected": "No."} for i in range(size)]
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = "".join(f"    - {{path: {kind}.jsonl, kind: {kind}}}\n" for kind in SIZES)
    (root / "mine.yaml").write_text(
        f"extends: quickstart\narms: [base, dpo, direct_ppo]\nthreads: 1\ndevice: cpu\nmodel: {{base: base}}\n"
        f"data:\n  held_out: 0\n  prompts: []\n  preferences:\n{sources}"
        "evaluation: {suites: [conversation]}\nppo: {guard: {action: 'off'}}\n"
    )
    return root


@pytest.fixture
def said(study, monkeypatch, capsys):
    """Runs a verb on the recipe with a mixture; gives its exit code and what it wrote, white space folded."""
    monkeypatch.chdir(study)
    monkeypatch.setenv("COLUMNS", "200")

    def run(verb: str, mixture: str, *more: str) -> tuple[int, str]:
        code = main([*verb.split(), "mine.yaml", f"data.mixture={mixture}", *more])
        shown = capsys.readouterr()
        return code, " ".join((shown.out + shown.err).split())

    return run


def test_check_says_what_a_mixture_will_hold(said):
    code, text = said("check", "{type: heuristic, temperature: null, pairs: 60}")
    assert code == 0
    assert (
        "mixture heuristic, 60 pairs: harmless 20 from 30, helpful 20 from 60, honest 20 from 12 (up to 2 times each)"
        in text
    )
    code, text = said("check", "{type: reward_selected, pairs: 40}")
    assert code == 0
    assert (
        "reward_selected among harmless 30, helpful 60, honest 12, 40 of the selected ones; reward models trained:"
        in text
    )


@pytest.mark.promise("U1")
def test_check_finds_what_the_data_do_not_allow_and_models_that_are_not_there(said):
    code, text = said("check", "{type: heuristic, shares: {helpfull: 1, harmless: 1, honest: 1}}")
    assert code == 2
    assert "data.mixture.shares.helpfull: no training pair is of this kind. Did you mean helpful?" in text
    code, text = said("check", "{type: low_conflict, models: {helpful: base, honest: nowhere}}")
    assert code == 2
    assert "data.mixture.models.helpful = base: no reward model here (reward.json is missing)" in text
    assert "nowhere: no such file or folder" in text


def test_check_of_data_on_the_hub_says_that_their_kinds_are_not_known(said):
    code, text = said("check", "{type: heuristic}", "data.preferences=[{path: 'hf:someone/pairs'}]")
    assert code == 0
    assert "heuristic; data on the hub are not read here, so their kinds are not known" in text


@pytest.mark.promise("U1")
@pytest.mark.parametrize("verb", ["check", "plan", "run"])
def test_prompts_beside_a_mixture_are_refused_where_ppo_would_not_use_them(said, verb):
    prompts = "data.prompts=[{path: helpful.jsonl}]"
    code, text = said(verb, "{type: heuristic}", prompts)
    assert code == 2
    assert "data.prompts: with data.mixture, PPO samples answers to the prompts of the mixture's pairs" in text


def test_data_show_says_what_a_mixture_will_hold(said):
    code, text = said("data show", "{type: heuristic, shares: {harmless: 1, helpful: 1, honest: 0}, pairs: 40}")
    assert code == 0
    assert "mixture: heuristic, 40 pairs: harmless 20 from 30, helpful 20 from 60, honest 0 from 12" in text
    code, text = said("data show", "{type: heuristic, shares: {harmless: 1}}")
    assert code == 2
    assert "data.mixture.shares: helpful, honest is not named" in text


def test_a_plan_counts_the_pairs_of_the_mixture_and_the_training_of_its_models(said):
    code, text = said("plan", "{type: heuristic, pairs: 64}")
    assert code == 0
    assert "dpo 2 steps of 32; 64 training pairs" in text
    assert "objective_" not in text
    code, text = said("plan", "{type: low_conflict, second_seed: true}")
    assert code == 0
    assert "objective_helpful_model 2 steps of 32; 60 training pairs" in text
    assert "second_objective_honest_model 1 steps of 32; 12 training pairs" in text
    assert "dpo 4 steps of 32; 102 training pairs" in text
    assert "the mixture's pairs are known once they are scored" in text


@pytest.mark.promise("U3")
def test_a_look_at_a_mixture_imports_no_torch(study):
    script = (
        "import sys\nfrom direct_rlhf.cli import main\n"
        "assert main(['check', 'mine.yaml', 'data.mixture={type: low_conflict}']) == 0\n"
        "assert main(['data', 'show', 'mine.yaml', 'data.mixture={type: heuristic}']) == 0\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=study, timeout=120
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
