"""The model card: front matter, numbers with intervals, and code that runs."""

import re

import pytest
import yaml

from direct_rlhf.errors import ConfigError
from direct_rlhf.report.card import model_card


def test_the_front_matter_is_yaml_and_claims_no_licence(make_run):
    front = yaml.safe_load(model_card(make_run(), "direct_ppo").split("---")[1])
    assert front["license"] == "unknown"
    assert front["library_name"] == "transformers"
    assert "base_model" not in front  # world:base is no name on a hub


def test_a_hub_base_and_hub_data_are_named(make_run):
    run = make_run()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["base"] = "org/model-7b"
    recipe["data"]["preferences"] = [{"path": "hf:org/pairs:train"}, {"path": "local.jsonl"}]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    front = yaml.safe_load(model_card(run, "dpo").split("---")[1])
    assert front["base_model"] == "org/model-7b"
    assert front["datasets"] == ["org/pairs"]


def test_numbers_carry_intervals_and_missing_is_said(make_run):
    run = make_run()
    assert "| Toxic answers | 2.4 % [1.7, 3.1] | −20.7 points [−23.7, −17.7] |" in model_card(run, "direct_ppo")
    (run / "evaluation" / "direct_ppo" / "toxicity.json").unlink()
    assert "| Toxic answers | not measured |" in model_card(run, "direct_ppo")


def test_the_code_compiles_and_stops_where_training_stopped(make_run):
    card = model_card(make_run(), "direct_ppo")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert r'stop_strings=["\n\nHuman:"]' in code
    assert r'`"\n\nHuman:"`' in card


def test_an_endpoint_address_is_left_out(make_run):
    run = make_run()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["ppo"]["reward"] = {"type": "http", "url": "https://user:secret@host/score?key=secret"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    card = model_card(run, "direct_ppo")
    assert "secret" not in card
    assert "(left out)" in card


def test_an_unknown_arm_is_refused(make_run):
    with pytest.raises(ConfigError, match="no arm 'dpo'; it has base, sft"):
        model_card(make_run(arms=("base", "sft")), "dpo")
