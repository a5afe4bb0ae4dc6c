"""Signals and kills over whole runs of the command line: each ends soon, says so, and the rest comes out bit for bit.

One toy run is made without interruption. Each test makes the same run, or its end, in processes that send themselves
signals at exact moments, one process after the other, finishes it with a last resume, and compares the two.
"""

import json
import random
import shutil
import time
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import NamedTuple

import pytest
from safetensors import safe_open

import kill_resume
from direct_rlhf import stages
from direct_rlhf.recipe.load import load_recipe
from faults import Ended, assert_runs_equal, run_cli
from toys import toy_folder

GRACE = 30  # seconds: what torchrun and Kubernetes wait between SIGTERM and SIGKILL, and what we promise to stay below
ON_A_TOY = 20  # what is allowed here; on a quiet machine it is under 2

RECIPE = """
arms: [base, sft, dpo, direct_ppo]
threads: 1
device: cpu
model: {base: base}
data: {preferences: [{path: pairs.jsonl}], max_prompt_tokens: 64, max_answer_tokens: 32}
reward: {max_steps: 3, batch_size: 4, normalisation_prompts: 16, fitness: {on_fail: continue}}
sft: {max_steps: 3, batch_size: 4}
dpo: {max_steps: 3, batch_size: 4}
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
evaluation:
  general: {limit: 2}
  conversation: {limit: 2}
  toxicity: {limit: 2}
  max_new_tokens: 8
  bootstrap_draws: 100
"""

BRIEF = ("evaluation.suites=[toxicity]", "evaluation.toxicity.limit=1")  # where the evaluation is not what is tested

# Runs at the start of the process. moments: [what, n, signal or None], each counted once the one before has come.
# what: `point NAME`, `import MODULE`, or `call MODULE:NAME`, which is the moment before the call.
DRIVER = """
import functools, importlib, json, os, pathlib, sys, time
from direct_rlhf.run import points

folder = pathlib.Path(__file__).parent
moments = json.loads((folder / "moments.json").read_text())

def reached(what):
    if moments and moments[0][0] == what:
        moments[0][1] -= 1
        if moments[0][1] == 0:
            number = moments.pop(0)[2]
            if number is not None:
                with open(folder / "sent", "a") as out:
                    print(time.time(), file=out)
                os.kill(os.getpid(), number)

class Imports:
    def find_spec(self, name, *_):
        reached(f"import {name}")

def watch(place):
    module, _, path = place.partition(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    call = getattr(owner, name)

    @functools.wraps(call)
    def watched(*args, **options):
        reached(f"call {place}")
        return call(*args, **options)

    setattr(owner, name, watched)

points.hook.set(lambda name: reached(f"point {name}"))
for what, _, _ in list(moments):
    kind, _, place = what.partition(" ")
    if kind == "call":
        watch(place)
sys.meta_path.insert(0, Imports())
"""


class Moment(NamedTuple):
    """The ``hit``-th time (from 1, after the moment before it) that something is reached, and the signal sent there."""

    what: str
    hit: int = 1
    signal: Signals | None = None


class Run:
    """The run ``runs/toy`` in a folder of its own: made by processes with signals, finished without."""

    def __init__(self, study: Path, folder: Path, *overrides: str, begun: Path | None = None) -> None:
        """``begun``: an earlier run of the study, to go on from a copy of it."""
        self.recipe, self.overrides = study / "toy.yaml", overrides
        self.root, self.driver = folder / "runs", folder / "driver"
        self.path = self.root / "toy"
        self.driver.mkdir()
        (self.driver / "sitecustomize.py").write_text(DRIVER)
        if begun is not None:
            shutil.copytree(begun, self.path)

    def ends(self, *moments: Moment) -> tuple[Ended, float]:
        """Runs the command line with signals at these moments. How it ended, and how many seconds after the last."""
        (self.driver / "moments.json").write_text(json.dumps(moments))
        sent = self.driver / "sent"
        sent.unlink(missing_ok=True)
        arguments = ["run", str(self.recipe), *self.overrides, "--root", str(self.root), "--resume"]
        start = time.time()
        ended = run_cli(arguments, env={"PYTHONPATH": str(self.driver)})
        times = sent.read_text().split() if sent.exists() else []
        assert len(times) == sum(moment.signal is not None for moment in moments), ended.err
        return ended, start + ended.seconds - float(times[-1]) if times else 0.0

    def interrupted(self, phase: str, *moments: Moment) -> None:
        """The same, and it has ended as an interrupted run is promised to end."""
        ended, seconds = self.ends(*moments)
        print(f"{phase}: over {seconds:.2f} s after the signal, {GRACE} s promised")
        assert ended.code == 75, ended.err
        assert seconds < ON_A_TOY < GRACE
        assert ended.children == ()
        assert ended.err.endswith("direct-rlhf: " + self.status()["reason"] + "\n")
        status = self.status() | {"time": None}
        newest = status.pop("last_checkpoint")
        assert newest is None or (self.path / newest / "complete.json").is_file()
        assert status == {
            "state": "interrupted",
            "exit_code": 75,
            "reason": f"{self.path}: stopped on request. Go on with --resume.",
            "resumable": True,
            "time": None,
        }
        assert_whole(self.path)

    def resumed(self, only: str | None = None) -> Path:
        loaded = load_recipe(str(self.recipe), self.overrides)
        return stages.run(loaded, root=self.root, resume=True, overwrite=False, only=only)

    def status(self) -> dict:
        return json.loads((self.path / "status.json").read_text())


def assert_whole(path: Path) -> None:
    """No file of the run that anything reads is half there."""
    for file in path.rglob("*"):
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            continue  # unfinished work carries such a name, and nothing reads it
        if file.suffix == ".json":
            json.loads(file.read_text())
        if file.suffix == ".jsonl":
            assert all(json.loads(line) for line in file.read_text().splitlines())
        if file.suffix == ".safetensors":
            safe_open(file, "pt")  # refuses a file that is shorter or longer than its header says


def assert_on_the_way_to(whole: Path, path: Path) -> None:
    """What a run has measured so far is what the other one had measured by then."""
    one, other = ([json.loads(line) | {"time": 0} for line in lines(run)] for run in (whole, path))
    assert other == one[: len(other)]


def lines(path: Path) -> list[str]:
    file = path / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def assert_evaluations_equal(one: Path, other: Path) -> None:
    files = [sorted(file.relative_to(path) for file in (path / "evaluation").rglob("*.json*")) for path in (one, other)]
    assert files[0] == files[1]
    assert [file for file in files[0] if (one / file).read_bytes() != (other / file).read_bytes()] == []


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Recipe, base model and pairs."""
    folder = tmp_path_factory.mktemp("study")
    toy_folder(folder / "base")
    draw = random.Random(0)
    pairs = [
        {"prompt": f"What is thing {i}?", "chosen": f"It is {draw.choice(['red', 'blue'])}.", "rejected": f"No, {i}."}
        for i in range(60)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "toy.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    """The run that nothing interrupts (without a report, which takes longer than all the rest)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "report", lambda runs: None)
        return Run(study, tmp_path_factory.mktemp("whole")).resumed()


@pytest.fixture(scope="module")
def before_ppo(whole, tmp_path_factory):
    """The same run as it was before PPO began."""
    path = tmp_path_factory.mktemp("before_ppo") / "toy"
    shutil.copytree(whole, path)
    forget(path, "direct_ppo", "evaluation-direct_ppo")
    for name in ("metrics.jsonl", "samples.jsonl"):
        kept = [line for line in (path / name).read_text().splitlines(True) if '"stage": "direct_ppo"' not in line]
        (path / name).write_text("".join(kept))
    return path


def forget(path: Path, *names: str) -> None:
    """The stages are to be done again, and the report."""
    for name in (*names, "report"):
        (path / "stages" / f"{name}.json").unlink()
        arm = name.removeprefix("evaluation-")
        made = [f"evaluation/{arm}"] if arm != name else [f"models/{arm}", f"checkpoints/{arm}*"]
        for folder in [folder for pattern in made for folder in path.glob(pattern)]:
            shutil.rmtree(folder)


@pytest.fixture
def no_report(monkeypatch):
    """In this process the report is left out."""
    monkeypatch.setattr(stages, "report", lambda runs: None)


SAMPLER = "call direct_rlhf.rollout.native:_Sampling.advance"  # one token of every running answer
STAGES = {
    "opening the run directory": [Moment("call direct_rlhf.run.directory:_set_up", 1, SIGTERM)],
    "data": [Moment("call direct_rlhf.data.load:load_preferences", 1, SIGTERM)],
    "importing torch": [Moment("import torch", 1, SIGTERM)],
    "reward training": [Moment("point reward.step", 2, SIGTERM)],
    "normalisation": [Moment(SAMPLER, 3, SIGTERM)],
    "fitness": [Moment("call direct_rlhf.models.reward_model:RewardModel.score", 2, SIGTERM)],
    "sft": [Moment("point sft.step", 2, SIGTERM)],
}
PPO = {  # the first four in one and the same iteration
    "sampling": [Moment("point ppo.iteration"), Moment(SAMPLER, 3, SIGINT)],
    "scoring": [Moment("point ppo.rollout"), Moment("call direct_rlhf.train.experience:batch_of", 1, SIGTERM)],
    "update": [Moment("point ppo.warmed"), Moment("point ppo.minibatch", 1, SIGINT)],
    "held-out evaluation": [Moment("point ppo.updated"), Moment(SAMPLER, 2, SIGTERM)],
    "saving a checkpoint": [Moment("point ppo.evaluated"), Moment("point checkpoint.before_marker", 1, SIGINT)],
    "saving the model": [Moment("call direct_rlhf.train.ppo:_export", 1, SIGTERM)],
}
SUITES = {
    "general tasks": [Moment("call direct_rlhf.evaluate.backend:LanguageModelBackend.loglikelihood", 1, SIGTERM)],
    "judge": [Moment("call direct_rlhf.evaluate.judge:ask", 2, SIGTERM)],
    "toxicity": [Moment("call direct_rlhf.evaluate.toxicity:evaluate_toxicity"), Moment(SAMPLER, 2, SIGTERM)],
    "report": [Moment("call direct_rlhf.report.html:write_report", 1, SIGTERM)],
}


@pytest.mark.slow
@pytest.mark.promise("S1", "S5")
def test_sigterm_in_every_stage_costs_nothing(study, whole, tmp_path, no_report):
    run = Run(study, tmp_path, *BRIEF)
    for phase, moments in STAGES.items():
        run.interrupted(phase, *moments)
        assert_on_the_way_to(whole, run.path)
    assert_runs_equal(whole, run.resumed())


@pytest.mark.slow
@pytest.mark.promise("S1", "S2", "S5")
def test_one_signal_of_either_kind_in_every_phase_of_ppo_costs_nothing(study, whole, before_ppo, tmp_path):
    run = Run(study, tmp_path, *BRIEF, begun=before_ppo)
    saved = None
    for phase, moments in PPO.items():
        run.interrupted(phase, *moments)
        assert_on_the_way_to(whole, run.path)
        before, saved = saved, run.status()["last_checkpoint"]
        assert saved != before, phase
    assert_runs_equal(whole, run.resumed(only="direct_ppo"))


@pytest.mark.slow
@pytest.mark.promise("S1", "S5")
def test_sigterm_in_every_suite_and_the_report_costs_nothing(study, whole, tmp_path):
    run = Run(study, tmp_path, begun=whole)
    forget(run.path, "evaluation-direct_ppo")
    for phase, moments in SUITES.items():
        run.interrupted(phase, *moments)
    ended, _ = run.ends()
    assert (ended.code, ended.children, run.status()["state"]) == (0, (), "done")
    assert (run.path / "report.html").is_file()
    assert_runs_equal(whole, run.path)
    assert_evaluations_equal(whole, run.path)


@pytest.mark.slow
@pytest.mark.promise("S2", "S5")
def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing_half_written(study, whole, before_ppo, tmp_path):
    run = Run(study, tmp_path, *BRIEF, begun=before_ppo)
    second = Moment("point checkpoint.before_marker", 1, SIGINT)  # while the first one's work is being saved
    run.interrupted("sampling", Moment("point ppo.iteration", 2), Moment(SAMPLER, 2, SIGINT), second)
    kept = [path.name for path in (run.path / "checkpoints" / "direct_ppo").glob("step_*")]
    assert kept == ["step_000002"]  # what was being saved is not there
    assert_runs_equal(whole, run.resumed(only="direct_ppo"))


@pytest.mark.promise("S5")
def test_an_error_leaves_no_process_behind(study, whole, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(study, other)
    with (other / "pairs.jsonl").open("a") as out:
        out.write(json.dumps({"prompt": "New?", "chosen": "Yes.", "rejected": "No."}) + "\n")
    run = Run(other, tmp_path, begun=whole)
    ended, _ = run.ends()
    assert (ended.code, ended.children) == (3, ())
    assert (run.status()["state"], run.status()["exit_code"]) == ("failed", 3)


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_left_alone(study, whole, before_ppo, tmp_path):
    """Two trials of the benchmark: SIGKILL at a random moment of PPO, before and after its first checkpoint."""
    arguments = ["run", str(study / "toy.yaml"), *BRIEF, "--only", "direct_ppo"]
    bench = kill_resume.Study(arguments, "toy", before_ppo.parent, iterations=3)
    moments = kill_resume.uniform("toy", 0.2)
    for points in (1, 28):  # in the first iteration, and after the second, which ends with a checkpoint
        trial = kill_resume.trial(bench, whole.parent, 0, moments, tmp_path / "trial", clock_from=points)
        print(trial)
        assert trial.phase != "start-up and first rollout"
        assert trial.difference == ""
