import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml

from direct_rlhf.data.load import fingerprints
from direct_rlhf.errors import CheckpointError, ConfigError, DataError
from direct_rlhf.run import directory
from direct_rlhf.run.atomic import read_json, read_jsonl
from direct_rlhf.run.directory import RunDirectory
from faults import FaultyFS, crash_at, every_call, run_cli


def opened(root, loaded, resume=False, overwrite=False):
    return RunDirectory.open(root, loaded, resume=resume, overwrite=overwrite)


@pytest.fixture
def run(tmp_path, load):
    return opened(tmp_path / "runs", load())


# Opening


def test_a_new_run_holds_its_recipe_and_what_it_was_made_with(tmp_path, load):
    loaded = load(seed=7)
    run = opened(tmp_path / "runs", loaded)
    assert run.path == tmp_path / "runs" / "study"
    assert run.recipe == loaded.recipe
    manifest = run.manifest
    assert manifest["recipe_sha256"] == loaded.sha256
    assert manifest["seed"] == 7
    assert manifest["packages"]["torch"] == torch.__version__
    assert re.fullmatch("[0-9a-f]{64}", manifest["code_sha256"])
    assert manifest.keys() >= {"direct_rlhf", "git_commit", "python", "sources", "started"}
    assert sorted(path.name for path in run.path.iterdir()) == ["manifest.json", "recipe.yaml"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["study"]


def test_an_existing_run_is_refused_with_the_two_ways_on(run, load):
    with pytest.raises(
        ConfigError, match=r"study: this run exists. Use --resume to go on with it, --overwrite to delete it"
    ):
        opened(run.path.parent, load())


def test_resume_and_overwrite_exclude_each_other(tmp_path, load):
    with pytest.raises(ConfigError, match="choose one"):
        opened(tmp_path, load(), resume=True, overwrite=True)


def test_resume_keeps_what_is_there_and_starts_where_nothing_is(tmp_path, load):
    run = opened(tmp_path, load(), resume=True)
    run.finish_stage("sft", "abc", 1.0, {})
    again = opened(tmp_path, load(), resume=True)
    assert again.stage_done("sft", "abc")
    assert again.manifest == run.manifest


def test_overwrite_starts_again(run, load):
    run.finish_stage("sft", "abc", 1.0, {})
    again = opened(run.path.parent, load(seed=1), overwrite=True)
    assert not again.stage_done("sft", "abc")
    assert again.recipe.seed == 1
    assert [path.name for path in run.path.parent.iterdir()] == ["study"]


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, load, flags):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"study: exists and is no run directory .* left alone"):
        opened(tmp_path, load(), **flags)
    assert (tmp_path / "study" / "thesis.txt").read_text() == "mine"


def test_a_crash_while_overwriting_leaves_the_old_run_or_the_new(tmp_path, load, monkeypatch):
    monkeypatch.setattr(directory, "make_manifest", lambda seed, _: {"seed": seed, "id": "x"})  # no git calls
    opened(tmp_path / "count", load(seed=1))
    calls = every_call(lambda: opened(tmp_path / "count", load(seed=2), overwrite=True))
    seen = set()
    for k in range(calls):
        root = tmp_path / str(k)
        opened(root, load(seed=1)).finish_stage("sft", "abc", 1.0, {})
        with FaultyFS(at=k):
            opened(root, load(seed=2), overwrite=True)
        for seed in (1, 2):
            try:
                run = opened(root, load(seed=seed), resume=True)
            except CheckpointError:
                continue
            assert run.stage_done("sft", "abc") == (seed == 1)
            seen.add(seed)
            break
        else:
            raise AssertionError("neither the old run nor the new one is there")
    assert seen == {1, 2}


def test_two_processes_that_make_one_run_do_not_mix(tmp_path, load, monkeypatch):
    def meanwhile(path, loaded):
        fresh = set_up(path, loaded)
        monkeypatch.setattr(directory, "_set_up", set_up)
        opened(tmp_path, load(seed=5))
        return fresh

    set_up = directory._set_up
    monkeypatch.setattr(directory, "_set_up", meanwhile)
    with pytest.raises(ConfigError, match="another process has just made this run"):
        opened(tmp_path, load())
    assert RunDirectory(tmp_path / "study").recipe.seed == 5


@pytest.mark.promise("R2")
@pytest.mark.parametrize("place", ["/dev/null/runs", "/proc/runs"])
def test_a_place_that_cannot_be_written_is_said_before_anything_else(load, place):
    with pytest.raises(ConfigError, match=rf"{place}: cannot be written \(.*\). Choose another output folder"):
        opened(Path(place), load())


@pytest.fixture
def not_root():
    """Acts as a user for whom permissions hold; gives a folder that this user may write."""
    with tempfile.TemporaryDirectory() as name:  # the folders of pytest are closed to other users
        folder = Path(name)
        folder.chmod(0o777)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o777)


@pytest.mark.promise("R2")
@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}, {}])
def test_a_read_only_root_is_said_before_anything_is_made(not_root, load, flags):
    root = not_root / "runs"
    root.mkdir()
    root.chmod(0o555)
    with pytest.raises(ConfigError, match=rf"{root}: cannot be written \(Permission denied\)\. Choose another output"):
        opened(root, load(), **flags)
    assert not list(root.iterdir())


@pytest.mark.promise("R2")
def test_a_run_folder_that_became_read_only_is_said_on_resume(not_root, load):
    run = opened(not_root, load())
    run.path.chmod(0o555)
    with pytest.raises(ConfigError, match=r"study: cannot be written \(Permission denied\)"):
        opened(not_root, load(), resume=True)


@pytest.mark.promise("R2")
def test_a_run_that_vanished_after_it_was_opened_is_said_when_it_is_locked(run):
    shutil.rmtree(run.path)
    with pytest.raises(ConfigError, match=r"study/recipe\.yaml: cannot be read \(No such file"), run.locked():
        pass
    assert not run.path.exists()


@pytest.mark.promise("R2")
def test_the_command_says_so_before_torch_is_imported(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'transformers'):\n"
        "            raise AssertionError('a model is about to be loaded')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
    )
    environment = {"PYTHONPATH": str(tmp_path)}
    ended = run_cli(["run", "quickstart", "--root", "/dev/null/runs"], env=environment)
    assert ended.code == 2
    message = "/dev/null/runs: cannot be written (Not a directory). Choose another output folder."
    assert ended.err == f"direct-rlhf: {message}\n"
    trap = run_cli(["run", "quickstart", "--root", str(tmp_path / "runs")], env=environment)
    assert "a model is about to be loaded" in trap.err  # the trap is set


def test_looking_at_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"is no run directory \(it has no manifest.json\)"):
        RunDirectory(tmp_path)


def test_the_run_room_needs_no_torch(tmp_path):
    code = (
        "import sys, direct_rlhf.run.directory, direct_rlhf.run.context, direct_rlhf.run.signals, direct_rlhf.chat\n"
        "assert not {'torch', 'transformers', 'tensorboard', 'mlflow', 'trackio'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# K9: the recipe of a resumed run


def flat_keys(value, prefix=""):
    if isinstance(value, dict) and value:
        return [key for k, part in value.items() for key in flat_keys(part, f"{prefix}{k}.")]
    return [prefix.rstrip(".")]


class Changed:
    """A recipe in which one key has another value, legal or not."""

    def __init__(self, recipe, key):
        self.name, self.logging, self.seed = recipe.name, recipe.logging, recipe.seed
        self._values = recipe.model_dump(mode="json")
        *path, last = key.split(".")
        section = self._values
        for part in path:
            section = section[part]
        section[last] = ["another", "value"]

    def model_dump(self, mode):
        return self._values


@pytest.mark.promise("K9")
def test_a_change_of_any_key_is_refused_unless_it_is_safe(run, load):
    import dataclasses

    loaded = load()
    keys = flat_keys(loaded.recipe.model_dump(mode="json"))
    assert len(keys) > 80
    refused = {}
    for key in keys:
        if key == "name":
            continue
        changed = dataclasses.replace(loaded, recipe=Changed(loaded.recipe, key))
        try:
            opened(run.path.parent, changed, resume=True)
        except CheckpointError as error:
            refused[key] = str(error)
    for key, message in refused.items():
        assert re.search(
            rf"changed since the run started:\n  {re.escape(key)}: .* is now \['another', 'value'\]\n", message
        )
    sections = ("logging.", "evaluation.", "parallel.")
    safe = {key for key in keys if key in ("name", "description", "threads") or key.startswith(sections)}
    assert set(keys) - set(refused) == safe


@pytest.mark.promise("K9")
def test_all_differences_are_shown_with_both_values(run, load):
    with pytest.raises(CheckpointError) as caught:
        opened(run.path.parent, load(seed=3, ppo={"clip": 0.3}, description="more"), resume=True)
    assert "  ppo.clip: 0.2 is now 0.3\n  seed: 0 is now 3\n" in str(caught.value)
    assert "description:" not in str(caught.value)
    assert "--overwrite" in str(caught.value)


def test_a_safe_change_is_recorded(run, load):
    loaded = load(description="more", threads=1, arms=["base", "direct_ppo", "dpo"], evaluation={"batch_size": 2})
    resumed = opened(run.path.parent, loaded, resume=True)
    assert resumed.recipe == loaded.recipe
    assert resumed.manifest["recipe_sha256"] == loaded.sha256
    assert resumed.manifest["id"] == run.manifest["id"]


def test_an_arm_may_be_added_but_not_dropped(run, load):
    with pytest.raises(CheckpointError, match=r"arms: \['base', 'direct_ppo'\] is now \['base', 'sft'\]"):
        opened(run.path.parent, load(arms=["base", "sft"]), resume=True)


def test_a_stored_recipe_of_another_release_says_so(run, load):
    path = run.path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "future": 1}))
    with pytest.raises(CheckpointError, match=r"recipe.yaml: cannot be read by this release.*manifest.json"):
        opened(run.path.parent, load(), resume=True)


@pytest.mark.promise("X6")
@pytest.mark.parametrize("name", ["../x", "/abs", "a\0b", "con", "x" * 200, ".."])
def test_no_name_leaves_the_run_directory(tmp_path, load, name):
    import dataclasses

    loaded = load()
    evil = dataclasses.replace(loaded, recipe=loaded.recipe.model_copy(update={"name": name}))
    with pytest.raises(ConfigError, match="must be 1 to 100 letters"):
        opened(tmp_path / "runs", evil)
    run = opened(tmp_path / "runs", loaded)
    for use in (
        lambda: run.metrics(name),
        lambda: run.checkpoints(name, 1),
        lambda: run.finish_stage(name, "", 0.0, {}),
        lambda: run.checkpoints("ppo", 1).save(1, {name: {}}, {}),
    ):
        with pytest.raises(ConfigError, match="must be 1 to 100 letters"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# Stages, sources, status


def test_a_stage_is_done_for_its_own_fingerprint_only(run):
    assert run.stage_record("sft") is None
    run.note("sft", {"pairs": 3, "loss": 2.0})
    run.finish_stage("sft", "abc", 1.5, {"loss": math.nan})
    assert run.stage_done("sft", "abc")
    assert not run.stage_done("sft", "abd")
    assert not run.stage_done("dpo", "abc")
    record = run.stage_record("sft")
    assert record["seconds"] == 1.5
    assert record["facts"] == {"pairs": 3, "loss": None}


def test_a_damaged_stage_record_counts_as_not_done(run, caplog):
    run.finish_stage("sft", "abc", 1.5, {})
    (run.path / "stages" / "sft.json").write_text('{"stage"')
    assert not run.stage_done("sft", "abc")
    assert "sft.json: not valid JSON" in caplog.text


def test_a_source_that_changed_since_the_start_is_refused_by_name(run):
    run.check_sources({"helpful.jsonl": "1", "harmless.jsonl": "2"})
    run.check_sources({"helpful.jsonl": "1", "text.jsonl": "3"})
    assert run.manifest["sources"] == {"helpful.jsonl": "1", "harmless.jsonl": "2", "text.jsonl": "3"}
    with pytest.raises(DataError, match=r"changed since the run started: helpful.jsonl, text.jsonl\."):
        run.check_sources({"helpful.jsonl": "9", "harmless.jsonl": "2", "text.jsonl": "9"})


@pytest.mark.promise("T7")
@pytest.mark.parametrize("change", ["edit", "append", "rename", "another file"])
def test_a_changed_row_refuses_the_resume_and_names_its_source(tmp_path, load, change):
    (tmp_path / "pairs").mkdir()
    row = b'{"prompt": "a", "chosen": "good", "rejected": "bad"}\n'
    (tmp_path / "pairs" / "1.jsonl").write_bytes(row * 3)
    (tmp_path / "text.jsonl").write_bytes(b'{"text": "a"}\n')
    loaded = load(data={"preferences": [{"path": "pairs"}], "text": [{"path": "text.jsonl"}]})

    def start(resume):
        run = opened(tmp_path / "runs", loaded, resume=resume)
        run.check_sources(fingerprints(run.recipe.data, tmp_path))

    start(resume=False)
    start(resume=True)
    if change == "edit":
        (tmp_path / "pairs" / "1.jsonl").write_bytes(row * 2 + row.replace(b"good", b"goof"))
    elif change == "append":
        (tmp_path / "pairs" / "1.jsonl").write_bytes(row * 4)
    elif change == "rename":
        (tmp_path / "pairs" / "1.jsonl").rename(tmp_path / "pairs" / "2.jsonl")
    else:
        (tmp_path / "pairs" / "2.jsonl").write_bytes(row)
    with pytest.raises(DataError, match=r"study: changed since the run started: pairs\. Put the old content") as caught:
        start(resume=True)
    assert caught.value.exit_code == 3


def test_the_status_says_how_the_attempt_ended_and_what_can_be_resumed(run):
    run.status("running", None)
    assert read_json(run.path / "status.json")["exit_code"] is None
    run.checkpoints("sft", keep=1).save(10, {}, {})
    run.checkpoints("direct_ppo", keep=1).save(3, {}, {})
    run.status("interrupted", 75, "SIGTERM")
    status = read_json(run.path / "status.json")
    assert {key: status[key] for key in ("state", "exit_code", "reason", "resumable", "last_checkpoint")} == {
        "state": "interrupted",
        "exit_code": 75,
        "reason": "SIGTERM",
        "resumable": True,
        "last_checkpoint": "checkpoints/direct_ppo/step_000003",
    }
    run.status("done", 0)
    assert not read_json(run.path / "status.json")["resumable"]


# Metrics and samples


def test_a_metric_that_is_not_finite_is_null_and_named(run):
    metrics = run.metrics("direct_ppo")
    metrics.log(1, {"kl": torch.tensor(0.5), "loss": math.nan, "note": "x", "hist": [1, math.inf]})
    metrics.log(2, {"kl": 1})
    metrics.close()
    first, second = read_jsonl(run.path / "metrics.jsonl")
    assert first.pop("time") > 0
    assert first == {
        "stage": "direct_ppo",
        "step": 1,
        "kl": 0.5,
        "loss": None,
        "note": "x",
        "hist": [1, None],
        "nonfinite": ["loss", "hist[1]"],
    }
    assert second.keys() == {"stage", "step", "time", "kl"}


@pytest.mark.parametrize("key", ["stage", "step", "time", "nonfinite"])
def test_a_metric_may_not_take_a_name_of_the_record_itself(run, key):
    with pytest.raises(ValueError, match=f"{key}: written by the run directory itself"):
        run.metrics("sft").log(1, {key: 1.0})


def test_rewinding_drops_later_lines_of_this_stage_and_no_others(run):
    for stage in ("sft", "direct_ppo"):
        for step in (1, 2, 3):
            run.metrics(stage).log(step, {"loss": float(step)})
            run.sample(stage, step, [{"answer": f"{stage} {step}"}])
            run.alert(stage, step, {"name": "kl"})
    run.metrics("direct_ppo").rewind(1)
    for name in ("metrics.jsonl", "samples.jsonl", "alerts.jsonl"):
        left = [(row["stage"], row["step"]) for row in read_jsonl(run.path / name)]
        assert left == [("sft", 1), ("sft", 2), ("sft", 3), ("direct_ppo", 1)]
    run.metrics("sft").rewind(-1)
    assert [row["stage"] for row in read_jsonl(run.path / "metrics.jsonl")] == ["direct_ppo"]


def test_a_resumed_run_has_the_metrics_of_one_that_never_stopped(tmp_path, load):
    def train(run, crash_after=None):
        store, metrics = run.checkpoints("sft", keep=2), run.metrics("sft")
        checkpoint = store.latest()
        done = checkpoint.step if checkpoint else 0
        metrics.rewind(done)
        for step in range(done + 1, 8):
            metrics.log(step, {"loss": 1 / step})
            if step == crash_after:
                with (run.path / "metrics.jsonl").open("a") as file:
                    file.write('{"stage": "sft", "st')
                return
            if step % 3 == 0:
                store.save(step, {}, {})

    whole, crashed = opened(tmp_path / "a", load()), opened(tmp_path / "b", load())
    train(whole)
    train(crashed, crash_after=5)
    train(opened(tmp_path / "b", load(), resume=True))

    def lines(run):
        return [{k: v for k, v in row.items() if k != "time"} for row in read_jsonl(run.path / "metrics.jsonl")]

    assert lines(crashed) == lines(whole)


def test_metrics_reach_the_disk_before_a_checkpoint_counts(run, monkeypatch):
    synced = []
    monkeypatch.setattr(directory, "sync_file", lambda path: synced.append(path.name))
    run.metrics("sft").log(1, {"loss": 1.0})
    run.sample("sft", 1, [{"answer": "x"}])
    with crash_at("checkpoint.before_marker"):
        run.checkpoints("sft", 1).save(1, {}, {})
    assert synced == ["metrics.jsonl", "samples.jsonl"]


# Attempts


def test_every_attempt_has_its_own_log_with_the_warnings(run):
    logger = logging.getLogger("direct_rlhf.run.somewhere")
    for number in (1, 2):
        with run.locked() as folder:
            assert folder == run.path / "logs" / f"attempt_{number:03d}"
            logger.warning("attempt %d", number)
            logger.info("said")
        logger.warning("outside")
        lines = (folder / "log.txt").read_text().splitlines()
        assert [line.split(" ", 2)[2] for line in lines] == [
            f"WARNING direct_rlhf.run.somewhere: attempt {number}",
            "INFO direct_rlhf.run.somewhere: said",
        ]
        assert json.loads((folder / "attempt.json").read_text())["pid"] == os.getpid()


def test_warnings_still_reach_the_terminal_while_a_run_is_locked(run):
    code = f"""
import logging
from pathlib import Path
from direct_rlhf.run.directory import RunDirectory
with RunDirectory(Path({str(run.path)!r})).locked():
    logging.getLogger("direct_rlhf.run.x").warning("look here")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == "look here\n"
