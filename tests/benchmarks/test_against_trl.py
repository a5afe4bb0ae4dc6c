"""Our side of the comparisons with TRL, at a small size; the peers' own environments are not needed."""

import json
from pathlib import Path
from statistics import median

import pytest

import ppo_vs_trl
import reward_model
from peers.side_by_side import OURS, TRL


@pytest.fixture(scope="module")
def ppo_job(tmp_path_factory):
    small = {"answers": 4, "new_tokens": 5, "prompts": 12, "iterations": 4, "epochs": 2, "dtype": "float32"}
    job = ppo_vs_trl.JOB | small | {"folder": str(tmp_path_factory.mktemp("ppo")), "mean_length": None}
    ppo_vs_trl.prepare(job)
    return job


@pytest.fixture(scope="module")
def reward_job(tmp_path_factory):
    job = reward_model.JOB | {"batch_size": 3, "steps": 4, "lengths": "equal", "dtype": "float32"}
    job |= {"folder": str(tmp_path_factory.mktemp("reward"))}
    reward_model.prepare(job)
    return job


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_our_ppo_does_the_work_that_the_job_asks_for(ppo_job, capsys):
    ppo_vs_trl.ours(ppo_job)
    ended = last_line(capsys)
    assert len(ended["steps"]) == ppo_job["iterations"]
    assert min(ended["steps"]) > 0
    assert ended["optimiser_steps"] == ppo_job["epochs"]  # one minibatch an epoch
    assert ended["answer_tokens"] == pytest.approx(5, abs=0.1)
    assert abs(ended["first_kl"]) < 1e-3  # the policy starts as the reference
    assert 17 <= ended["prompt_tokens"] <= 32
    assert (ended["faults"], ended["skipped_steps"]) == (0, 0)
    assert 0 < ended["before_models_mb"] <= ended["training_peak_mb"] <= ended["peak_mb"]


def test_both_ppo_sides_get_the_same_prompts(ppo_job):
    ids = json.loads((Path(ppo_job["folder"]) / "prompts.json").read_text())
    assert len(ids) == ppo_job["prompts"]
    assert {row[0] for row in ids} == {1}  # BOS
    assert all(17 <= len(row) <= ppo_job["longest_prompt"] for row in ids)


def report(**changed):
    facts = {"threads": 2, "optimiser_steps": 1.0, "answer_tokens": 12.0, "prompt_tokens": 25.0, "first_kl": 0.0}
    memory = {"peak_mb": 900.0, "training_peak_mb": 900.0, "before_models_mb": 400.0}
    more = {"faults": 0, "decode_steps": 48.0, "precision": "float32", "native_bfloat16": False}
    return {"steps": [9.0, 9.0, 2.0, 9.0]} | facts | memory | more | changed


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"optimiser_steps": 4.0}, "optimiser_steps"),
        ({"answer_tokens": 48.0}, "answer_tokens"),
        ({"threads": 1}, "threads"),
        ({"first_kl": 3.0}, "first KL"),
        ({"faults": 1}, "faulty steps"),
    ],
)
def test_sides_that_did_not_do_the_same_work_are_found_out(ppo_job, changed, word):
    assert ppo_vs_trl.differences(ppo_job, [report()], [report(answer_tokens=12.5)]) == []
    assert word in ppo_vs_trl.differences(ppo_job, [report(**changed)], [report()])[0]


@pytest.mark.parametrize(
    ("ours", "peak", "marks"), [(1.0, 360.0, ["held", "held"]), (1.5, 900.0, ["missed", "missed"])]
)
def test_a_row_of_the_ppo_table_says_which_goals_are_held(ppo_job, ours, peak, marks):
    mine = [report(steps=[9.0, 9.0, ours, 9.0], peak_mb=peak)]
    figures = ppo_vs_trl.summary(ppo_job, mine, [report()])
    cells = ppo_vs_trl.row("fixed, float32", figures)
    assert len(cells) == len(ppo_vs_trl.HEADER)
    assert [mark in cell for mark, cell in zip(marks, (cells[4], cells[8]), strict=True)] == [True, True]
    assert figures[OURS]["samples_per_second"] == pytest.approx(ppo_job["answers"] / ours)
    assert figures[TRL]["decode_steps"] == 48.0


def test_our_reward_training_does_the_work_that_the_job_asks_for(reward_job, capsys):
    reward_model.ours(reward_job)
    ended = last_line(capsys)
    assert len(ended["steps"]) == ended["optimiser_steps"] == reward_job["steps"]
    assert ended["tokens"] == 2 * reward_job["batch_size"] * (32 + 64)  # each pair once
    assert 0.3 < ended["loss"] < 1.5
    assert ended["faults"] == 0


def test_skewed_answers_are_as_the_docstring_says():
    lengths = sorted(reward_model.answer_lengths("skewed", 4000))
    assert lengths == sorted(reward_model.answer_lengths("skewed", 4000))
    assert (lengths[0], lengths[-1]) == (8, 256)
    assert median(lengths) == pytest.approx(40, abs=2)
    assert sum(lengths) / len(lengths) == pytest.approx(57, abs=3)
    assert lengths[round(0.95 * len(lengths))] == pytest.approx(175, abs=12)


def test_reward_figures_are_against_the_faster_setting_of_trl():
    common = {"tokens": 96.0, "slots": 200.0, "loss": 0.7}
    found = {
        reward_model.OURS: [report(steps=[9, 9, 1.0, 9], **common)],
        reward_model.CHECKPOINTING: [report(steps=[9, 9, 4.0, 9], peak_mb=450.0, **common)],
        reward_model.PLAIN: [report(steps=[9, 9, 3.0, 9], peak_mb=1800.0, **common)],
    }
    figures = reward_model.summary(reward_model.JOB, found)
    assert figures["compared with"] == reward_model.PLAIN
    assert (figures["faster"].value, figures["memory"].value) == (3.0, 0.5)
