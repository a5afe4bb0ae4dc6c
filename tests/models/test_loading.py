import json
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, random_batch, tiny_lm, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.errors import ConfigError
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.loading import (
    add_lora,
    autocast,
    base_sha256,
    load_causal_lm,
    parameters_sha256,
    save_causal_lm,
    trainable_parameters,
)
from direct_rlhf.recipe.schema import LoraSection

IDS = random_batch()[0]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["llama", "phi", "bloom", "gpt2"])
def test_dropout_in_a_config_has_no_effect_even_in_train_mode(tmp_path, name):
    model = load_causal_lm(write_checkpoint(tmp_path, name))
    assert not model.training
    expected = logits(model)
    torch.manual_seed(5)
    torch.testing.assert_close(logits(model.train()), expected, atol=1e-6, rtol=0)


def test_loading_keeps_every_weight_and_knows_its_dtype(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen2")
    model = load_causal_lm(str(folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert parameters_sha256(model) == parameters_sha256(tiny_lm("qwen2", scale=1.0))
    assert {p.dtype for p in load_causal_lm(folder, dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_what_cannot_be_loaded_is_said_with_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: no such model.*Give a folder"):
        load_causal_lm(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"config.json is missing.*Give a folder"):
        load_causal_lm(tmp_path)
    folder = write_checkpoint(tmp_path / "pickled")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickled: could not be loaded.*safetensors"):
        load_causal_lm(folder)
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ConfigError, match="no-such-type"):
        load_causal_lm(folder)


def test_a_damaged_or_incomplete_checkpoint_is_never_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_checkpoint(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_causal_lm(folder)
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 of the model's weights are not in its files \(such as model.norm.weight"):
        load_causal_lm(folder)


def test_a_hub_model_without_a_connection_is_said_to_be_out_of_reach(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"nobody/nothing: could not be fetched from the hub.*Check the name"):
        load_causal_lm("nobody/nothing")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_checkpoint_loads_with_plain_transformers_to_equal_logits(tmp_path, name):
    base = write_checkpoint(tmp_path / "base", name)
    model = load_causal_lm(base)
    save_causal_lm(model, load_tokens(str(base)), tmp_path / "out", stop_strings=["\n\nHuman:"], card="# card\n")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(again), logits(model))
    assert again.generation_config.stop_strings == ["\n\nHuman:"]
    assert again.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("tell me").input_ids == load_tokens(str(base)).encode(
        "tell me"
    )
    assert (tmp_path / "out" / "README.md").read_text() == "# card\n"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["mistral", "gpt2", "llama"])
def test_a_lora_model_is_saved_merged_with_its_adapter_beside_it(tmp_path, name):
    from peft import PeftModel

    base = write_checkpoint(tmp_path / "base", name)
    model = add_lora(load_causal_lm(base), LoraSection(rank=4), "policy")
    add_lora(model, LoraSection(rank=4), "critic")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.1 if ".policy." in parameter_name else 3.0)
    before = parameters_sha256(model)
    with pytest.raises(ValueError, match="this model has policy, critic; name the one that is meant"):
        save_causal_lm(model, load_tokens(str(base)), tmp_path / "out", stop_strings=[], card="")
    save_causal_lm(model, load_tokens(str(base)), tmp_path / "out", stop_strings=[], card="", adapter="policy")
    assert parameters_sha256(model) == before
    model.set_adapter("policy")
    expected = logits(model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(logits(on_base), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(load_causal_lm(base))).abs().max() > 1e-3


def test_a_save_that_fails_leaves_the_old_model_and_no_rubbish(tmp_path, monkeypatch):
    base = write_checkpoint(tmp_path / "base")
    model, tokens = load_causal_lm(base), load_tokens(str(base))
    save_causal_lm(model, tokens, tmp_path / "out", stop_strings=[], card="old")
    monkeypatch.setattr(type(tokens), "save", lambda self, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_causal_lm(model, tokens, tmp_path / "out", stop_strings=[], card="new")
    assert (tmp_path / "out" / "README.md").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_saving_again_replaces_the_folder_whole(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    model, tokens = load_causal_lm(base), load_tokens(str(base))
    for card in ("one", "two"):
        save_causal_lm(model, tokens, tmp_path / "out", stop_strings=[], card=card)
        (tmp_path / "out" / f"left_by_{card}").touch()
    assert (tmp_path / "out" / "README.md").read_text() == "two"
    assert not (tmp_path / "out" / "left_by_one").exists()


def test_parameters_hash_sees_one_bit_and_the_base_hash_sees_through_dtype_and_adapters(tmp_path):
    folder = write_checkpoint(tmp_path)
    model = load_causal_lm(folder)
    same = base_sha256(model)
    assert base_sha256(load_causal_lm(folder, dtype="bfloat16")) == same
    assert base_sha256(add_lora(load_causal_lm(folder), LoraSection(rank=2), "reward")) == same
    exact = parameters_sha256(model)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        assert parameters_sha256(model) != exact
        weight[0, 0] += 1
    assert base_sha256(model) != same


def test_adapters_are_float32_drawn_from_their_seed_and_leave_the_global_stream_alone(tmp_path):
    folder = write_checkpoint(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    models = [add_lora(load_causal_lm(folder, dtype="bfloat16"), LoraSection(rank=2), "a", seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    assert all(p.dtype == torch.float32 for p in trainable_parameters(models[0]))
    first, same, other = (torch.cat([p.flatten() for p in trainable_parameters(model)]) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_autocast_computes_in_bfloat16_and_scores_in_float32(tmp_path):
    model = load_causal_lm(write_checkpoint(tmp_path, scale=5.0))
    batch = random_batch()
    plain = token_logprobs(model, *batch).logprob_BL
    with autocast("cpu", "bfloat16"):
        mixed = token_logprobs(model, *batch).logprob_BL
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - plain).abs().max() < 0.3
    with autocast("cpu", "float32"):
        assert torch.equal(token_logprobs(model, *batch).logprob_BL, plain)


def test_no_remote_code_runs(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.C", "AutoModelForCausalLM": "odd.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="contains custom code"):
        load_causal_lm(folder)
    assert not Path(tmp_path / "canary").exists()
