import importlib.util
from pathlib import Path

import pytest
from pydantic import ValidationError

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.load import LoadedRecipe, load_recipe
from direct_rlhf.recipe.needs import idle_processes, missing_libraries, require_libraries, require_processes
from direct_rlhf.recipe.schema import Recipe


@pytest.mark.promise("U1")
def test_processes_that_cannot_be_grouped_as_the_recipe_says_are_refused_with_the_sizes_that_can():
    recipe = Recipe.model_validate({"parallel": {"shard_size": 4}})
    require_processes(recipe, 8)
    with pytest.raises(ConfigError) as caught:
        require_processes(recipe, 6)
    assert str(caught.value) == "parallel.shard_size = 4: must divide the number of processes, 6 (so: 1, 2, 3, 6)"
    require_processes(Recipe(), 7)


def test_stages_whose_steps_leave_processes_idle_are_named():
    recipe = Recipe.model_validate(
        {
            "arms": ["base", "sft", "direct_ppo"],
            "sft": {"batch_size": 6},
            "ppo": {"reward": {"type": "http", "url": "http://x"}},
        }
    )
    assert idle_processes(recipe, 6) == []
    assert idle_processes(recipe, 8) == ["sft.batch_size = 6: 2 of 8 processes idle in its steps"]
    assert len(idle_processes(recipe, 64)) == 2  # PPO's minibatches, too; no reward model is trained


FEW_BITS = {
    "model": {"tuning": "lora", "quantise": "nf4"},
    "ppo": {"optimiser": {"kind": "adamw_8bit"}, "critic": {"optimiser": {"kind": "adamw_8bit"}}},
}


def test_settings_whose_library_is_missing_are_named_with_what_to_install(monkeypatch):
    recipe = Recipe.model_validate(FEW_BITS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    keys = ("model.quantise", "ppo.optimiser.kind", "ppo.critic.optimiser.kind")
    assert [problem.split(" = ")[0] for problem in missing_libraries(recipe)] == list(keys)
    assert missing_libraries(recipe)[0] == (
        'model.quantise = nf4: needs bitsandbytes, which is not installed. Run: pip install "direct-rlhf[gpu]", or set '
        "model.quantise=none"
    )
    assert missing_libraries(Recipe()) == []
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        require_libraries(recipe)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    require_libraries(recipe)


def test_few_bits_run_in_one_process_alone():
    recipe = Recipe.model_validate(FEW_BITS)
    require_processes(recipe, 1)
    with pytest.raises(ConfigError, match=r"^model.quantise = nf4: runs in one process, here are 2"):
        require_processes(recipe, 2)
    eight = Recipe.model_validate({"dpo": {"optimiser": {"kind": "adamw_8bit"}}})
    with pytest.raises(ConfigError, match=r"^dpo.optimiser.kind = adamw_8bit: .*Set dpo.optimiser.kind=adamw"):
        require_processes(eight, 8)


def test_weights_in_four_bits_are_never_trained_nor_made_from_a_trained_model():
    with pytest.raises(ValidationError, match="weights in 4 bits cannot be trained; set tuning: lora"):
        Recipe.model_validate({"model": {"quantise": "nf4"}})
    with pytest.raises(ValidationError, match="sft_ppo starts from the SFT model, whose update"):
        Recipe.model_validate(FEW_BITS | {"arms": ["base", "sft_ppo"]})


def test_a_recipe_without_few_bits_says_nothing_of_them():
    dumped = Recipe().model_dump()
    assert "quantise" not in dumped["model"]
    assert "kind" not in dumped["ppo"]["optimiser"]
    recipe = Recipe.model_validate(FEW_BITS)
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert recipe.model_dump()["ppo"]["optimiser"]["kind"] == "adamw_8bit"


VLLM = {"ppo": {"reward": {"type": "http", "url": "http://x"}}}


def colocated(**more):
    return Recipe.model_validate(VLLM | {"rollout": {"engine": "vllm", "vllm": {"mode": "colocated"}}} | more)


@pytest.mark.promise("U1")
def test_vllm_in_this_process_is_asked_for_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing_libraries(colocated()) == [
        "rollout.vllm.mode = colocated: needs vllm, which is not installed. Run: pip install "
        '"direct-rlhf[vllm]", or set rollout.vllm.mode=server'
    ]
    assert missing_libraries(colocated(arms=["base", "sft"])) == []  # nobody samples by it
    server = {"engine": "vllm", "vllm": {"url": "http://x"}}
    assert missing_libraries(Recipe.model_validate(VLLM | {"rollout": server})) == []
    with pytest.raises(
        ConfigError, match=r"mode = colocated: runs in one process, here are 2\. Start vLLM as a server"
    ):
        require_processes(colocated(), 2)


def test_a_recipe_that_says_nothing_of_rollouts_has_the_hash_that_it_had_and_any_other_has_its_own():
    plain, spelt = LoadedRecipe.of(Recipe(), Path()), Recipe.model_validate({"rollout": {"engine": "native"}})
    assert "rollout:" not in plain.yaml
    assert LoadedRecipe.of(spelt, Path()).sha256 == plain.sha256
    other = LoadedRecipe.of(Recipe.model_validate({"rollout": {"correction": {"truncate": 3}}}), Path())
    assert other.sha256 != plain.sha256
    assert "truncate: 3" in other.yaml


def test_a_server_needs_its_address_and_overrides_reach_a_section_that_the_recipe_does_not_name(tmp_path):
    (tmp_path / "my.yaml").write_text("name: my\n")
    with pytest.raises(ConfigError, match=r"rollout: engine = vllm with mode = server needs vllm\.url"):
        load_recipe(str(tmp_path / "my.yaml"), ["rollout.engine=vllm"])
    found = load_recipe(str(tmp_path / "my.yaml"), ["rollout.engine=vllm", "rollout.vllm.url=http://h:1"]).recipe
    assert found.rollout.vllm.url == "http://h:1"
