"""A whole study in a process of its own, from a file with bad rows to the report, where no connection is possible."""

import json
import shutil
from pathlib import Path

import pytest

from data.pair_files import jsonl, pair_row
from data.test_rows import BAD_LINES
from faults import run_cli
from toys import toy_folder

GOOD = 120
RECIPE = """\
extends: hh-small
data:
  preferences: [{path: pairs.jsonl}]
  max_bad_rows: 0.5
  held_out: 0.3
  max_prompt_tokens: 160
  max_answer_tokens: 64
model: {base: model}
reward: {max_steps: 2, batch_size: 4, normalisation_prompts: 8}
ppo:
  iterations: 1
  rollouts: 4
  minibatch_size: 4
  micro_batch_tokens: 256
  epochs: 1
  evaluate_prompts: 4
  critic: {warmup: 0}
  sampling: {max_new_tokens: 4}
evaluation:
  general: {limit: 1}
  conversation: {limit: 1}
  toxicity: {limit: 1}
  max_new_tokens: 4
  bootstrap_draws: 100
threads: 1
"""


def start(folder: Path, *words: str, timeout: float = 300):
    return run_cli(
        ["run", "study.yaml", *words],
        cwd=folder,
        # the hub may be asked, as on a user's machine, so that a question would be seen
        env={"HF_HUB_OFFLINE": None},
        offline=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a finished study, and how its process ended."""
    folder = tmp_path_factory.mktemp("study")
    toy_folder(folder / "model")
    (folder / "pairs.jsonl").write_bytes(jsonl(*(line for _, _, line in BAD_LINES), *map(pair_row, range(GOOD))))
    (folder / "study.yaml").write_text(RECIPE)
    return folder, start(folder)


@pytest.fixture
def again(study, tmp_path) -> Path:
    """A copy of the finished study that a test may change."""
    return Path(shutil.copytree(study[0], tmp_path / "study"))


@pytest.mark.slow
@pytest.mark.promise("R8")
def test_a_whole_study_needs_no_network(study):
    folder, ended = study
    assert ended.code == 0, ended.err
    assert (folder / "runs/study/report.html").is_file()


@pytest.mark.slow
@pytest.mark.promise("X8")
def test_a_whole_study_asks_nobody(study):
    assert [line for line in study[1].err.splitlines() if "NETWORK" in line] == []


@pytest.mark.slow
def test_a_finished_run_leaves_no_process_behind(study):
    assert study[1].children == ()


@pytest.mark.slow
@pytest.mark.promise("T1")
def test_every_bad_row_is_in_the_runs_list_with_line_and_reason(study):
    run = study[0] / "runs/study"
    listed = [json.loads(line) for line in (run / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["source"], row["reason"]) for row in listed] == [
        (f"pairs.jsonl:{at}", reason) for at, (reason, _, _) in enumerate(BAD_LINES, start=1)
    ]
    counts = json.loads((run / "stages/data.json").read_text())["facts"]["preferences"]
    assert (counts["read"], counts["kept"]) == (GOOD + len(BAD_LINES), GOOD)
    assert {reason: counts[reason] for reason, _, _ in BAD_LINES} == {
        reason: sum(other == reason for other, _, _ in BAD_LINES) for reason, _, _ in BAD_LINES
    }


@pytest.mark.slow
@pytest.mark.promise("T1")
def test_too_many_bad_rows_end_the_run_with_3_and_say_which(again):
    ended = start(again, "name=strict", "data.max_bad_rows=0.01")
    assert ended.code == 3
    malformed = len([reason for reason, _, _ in BAD_LINES if reason != "identical"])
    assert f"pairs.jsonl: {malformed} of {GOOD + len(BAD_LINES)} rows" in ended.err
    assert "pairs.jsonl:1: broken_json" in ended.err
    status = json.loads((again / "runs/strict/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)


@pytest.mark.slow
@pytest.mark.promise("T7")
def test_one_edited_row_ends_the_resume_with_3_before_anything_is_trained(again):
    pairs = again / "pairs.jsonl"
    pairs.write_bytes(pairs.read_bytes().replace(b'good 7"', b'good 8"'))
    metrics = (again / "runs/study/metrics.jsonl").read_bytes()
    ended = start(again, "--resume")
    assert ended.code == 3
    assert "changed since the run started" in ended.err
    assert (again / "runs/study/metrics.jsonl").read_bytes() == metrics
