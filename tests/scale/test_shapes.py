import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from direct_rlhf.errors import ConfigError
from direct_rlhf.models.loading import add_lora
from direct_rlhf.recipe.schema import LoraSection
from direct_rlhf.scale.hardware import PROFILES, hardware
from direct_rlhf.scale.shapes import SHAPES, from_config, shape_of

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL),
        LlamaConfig(tie_word_embeddings=True, **SMALL),
        Qwen2Config(**SMALL),
        Qwen3Config(head_dim=16, **SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_a_shape_counts_the_weights_of_the_model_and_of_its_adapters(config):
    shape = from_config("small", json.loads(config.to_json_string(use_diff=False)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.whole == sum(parameter.numel() for parameter in model.parameters())
    assert shape.trunk == sum(parameter.numel() for parameter in model.model.parameters())
    assert sorted(shape.tensors) == sorted(parameter.numel() for parameter in model.model.parameters())
    assert shape.layer == sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        section = LoraSection(rank=4, target_modules=targets)
        adapted = add_lora(AutoModelForCausalLM.from_config(config), section)
        own = [p.numel() for name, p in adapted.named_parameters() if "lora_" in name]
        assert sorted(shape.adapter(section)) == sorted(own)


# What the models' pages say they have
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("mistral-7b", 7_241_732_096),
        ("llama-3-8b", 8_030_261_248),
        ("qwen-2.5-7b", 7_615_616_512),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-70b", 70_553_706_496),
    ],
)
def test_shapes_by_name_have_the_published_numbers_of_weights(name, weights):
    assert SHAPES[name].whole == weights


def test_a_base_is_found_by_its_hub_id_its_folder_or_the_option(tmp_path):
    assert shape_of("mistralai/Mistral-7B-v0.1", None) is SHAPES["mistral-7b"]
    assert shape_of("mistralai/Mistral-7B-v0.1", None, "llama-2-13b") is SHAPES["llama-2-13b"]
    (tmp_path / "config.json").write_text(MistralConfig(**SMALL).to_json_string(use_diff=False))
    assert shape_of(str(tmp_path), None).layers == 2


@pytest.mark.parametrize(
    ("base", "name", "said"),
    [
        ("nobody/nothing", None, r"nobody/nothing: its shape is not known here. Name a similar one with --shape"),
        ("nobody/nothing", "huge", r"--shape huge: no such shape. Known: mistral-7b,"),
    ],
)
def test_an_unknown_base_or_shape_is_refused_with_those_that_are_known(base, name, said):
    with pytest.raises(ConfigError, match=said):
        shape_of(base, None, name)


def test_another_architecture_is_refused_with_what_else_there_is():
    with pytest.raises(ConfigError, match=r"know the architectures llama, .* and this is gpt2.*leave --gpus out"):
        from_config("other", {"model_type": "gpt2"})


# Hardware


def test_every_profile_names_its_source():
    assert set(PROFILES) == {"a100-80gb", "h100", "h200", "l40s"}
    assert all("data sheet" in profile.source for profile in PROFILES.values())


def test_a_profile_of_ones_own_takes_the_rest_from_the_one_it_is_like(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("like: h100\nmemory: 94e9\nbandwidth: 3.9e12\n")
    found = hardware(str(path))
    assert (found.name, found.memory, found.bandwidth, found.bfloat16) == ("mine", 94e9, 3.9e12, 989e12)
    assert found.source == "given by the user"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory: 80e9\n", r"bfloat16, float32, bandwidth, link, network, host_memory: required, or name a profile"),
        ("like: b200\n", r"like = b200: no such profile. Known: a100-80gb, h100"),
        ("like: h100\nmemry: 1\n", r"memry: unknown key. Known: like, memory"),
        ("like: h100\nmemory: -1\n", r"memory = -1: must be a positive number"),
        ("like: h100\nmemory: much\n", r"memory = much: must be a positive number"),
        ("like: h100\nmemory: true\n", r"memory = True: must be a positive number"),
        ("[1]\n", r"must be a section"),
        ("a: [\n", r"not YAML"),
    ],
)
def test_a_wrong_profile_is_refused_with_what_is_wrong(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        hardware(str(path))


def test_an_unknown_profile_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"--hardware h1000: no such profile.*Known: a100-80gb, h100, h200, l40s"):
        hardware("h1000")
