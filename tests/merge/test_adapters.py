"""LoRA adapters are merged on the fly as PEFT merges them."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from direct_rlhf.errors import MergeError
from direct_rlhf.merge.executor import Execution
from merge.checkpoint_kit import edit_config, merge, same, tensors, write_family, write_model


def write_adapter(folder, base, *, seed=1, dtype="float32", **settings):
    """A random adapter on the model in ``base``."""
    model = AutoModelForCausalLM.from_pretrained(base)
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    peft = get_peft_model(model, LoraConfig(**defaults | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    peft.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def merged_by_peft(base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload().state_dict()


SETTINGS = {
    "plain": {},
    "half": {"dtype": "bfloat16"},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 20}},
    "some modules": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "a module in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path, name):
    write_model(tmp_path / "base", dtype="float32")
    write_adapter(tmp_path / "adapter", tmp_path / "base", **SETTINGS[name])
    out = merge(tmp_path, tmp_path / "out", merge_method="linear", models=["adapter"])
    expected = merged_by_peft(tmp_path / "base", tmp_path / "adapter")
    changed = 0
    for tensor, found in tensors(out).items():
        torch.testing.assert_close(found, expected[tensor], rtol=1e-6, atol=1e-6 if name != "half" else 2e-3)
        changed += not torch.equal(found, tensors(tmp_path / "base")[tensor])
    assert changed


def test_the_transposed_layers_of_gpt2_are_adapted(tmp_path):
    write_model(tmp_path / "base", "gpt2", dtype="float32")
    write_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    out = merge(tmp_path, tmp_path / "out", merge_method="linear", models=["base+adapter"])
    expected = merged_by_peft(tmp_path / "base", tmp_path / "adapter")
    for tensor, found in tensors(out).items():
        torch.testing.assert_close(found, expected[tensor], rtol=1e-6, atol=1e-6)


def test_the_update_is_added_in_float32_before_the_merge_not_rounded_to_the_bases_type(tmp_path):
    write_model(tmp_path / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        write_adapter(tmp_path / name, tmp_path / "base", seed=seed)
    values = {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"lambda": 0.5}}
    out = tensors(merge(tmp_path, tmp_path / "out", models=["one", "two"], **values))
    base = tensors(tmp_path / "base")
    deltas = [
        {name: t - base[name].float() for name, t in merged_by_peft_float32(tmp_path, adapter).items()}
        for adapter in ("one", "two")
    ]
    name = "model.layers.0.mlp.up_proj.weight"
    exact = base[name].float() + 0.5 * (deltas[0][name] + deltas[1][name])
    torch.testing.assert_close(out[name].float(), exact.bfloat16().float(), rtol=2**-8, atol=1e-6)
    assert (out[name] == exact.bfloat16()).float().mean() > 0.99


def merged_by_peft_float32(root, adapter):
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(model, root / adapter).merge_and_unload().state_dict()


def test_adapters_and_models_mix_and_threads_do_not_change_a_bit(tmp_path):
    write_family(tmp_path)
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    values = {"merge_method": "dare_ties", "base_model": "base", "models": ["a", "b", "adapter", "base+adapter"]}
    first = merge(tmp_path, tmp_path / "first", Execution(threads=1), **values)
    assert same(first, merge(tmp_path, tmp_path / "second", Execution(threads=3, block=96), **values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"this LoRA has use_dora, which is not merged on the fly\. Merge it with PEFT"),
        ({"init_lora_weights": "pissa"}, r"this LoRA has init_lora_weights: pissa"),
        ({"peft_type": "IA3"}, r"an adapter of type IA3\. Only LoRA"),
        ({"base_model_name_or_path": "owner/name"}, r"an adapter for 'owner/name', which is .* Write MODEL\+adapter"),
        ({"base_model_name_or_path": None}, r"an adapter for None"),
    ],
)
@pytest.mark.promise("M1", "X8")
def test_adapters_that_are_not_understood_are_refused(tmp_path, change, message):
    write_family(tmp_path)
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(MergeError, match=message):
        merge(tmp_path, tmp_path / "out", merge_method="linear", models=["a", "adapter"])


@pytest.mark.promise("M1")
def test_an_adapter_of_another_model_is_refused(tmp_path):
    write_model(tmp_path / "base")
    write_model(tmp_path / "other", "gpt2")
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(MergeError, match=r"other\+adapter: it adapts model\.\S+, which other\+adapter does not have"):
        merge(tmp_path, tmp_path / "out", merge_method="linear", models=["other+adapter"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if "up_proj.lora_B" in key)
    save_file(weights | {name: weights[name][:5].clone()}, file)
    with pytest.raises(MergeError, match=r"its update of \S+up_proj is \[5, 32\], the base's tensor \[48, 32\]"):
        merge(tmp_path, tmp_path / "out", merge_method="linear", models=["base+adapter"])
    file.rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(MergeError, match=r"adapter_model.safetensors is missing in .* Only safetensors are read"):
        merge(tmp_path, tmp_path / "out", merge_method="linear", models=["base+adapter"])


@pytest.mark.promise("M1")
def test_a_plus_in_a_folders_name_is_no_adapter(tmp_path):
    write_model(tmp_path / "a+b")
    out = merge(tmp_path, tmp_path / "out", merge_method="linear", models=["a+b"])
    assert same(tmp_path / "a+b", out)


def test_an_adapter_on_a_tied_head_is_refused(tmp_path):
    write_model(tmp_path / "base", "llama", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["lm_head"])).save_pretrained(tmp_path / "adapter")
    edit_config(tmp_path / "base", tie_word_embeddings=True)
    with pytest.raises(MergeError, match=r"adapts lm_head.weight, which its base ties to its embeddings"):
        merge(tmp_path, tmp_path / "out", merge_method="linear", models=["base+adapter"])
