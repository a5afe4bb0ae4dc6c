"""The quickstart in small, on the embedded world as it is shipped."""

import json
from pathlib import Path

import pytest

from direct_rlhf import stages
from direct_rlhf.recipe.load import load_recipe

SMALL = [
    "threads=1",
    "reward.max_steps=40",
    "reward.normalisation_prompts=128",
    "reward.fitness.on_fail=continue",
    "sft.max_steps=10",
    "ppo.iterations=4",
    "ppo.rollouts=64",
    "ppo.minibatch_size=32",
    "ppo.evaluate_every=4",
    "ppo.evaluate_prompts=32",
    "evaluation.general.limit=20",
    "evaluation.conversation.limit=20",
    "evaluation.toxicity.limit=60",
    "evaluation.bootstrap_draws=1000",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return stages.run(
        load_recipe("quickstart", SMALL), root=tmp_path_factory.mktemp("runs"), resume=False, overwrite=False
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_ppo_raises_the_reward_of_the_shipped_base_within_a_few_iterations(run):
    rows = [row for row in lines(run / "metrics.jsonl") if row["stage"] == "direct_ppo"]
    assert rows[0]["kl_sequence"] == pytest.approx(0, abs=1e-3)
    assert rows[-1]["reward_mean"] > rows[0]["reward_mean"] + 0.2
    assert 0 < rows[-1]["held_out_kl"] < 12


@pytest.mark.slow
def test_the_reward_model_of_the_world_beats_chance_in_every_kind(run):
    card = json.loads((run / "reward_model/fitness.json").read_text())
    assert card["ci"][0] > 0.6
    assert {"helpful", "harmless", "honest"} <= set(card["by_kind"])


@pytest.mark.slow
def test_results_hold_the_three_arms_with_all_their_numbers(run):
    results = json.loads((run / "results.json").read_text())
    assert set(results["arms"]) == {"base", "sft", "direct_ppo"}
    for arm in results["arms"].values():
        assert set(arm) == {"general", "conversation", "toxicity", "model"}
        assert len(arm["general"]["tasks"]) == 11
        for task in arm["general"]["tasks"].values():
            assert set(task) == {"metric", "value", "stderr", "n_scored", "n_failed", "n_unparsed"}
            assert (task["n_scored"], task["n_failed"]) == (20, 0)
        assert set(arm["conversation"]["by_turn"]) == {"1", "2"}
        assert 1 <= arm["conversation"]["ci"][0] <= arm["conversation"]["score"] <= arm["conversation"]["ci"][1] <= 10
        for rate in ("bad_word_probability", "toxic_rate", "refusal_rate", "over_refusal_rate"):
            assert 0 <= arm["toxicity"][rate] <= 1
    compared = {(row["arm"], row["metric"]) for row in results["comparisons"]}
    for arm in ("sft", "direct_ppo"):
        assert {(arm, "conversation.score"), (arm, "general.mean"), (arm, "toxicity.toxic_rate")} <= compared
    assert results["seed"] == 0
    assert set(results["reward_model"]) == {"accuracy", "ci", "verdict"}


@pytest.mark.slow
def test_no_row_of_the_world_is_lost_without_a_reason(run):
    facts = json.loads((run / "stages/data.json").read_text())["facts"]
    rejected = lines(run / "rejected.jsonl")
    read = sum(facts[name]["read"] for name in ("preferences", "prompts"))
    assert read == facts["preferences"]["kept"] + facts["prompts"]["kept"] + len(rejected)
    assert all(row["reason"] and row["source"] and row["detail"] for row in rejected)


@pytest.mark.slow
def test_the_report_shows_the_arms_and_needs_nothing_from_outside(run):
    page = (run / "report.html").read_text()
    for text in ("miniature", "direct PPO", "SFT", "Content-Security-Policy"):
        assert text.lower() in page.lower()
    assert "<script" not in page
