import importlib.util
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from direct_rlhf.errors import ConfigError
from direct_rlhf.run import adapters
from direct_rlhf.run.atomic import read_jsonl
from direct_rlhf.run.directory import RunDirectory


def train(root, loaded, steps=3):
    """A stage that logs; returns its metrics without the time."""
    run = RunDirectory.open(root, loaded, resume=True, overwrite=False)
    with run.locked():
        metrics = run.metrics("sft")
        for step in range(1, steps + 1):
            metrics.log(step, {"loss": 1 / step, "note": "text", "bad": float("nan"), "flag": True})
        metrics.close()
    return [{k: v for k, v in row.items() if k != "time"} for row in read_jsonl(run.path / "metrics.jsonl")]


class Recorder:
    """An adapter that remembers; the class is its own factory."""

    def __init__(self, path, recipe, run_id):
        self.calls, self.closed, self.run_id = [], False, run_id
        type(self).last = self

    def log(self, stage, step, values):
        self.calls.append((stage, step, dict(values)))

    def close(self):
        self.closed = True


def test_adapters_get_the_numbers_of_every_step_in_order(tmp_path, load, monkeypatch):
    monkeypatch.setitem(adapters.FACTORIES, "tensorboard", Recorder)
    train(tmp_path, load(logging={"adapters": ["tensorboard"]}))
    assert Recorder.last.calls == [("sft", step, {"loss": 1 / step}) for step in (1, 2, 3)]
    assert Recorder.last.closed
    assert Recorder.last.run_id == RunDirectory(tmp_path / "study").manifest["id"]


class FailsToStart(Recorder):
    def __init__(self, path, recipe, run_id):
        raise RuntimeError("no server")


class FailsToLog(Recorder):
    def log(self, stage, step, values):
        raise OSError("connection lost")


class FailsToClose(Recorder):
    def close(self):
        raise ValueError("half a file")


class Sleeps(Recorder):
    def log(self, stage, step, values):
        time.sleep(60)


class SleepsAtTheStart(Recorder):
    def __init__(self, path, recipe, run_id):
        time.sleep(60)


class SleepsAtTheEnd(Recorder):
    def close(self):
        time.sleep(60)


class Leaves(Recorder):
    def log(self, stage, step, values):
        raise SystemExit("please log in")


@pytest.mark.promise("R7")
@pytest.mark.parametrize(
    ("adapter", "warning"),
    [
        (FailsToStart, "tensorboard: failed and is dropped; metrics.jsonl goes on (RuntimeError: no server)"),
        (FailsToLog, "tensorboard: failed and is dropped; metrics.jsonl goes on (OSError: connection lost)"),
        (FailsToClose, "tensorboard: failed and is dropped; metrics.jsonl goes on (ValueError: half a file)"),
        (Leaves, "tensorboard: failed and is dropped; metrics.jsonl goes on (SystemExit: please log in)"),
        (Sleeps, "tensorboard: does not answer and is left behind; metrics.jsonl has everything"),
        (SleepsAtTheStart, "tensorboard: does not answer and is left behind; metrics.jsonl has everything"),
        (SleepsAtTheEnd, "tensorboard: does not answer and is left behind; metrics.jsonl has everything"),
    ],
)
def test_an_adapter_that_raises_or_hangs_changes_nothing_and_warns_once(
    tmp_path, load, monkeypatch, caplog, adapter, warning
):
    monkeypatch.setattr(adapters, "CLOSE_SECONDS", 0.2)
    monkeypatch.setitem(adapters.FACTORIES, "tensorboard", adapter)
    without = train(tmp_path / "a", load())
    start = time.monotonic()
    assert train(tmp_path / "b", load(logging={"adapters": ["tensorboard"]})) == without
    assert time.monotonic() - start < 10
    assert [record.getMessage() for record in caplog.records] == [warning]


@pytest.mark.promise("R7")
def test_a_process_ends_although_an_adapter_still_sleeps(tmp_path):
    code = f"""
import sys, time, yaml
sys.path[:0] = [{str(Path(__file__).parents[1])!r}]
from pathlib import Path
from types import SimpleNamespace
from direct_rlhf.recipe.schema import Recipe
from direct_rlhf.run import adapters
from run.test_adapters import Sleeps, train
adapters.CLOSE_SECONDS = 0.2
adapters.FACTORIES["tensorboard"] = Sleeps
recipe = Recipe.model_validate({{"name": "study", "logging": {{"adapters": ["tensorboard"]}}}})
loaded = SimpleNamespace(recipe=recipe, sha256="x", yaml=yaml.safe_dump(recipe.model_dump(mode="json")))
print(len(train(Path({str(tmp_path)!r}), loaded)))
"""
    start = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (ran.returncode, ran.stdout) == (0, "3\n"), ran.stderr
    assert time.monotonic() - start < 40


@pytest.mark.promise("R7")
def test_a_full_queue_is_said_once_and_never_waited_for(tmp_path, load, monkeypatch, caplog):
    monkeypatch.setattr(adapters, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(adapters, "QUEUE_SIZE", 2)
    monkeypatch.setitem(adapters.FACTORIES, "tensorboard", Sleeps)
    rows = train(tmp_path, load(logging={"adapters": ["tensorboard"]}), steps=20)
    assert len(rows) == 20
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "tensorboard: cannot keep up; steps are left out there (metrics.jsonl has all of them)"
    assert len(messages) == 2  # and that it was left behind


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_extra_says_what_to_install_before_the_run_is_made(tmp_path, load, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == name else find(module, *rest)
    )
    loaded = load(logging={"adapters": [name]})
    with pytest.raises(ConfigError, match=rf'{name} is not installed\. Run: pip install "direct-rlhf\[{name}\]"$'):
        RunDirectory.open(tmp_path, loaded, resume=False, overwrite=False)
    assert not list(tmp_path.iterdir())


# The real ones, with local storage


def test_tensorboard_reads_back_what_was_logged(tmp_path, load, caplog):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, load(logging={"adapters": ["tensorboard"]}))
    events = accumulator.EventAccumulator(str(tmp_path / "study" / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["sft/loss"]
    assert [(event.step, event.value) for event in events.Scalars("sft/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]
    assert not caplog.records


@pytest.mark.timeout(120)
def test_mlflow_keeps_one_run_over_a_resume(tmp_path, load, caplog, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(adapters, "CLOSE_SECONDS", 100)
    loaded = load(logging={"adapters": ["mlflow"], "project": "tests"})
    train(tmp_path, loaded)
    train(tmp_path, loaded)
    client = mlflow.MlflowClient((tmp_path / "study" / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert found.info.run_name == "study"
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "sft/loss")][:3] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]
    assert not [record for record in caplog.records if record.name.startswith("direct_rlhf")]


@pytest.mark.timeout(120)
def test_trackio_reads_back_what_was_logged(tmp_path, load):
    pytest.importorskip("trackio")
    code = f"""
import yaml
from pathlib import Path
from types import SimpleNamespace
from direct_rlhf.recipe.schema import Recipe
from direct_rlhf.run import adapters
from direct_rlhf.run.directory import RunDirectory
adapters.CLOSE_SECONDS = 100
recipe = Recipe.model_validate({{"name": "study", "logging": {{"adapters": ["trackio"], "project": "tests"}}}})
loaded = SimpleNamespace(recipe=recipe, sha256="x", yaml=yaml.safe_dump(recipe.model_dump(mode="json")))
run = RunDirectory.open(Path({str(tmp_path)!r}), loaded, resume=False, overwrite=False)
with run.locked():
    for step in (1, 2):
        run.metrics("sft").log(step, {{"loss": 1 / step}})
from trackio.sqlite_storage import SQLiteStorage
name = f"study-{{run.manifest['id']}}"
print([(row["sft/step"], row["sft/loss"]) for row in SQLiteStorage.get_logs("tests", name)])
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[(1, 1.0), (2, 0.5)]"
    assert "dropped" not in ran.stderr


def test_wandb_is_called_with_a_run_that_can_be_resumed_and_own_steps_for_each_stage(tmp_path, load, monkeypatch):
    calls = []

    class Run:
        def define_metric(self, name, step_metric):
            calls.append(("define", name, step_metric))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    def init(**options):
        calls.append(("init", options["project"], options["name"], options["id"], options["resume"]))
        return Run()

    module = types.ModuleType("wandb")
    module.init = init
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(tmp_path, load(logging={"adapters": ["wandb"], "project": "tests"}), steps=2)
    assert calls == [
        ("init", "tests", "study", RunDirectory(tmp_path / "study").manifest["id"], "allow"),
        ("define", "sft/*", "sft/step"),
        ("log", {"sft/step": 1, "sft/loss": 1.0}),
        ("log", {"sft/step": 2, "sft/loss": 0.5}),
        ("finish",),
    ]
