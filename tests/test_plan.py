"""`direct-rlhf plan`: its numbers against what runs really take, what it refuses, and what it prints."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from direct_rlhf.cli import main
from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import Prompt, PromptData, Turn
from direct_rlhf.errors import ConfigError
from direct_rlhf.models import peaks
from direct_rlhf.models.footprint import LiveTensors
from direct_rlhf.plan import parse_size, size
from direct_rlhf.recipe.schema import Recipe
from direct_rlhf.train.forecast import Longest, forecast_ppo
from direct_rlhf.train.ppo import Inputs, train_ppo
from direct_rlhf.train.start import Sources
from models.tiny_models import make_context
from toys import toy_folder

SHARE = 0.15  # R4
TOY = [
    "threads=1",
    "device=cpu",
    "data.text=[{path: texts.jsonl}]",
    "data.preferences=[{path: pairs.jsonl}]",
    "data.prompts=[]",
    "data.held_out=0.2",
    "reward.max_steps=3",
    "reward.normalisation_prompts=16",
    "reward.fitness.on_fail=continue",
    "sft.max_steps=3",
    "dpo.max_steps=3",
    "ppo.iterations=2",
    "ppo.rollouts=32",
    "ppo.minibatch_size=16",
    "ppo.epochs=1",
    "ppo.critic.warmup=1",
    "ppo.evaluate_every=2",
    "ppo.evaluate_prompts=8",
    "ppo.checkpoint_every=1",
    "ppo.sampling.max_new_tokens=48",
    "ppo.guard.action=off",
    "evaluation.suites=[conversation]",  # lm-eval takes seconds to import, in every process
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A toy base and toy data; recipes are read with this as their data folder."""
    root = tmp_path_factory.mktemp("toy")
    toy_folder(root / "base")
    with (root / "pairs.jsonl").open("w") as out:
        for i in range(120):
            row = {"prompt": f"Tell me about thing {i}. " + "x" * (i % 60), "chosen": " It is red." * 4}
            out.write(json.dumps(row | {"rejected": " No idea." * 3}) + "\n")
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": f"A text, {i}. " * 30}) + "\n" for i in range(40)))
    return root


PPO_ALONE = ["arms=[base,direct_ppo]", "ppo.reward={type: python, target: some.module:function}"]


def overrides(toy: Path, *more: str) -> list[str]:
    return [*TOY, f"model.base={toy / 'base'}", f"data.path={toy}", *more]


# The numbers


CASES = {
    "quickstart": ["quickstart", []],
    "world-study": ["world-study", []],
    "hh-small": ["hh-small", []],
    "mistral-7b-lora": ["mistral-7b-lora", ["model.dtype=float32"]],
    "mistral-7b-full": ["mistral-7b-full", []],
}


@pytest.fixture(scope="module")
def plans_and_runs(toy, tmp_path_factory):
    """Case to the plan and what a run of it took, each shipped recipe at toy size."""
    root = tmp_path_factory.mktemp("runs")
    cases = {name: [recipe, overrides(toy, *more)] for name, (recipe, more) in CASES.items()}
    script = Path(__file__).with_name("plan_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(root), json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.promise("R4")
@pytest.mark.parametrize("case", CASES)
def test_the_planned_peak_of_each_phase_is_within_15_percent_of_the_measured_one(plans_and_runs, case) -> None:
    planned, measured = (plans_and_runs[case][what]["peaks"] for what in ("planned", "measured"))
    compared = {
        f"{stage}, {phase}": (expected, measured[stage][f"peak_memory_{phase}"])
        for stage, phases in planned.items()
        for phase, expected in phases.items()
        if stage in measured and f"peak_memory_{phase}" in measured[stage]
    }
    assert {f"direct_ppo, {phase}" for phase in ("load", "sample", "score", "update", "evaluate")} <= compared.keys()
    assert {"reward_model, train", "reward_model, check"} <= compared.keys()
    far = {name: pair for name, pair in compared.items() if abs(pair[0] / pair[1] - 1) > SHARE}
    assert far == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_planned_disk_is_within_15_percent_of_what_a_run_leaves(plans_and_runs, case) -> None:
    planned, measured = (plans_and_runs[case][what]["disk"] for what in ("planned", "measured"))
    for what in ("checkpoints", "models"):
        assert planned[what] == pytest.approx(measured[what], rel=SHARE), what


class Phases:
    """Stands in for the recorder of peak memory: the phases of a real run, in bytes of live tensors."""

    def __init__(self, live: LiveTensors) -> None:
        self.live, self.inside = live, False

    @contextmanager
    def phase(self, name: str):
        if self.inside:
            yield
            return
        self.inside = True
        try:
            with self.live.phase(name):
                yield
        finally:
            self.inside = False


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    import transformers

    folder = toy_folder(tmp_path_factory.mktemp("larger"))
    config = AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.promise("R4")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_planned_tensors_of_ppo_are_within_15_percent_of_those_of_a_run(
    larger, tmp_path, monkeypatch, tuning
) -> None:
    (tmp_path / "toy_reward.py").write_text("def reward(items):\n    return [len(item['answer']) for item in items]\n")
    fields = {
        "model": {"base": str(larger), "tuning": tuning},
        "reward": {"normalisation_prompts": 8},
        "ppo": {
            "iterations": 2,
            "rollouts": 60,
            "minibatch_size": 60,
            "micro_batch_tokens": 6144,
            "epochs": 1,
            "evaluate_every": 2,
            "evaluate_prompts": 8,
            "critic": {"warmup": 0},
            "sampling": {"max_new_tokens": 24},
            "reward": {"type": "python", "target": "toy_reward:reward"},
        },
    }
    rows = [Prompt(f"p{i}", (Turn("human", f"{i:03} " + "x" * 80),), "helpful", f"x:{i}") for i in range(60)]
    ctx = make_context(tmp_path / "runs", larger, **fields)
    tokens = load_tokens(str(larger))
    live = LiveTensors()
    recorder = Phases(live)
    monkeypatch.setattr(peaks, "_recording", SimpleNamespace(get=lambda: recorder))
    with live:
        data = PromptData(tuple(rows[10:]), tuple(rows[:10]), (), {})
        train_ppo(ctx, data, Inputs("direct_ppo", str(larger), tokens, Sources(tmp_path, tmp_path)))

    from direct_rlhf.data.dialogue import DialogueFormat

    prompt_ids = DialogueFormat(ctx.recipe.dialogue, tokens).encode_prompt(rows[0].turns, 128)
    config = AutoConfig.from_pretrained(larger)
    planned = forecast_ppo(Recipe.model_validate(ctx.recipe.model_dump()), config, tokens, Longest(prompt_ids, []))
    assert planned.peaks["update"] > 100e6
    shares = {
        phase: planned.peaks[phase] / live.peaks[phase]
        for phase in ("load", "sample", "score", "update", "evaluate", "save")
    }
    assert {phase: share for phase, share in shares.items() if abs(share - 1) > SHARE} == {}


# The verb


@pytest.fixture
def in_toy(toy, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return toy


def test_a_plan_prints_memory_roles_tokens_steps_and_disk(in_toy, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "quickstart", *overrides(in_toy)]) == 0
    shown = capsys.readouterr().out
    for words in ("direct_ppo", "update", "with the process", "reference", "AdamW"):
        assert words in shown
    flat = " ".join(shown.split())
    assert "2 iterations; each samples up to 1,536 tokens (32 answers of 48)" in flat
    assert "in all up to 3,072 tokens sampled, 3,072 trained on, 4 policy steps" in flat
    assert "checkpoints" in flat
    tables = shown[: shown.index("Work, disk and fit")]
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= 80


@pytest.mark.promise("R4")
def test_a_run_that_cannot_fit_is_refused_with_what_to_change_unless_forced(in_toy, capsys) -> None:
    arguments = ["plan", "quickstart", *overrides(in_toy), *PPO_ALONE, "--memory", "100MB"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "this run cannot fit" in said
    assert "of memory, 95 MiB are there (cpu). Try model.tuning=lora, model.dtype=bfloat16" in said
    assert main([*arguments, "--force"]) == 0
    warned = capsys.readouterr().err
    assert "Warning: " in warned
    assert "95 MiB are there" in warned


def test_a_device_that_is_not_here_and_data_on_the_hub_are_said_to_be_unknown(in_toy, capsys) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    small = [item for item in overrides(in_toy) if not item.startswith(("device", "data."))]
    limits = ["data.max_prompt_tokens=40", "data.max_answer_tokens=24", "ppo.sampling.max_new_tokens=24"]
    assert main(["plan", "mistral-7b-lora", *small, *PPO_ALONE, *limits]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "needed, not known available" in said
    assert "no GPU is here" in said
    assert "data on the hub were not read" in said


def test_a_model_whose_config_cannot_be_had_is_a_config_error(in_toy, capsys) -> None:
    assert main(["plan", "quickstart", *overrides(in_toy), "model.base=nobody/nothing"]) == 2
    assert "nobody/nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("512m", 512 * 10**6), ("1.5 TB", 1500 * 10**9), ("7", 7)],
)
def test_a_size_is_read_as_people_write_it(text, value) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["much", "-3GB", "3 PB", ""])
def test_another_size_is_refused_with_an_example(text) -> None:
    with pytest.raises(ConfigError, match="give a size such as 80GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 MiB"), (5 * 2**20, "5 MiB"), (1536 * 2**20, "1.5 GiB"), (113 * 2**30, "113 GiB")]
)
def test_sizes_are_shown_with_two_or_three_digits(value, text) -> None:
    assert size(value) == text
