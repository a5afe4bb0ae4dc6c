"""Memory by arithmetic against the forecast, which runs the stages' own code on models without storage."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from direct_rlhf.data.types import PreferencePair
from direct_rlhf.recipe.load import load_recipe
from direct_rlhf.scale.memory import host_bytes, phases, roles_of
from direct_rlhf.scale.setting import Setting
from direct_rlhf.scale.shapes import SHAPES, from_config
from direct_rlhf.train.forecast import Longest, forecast_pairs, forecast_ppo
from direct_rlhf.train.pairs import EncodedPair

SHARE = 0.15
TOKENS = SimpleNamespace(eos_id=2, pad_id=0, eos_ids=frozenset([2]), vocab_size=1000, bos_id=1, decode=lambda ids: "")
SMALL = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CONFIGS = {
    "mistral": MistralConfig(sliding_window=None, head_dim=32, **SMALL),
    "llama, tied": LlamaConfig(tie_word_embeddings=True, **SMALL),
    "qwen2": Qwen2Config(**SMALL),
}
USUAL = ["ppo.rollouts=32", "ppo.minibatch_size=16", "ppo.evaluate_prompts=32", "ppo.ptx.weight=0", "data.text=[]"]
SERVER = ["ppo.reward={type: http, url: http://x}"]
CASES = [
    ("mistral", ["model.tuning=full", "model.dtype=float32"]),
    ("qwen2", ["model.tuning=full"]),
    ("llama, tied", ["model.tuning=full", "ppo.optimiser.kind=adamw_8bit", "ppo.lagrangian.enabled=true"]),
    ("mistral", ["model.tuning=full", "model.dtype=float32", "parallel.activation_checkpointing=true"]),
    ("mistral", ["model.dtype=float32", "ppo.samples_per_prompt=4", *SERVER, "ppo.lagrangian.enabled=true"]),
    ("qwen2", []),
    ("mistral", ["model.quantise=nf4", "ppo.critic.optimiser.kind=adamw_8bit"]),
]


def both(config, overrides, stage):
    """The forecast and the arithmetic of one process."""
    recipe = load_recipe("mistral-7b-lora", [*USUAL, *overrides]).recipe
    prompt, answer = [2] * recipe.data.max_prompt_tokens, [2] * recipe.data.max_answer_tokens
    pair = EncodedPair(PreferencePair("longest", (), "", "", "", ""), prompt, answer, answer)
    longest = Longest(prompt, [pair] * recipe.reward.batch_size)
    if stage == "ppo":
        planned = forecast_ppo(recipe, config, TOKENS, longest, device="cuda")
    else:
        planned = forecast_pairs(recipe, config, longest, stage, device="cuda")
    setting = Setting(recipe, from_config("small", config.to_dict()))
    return planned, roles_of(setting, stage), {phase.name: phase.bytes for phase in phases(setting, stage)}


@pytest.mark.parametrize(("name", "overrides"), CASES, ids=str)
@pytest.mark.parametrize("stage", ["ppo", "reward"])
def test_in_one_process_roles_equal_the_forecast_and_phases_lie_within_15_percent(name, overrides, stage):
    planned, roles, found = both(CONFIGS[name], overrides, stage)
    ours = [(role.name, role.weights, role.gradients, role.moments) for role in roles]
    assert ours == [(role.role, role.weights, role.gradients, role.moments) for role in planned.roles]
    assert found.keys() >= ({"sample", "score", "update"} if stage == "ppo" else {"train"})
    shares = {phase: n_bytes / planned.peaks[phase] for phase, n_bytes in found.items()}
    assert {phase: share for phase, share in shares.items() if abs(share - 1) > SHARE} == {}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_sft_and_dpo_agree_too(stage):
    planned, roles, found = both(CONFIGS["mistral"], ["model.tuning=full"], stage)
    assert [role.weights for role in roles] == [role.weights for role in planned.roles]
    assert abs(found["train"] / planned.peaks["train"] - 1) <= SHARE


def setting(recipe, gpus, *overrides):
    return Setting(load_recipe(recipe, list(overrides)).recipe, SHAPES["mistral-7b"], gpus)


def held(one):
    return phases(one, "ppo")[0].parts["weights and moments"]


def test_what_is_kept_is_divided_by_the_processes_that_share_a_copy():
    whole = held(setting("mistral-7b-full", 1))
    assert held(setting("mistral-7b-full", 8)) == round(whole / 8)
    assert held(setting("mistral-7b-full", 64, "parallel.shard_size=8")) == held(setting("mistral-7b-full", 8))
    assert held(setting("mistral-7b-full", 64, "parallel.shard_size=1")) == whole


def test_frozen_models_that_are_not_shared_are_whole_in_every_process():
    shared, apart = (setting("mistral-7b-full", 8, f"parallel.shard_frozen={value}") for value in ("true", "false"))
    frozen = sum(role.weights for role in roles_of(apart, "ppo") if role.frozen)
    assert held(apart) - held(shared) == pytest.approx(frozen * 7 / 8, abs=4)


def test_however_many_gpus_there_are_each_gathers_one_whole_model():
    for gpus in (8, 64, 512, 1024):
        sample, score, _ = phases(setting("mistral-7b-full", gpus), "ppo")
        assert sample.parts["the whole policy, gathered"] == 2 * SHAPES["mistral-7b"].whole
        assert min(sample.bytes, score.bytes) > 2 * SHAPES["mistral-7b"].whole
    assert "the whole policy, gathered" not in phases(setting("mistral-7b-full", 1), "ppo")[0].parts


def test_more_gpus_never_need_more_memory_of_each():
    for recipe in ("mistral-7b-full", "mistral-7b-lora"):
        by_count = [{p.name: p.bytes for p in phases(setting(recipe, n), "ppo")} for n in (2, 8, 64, 512)]
        for fewer, more in pairwise(by_count):
            assert all(more[name] <= fewer[name] for name in fewer)


def test_a_node_loads_as_many_whole_models_into_cpu_memory_as_it_has_processes():
    assert host_bytes(setting("mistral-7b-full", 1)) == 0
    assert host_bytes(setting("mistral-7b-full", 64)) == 8 * 2 * 4 * SHAPES["mistral-7b"].whole
    assert host_bytes(setting("mistral-7b-lora", 4)) == 4 * 2 * SHAPES["mistral-7b"].whole
