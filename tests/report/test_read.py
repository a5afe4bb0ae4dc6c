"""A run directory is read tolerantly: missing is missing, damaged is said, nothing becomes 0."""

import json
import shutil

import pytest

from direct_rlhf.errors import DataError
from direct_rlhf.report.read import number, read_jsonl, read_run
from direct_rlhf.report.words import verdicts


def test_numbers_are_finite_and_no_bools():
    assert [number(x) for x in (0, 1.5, True, "3", None, float("nan"), float("inf"), [1])] == [0.0, 1.5, *[None] * 6]


def test_a_folder_that_is_no_run_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(DataError, match=r"no run directory.*Give the folder that `direct-rlhf run` printed"):
        read_run(tmp_path)


def test_the_whole_run_is_read(make_run):
    run = read_run(make_run())
    assert [arm.name for arm in run.arms] == ["base", "sft", "sft_ppo", "dpo", "direct_ppo"]
    assert run.problems == ()
    assert run.seed == 7
    assert run.seconds == {"data": 0.5, "reward_model": 41.2, "direct_ppo": 133.0, "evaluation": 61.5}
    assert list(run.stages) == ["data", "reward_model", "direct_ppo", "evaluation"]  # as they ended
    dpo = run.arm("dpo")
    assert dpo.counts == {"general": (2200, 1), "conversation": (118, 2), "toxicity": (240, 0)}
    assert dpo.by_turn == pytest.approx({"1": 5.53, "2": 4.73})  # a plain number and a {"mean": ...}
    assert dpo.model == "models/dpo"
    assert run.arm("base").model == "world:base"


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", '{"mean": NaN, "tasks": 3}', '{"mean": "0.7", "tasks": {"a": null}}']
)
def test_a_damaged_result_is_missing_and_no_zero(make_run, content):
    path = make_run()
    (path / "evaluation" / "base" / "general.json").write_text(content)
    base = read_run(path).arm("base")
    assert base.general is None
    assert all(task.value is None for task in base.tasks)


def test_a_damaged_file_is_named(make_run):
    path = make_run()
    (path / "evaluation" / "comparisons.json").write_bytes(b"\xff\xfe{")
    assert any(text.startswith("evaluation/comparisons.json cannot be read") for text in read_run(path).problems)


def test_torn_lines_are_passed_over_and_counted(make_run):
    path = make_run()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "direct_ppo", "step": 99, "rew')
    run = read_run(path)
    assert run.problems == ("metrics.jsonl: 1 line(s) cannot be read and were passed over.",)
    assert max(row["step"] for row in run.metrics["direct_ppo"]) == 24


def test_a_step_logged_twice_counts_once(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"stage": "dpo", "step": step, "loss": loss}) + "\n" for step, loss in ((2, 5), (1, 9), (2, 7))
        )
    )
    rows = read_run(tmp_path).metrics["dpo"]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 9), (2, 7)]


def test_a_suite_that_the_recipe_leaves_out_is_no_problem(make_run):
    path = make_run(arms=("base",))
    recipe = (path / "recipe.yaml").read_text().replace("- toxicity\n", "")
    (path / "recipe.yaml").write_text(recipe)
    (path / "evaluation" / "base" / "toxicity.json").unlink()
    assert read_run(path).problems == ()


def test_absent_lines_are_no_lines(tmp_path):
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


def test_models_made_elsewhere_are_compared_with_what_they_were_compared_with(make_run):
    path = make_run(arms=("base", "direct_ppo"))
    for old, new in (("base", "model-b"), ("direct_ppo", "model-a")):
        (path / "evaluation" / old).rename(path / "evaluation" / new)
        for file in (path / "evaluation" / "comparisons.json",):
            file.write_text(file.read_text().replace(f'"{old}"', f'"{new}"'))
    shutil.rmtree(path / "models")
    run = read_run(path)
    assert run.reference == "model-b"
    assert [arm.name for arm in run.arms] == ["model-b", "model-a"]
    assert verdicts(run, "model-a")[1].sentence == "Conversation score +3.50 [+3.00, +4.00] against model-b."


def test_one_model_alone_is_compared_with_nothing(make_run):
    path = make_run()
    (path / "evaluation" / "direct_ppo").rename(path / "lone")
    shutil.rmtree(path / "evaluation")
    shutil.rmtree(path / "models", ignore_errors=True)
    (path / "evaluation").mkdir()
    (path / "lone").rename(path / "evaluation" / "lone")
    run = read_run(path)
    assert [arm.name for arm in run.arms] == ["lone"]
    assert run.reference == "lone"
