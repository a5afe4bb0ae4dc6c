"""results.json keeps its names: other tools read it."""

import json

import pytest

from direct_rlhf.report.results import write_results

GENERAL_TASK = {"metric", "value", "stderr", "n_scored", "n_failed", "n_unparsed"}


def test_the_names_are_those_of_the_contract(make_run):
    run = make_run()
    path = write_results(run)
    assert path == run / "results.json"
    results = json.loads(path.read_text())
    assert set(results) == {"arms", "comparisons", "reward_model", "seconds", "seed", "recipe_sha256"}
    assert set(results["arms"]) == {"base", "sft", "sft_ppo", "dpo", "direct_ppo"}
    for arm in results["arms"].values():
        assert set(arm) == {"general", "conversation", "toxicity", "model"}
        assert set(arm["general"]) == {"mean", "tasks"}
        assert all(set(task) == GENERAL_TASK for task in arm["general"]["tasks"].values())
        assert set(arm["conversation"]) == {"score", "ci", "by_turn", "n_scored", "n_failed"}
        rates = {"bad_word_probability", "toxic_rate", "refusal_rate", "over_refusal_rate"}
        assert set(arm["toxicity"]) == rates | {"n_scored", "n_failed"}
    assert set(results["comparisons"][0]) == {"arm", "against", "metric", "difference", "ci", "n"}
    assert results["reward_model"] == {"accuracy": 0.731, "ci": [0.694, 0.766], "verdict": "warn"}


def test_the_numbers_are_those_of_the_raw_files(make_run):
    run = make_run()
    arm = json.loads(write_results(run).read_text())["arms"]["direct_ppo"]
    raw = {
        s: json.loads((run / f"evaluation/direct_ppo/{s}.json").read_text())
        for s in ("general", "conversation", "toxicity")
    }
    tasks = {name: {"n_unparsed": 0, **task} for name, task in raw["general"]["tasks"].items()}
    assert arm["general"] == {"mean": raw["general"]["mean"], "tasks": tasks}
    assert arm["conversation"]["score"] == raw["conversation"]["score"]
    assert arm["conversation"]["ci"] == raw["conversation"]["ci"]
    assert arm["toxicity"]["toxic_rate"] == raw["toxicity"]["toxic_rate"]
    assert arm["model"] == "models/direct_ppo"


def test_a_cost_model_has_its_own_entry_where_there_is_one(make_guarded):
    found = json.loads(write_results(make_guarded(arms=("base", "direct_ppo"))).read_text())
    assert found["cost_model"] == {"accuracy": 0.684, "ci": [0.62, 0.74], "verdict": "pass"}
    assert found["reward_model"] == {"accuracy": 0.731, "ci": [0.694, 0.766], "verdict": "warn"}


@pytest.mark.parametrize("suite", ["general", "conversation", "toxicity"])
def test_a_missing_suite_is_null_and_never_zero(make_run, suite):
    run = make_run(arms=("base", "direct_ppo"))
    (run / "evaluation" / "base" / f"{suite}.json").unlink()
    found = json.loads(write_results(run).read_text())["arms"]["base"][suite]
    values = [x for key, x in found.items() if key not in ("tasks", "by_turn", "ci")]
    assert values
    assert set(values) == {None}


def test_an_arm_that_was_not_run_is_absent(make_run):
    run = make_run(arms=("base", "sft"))
    assert set(json.loads(write_results(run).read_text())["arms"]) == {"base", "sft"}


def test_an_empty_run_gives_nulls(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    results = json.loads(write_results(tmp_path).read_text())
    assert results == {
        "arms": {},
        "comparisons": [],
        "reward_model": {"accuracy": None, "ci": [None, None], "verdict": None},
        "seconds": {},
        "seed": None,
        "recipe_sha256": None,
    }
