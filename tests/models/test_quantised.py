"""4-bit trunks and 8-bit moments, with bitsandbytes where it is installed: against the same arithmetic written out."""

import json

import pytest
import torch
from tiny_models import make_context, pair, random_batch, tiny_lm, write_checkpoint, write_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.models.footprint import parameter_bytes, weightless
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.loading import (
    add_lora,
    base_identity,
    load_causal_lm,
    load_for,
    merged_state,
    save_causal_lm,
    save_weights,
)
from direct_rlhf.models.sizes import MOMENT_TABLES, moment_bytes, nf4_bytes
from direct_rlhf.recipe.schema import LoraSection, ModelSection, OptimiserSection
from direct_rlhf.run.packing import pack, unpack
from direct_rlhf.train.step import Optimiser

NEEDED = "bitsandbytes is not installed (pip install 'direct-rlhf[gpu]'): nothing of 4 and 8 bits was tried"
LORA = LoraSection(rank=4)
NF4 = {"tuning": "lora", "quantise": "nf4", "lora": {"rank": 4}}


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason=NEEDED)


def filled(adapted, seed=3):
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def scored(model):
    ids, mask, target = random_batch()
    return token_logprobs(model, ids, mask, target).logprob_BL


# The sizes, without the library


@pytest.mark.parametrize(
    ("n", "expected"), [(4096 * 4096, 8_388_608 + 262_144 + 4 * 1024 + 1092), (64, 32 + 1 + 4 + 1092)]
)
def test_a_weight_in_four_bits_is_half_a_byte_and_a_byte_for_every_64(n, expected):
    assert nf4_bytes(n) == expected


@pytest.mark.parametrize(
    ("n", "kind", "expected"),
    [
        (4096, "adamw", 32768),
        (4095, "adamw_8bit", 32760),
        (4096, "adamw_8bit", 2 * (4096 + 64)),
        (4097, "adamw_8bit", 2 * (4097 + 68)),
    ],
)
def test_moments_in_eight_bits_are_a_byte_and_four_for_every_256_and_small_ones_stay_float32(n, kind, expected):
    assert moment_bytes(n, kind) == expected


# Weights in 4 bits


@pytest.fixture
def four_bits(bitsandbytes, tmp_path):
    folder = write_checkpoint(tmp_path / "base", "mistral")
    return folder, load_causal_lm(folder, quantise="nf4")


def test_the_trunk_alone_is_in_four_bits_and_the_head_is_not(four_bits):
    _, model = four_bits
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {"Linear4bit"}


def test_an_adapter_on_four_bits_has_the_scores_and_gradients_of_one_on_the_numbers_they_stand_for(four_bits):
    folder, model = four_bits
    adapted = filled(add_lora(model, LORA))
    base = merged_state(_silent(adapted))
    filled(adapted)
    twin = AutoModelForCausalLM.from_pretrained(folder)
    twin.load_state_dict(base)
    other = filled(add_lora(twin, LORA))
    with torch.no_grad():  # as a sampler does, before anything is trained
        torch.testing.assert_close(scored(adapted), scored(other), atol=2e-4, rtol=1e-3)
    for one in (adapted, other):
        scored(one).sum().backward()
    gradients = [{n: p.grad for n, p in one.named_parameters() if "lora_" in n} for one in (adapted, other)]
    assert len(gradients[0]) == 2 * 7 * 2
    for name, gradient in gradients[0].items():
        scale = float(gradients[1][name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-3 * scale, rtol=1e-2)


def _silent(adapted):
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    return adapted


@pytest.mark.parametrize("save", ["arm", "weights"])
def test_a_model_on_four_bits_is_saved_as_a_plain_one_with_what_was_trained(four_bits, tmp_path, save):
    folder, model = four_bits
    adapted = filled(add_lora(model, LORA))
    if save == "arm":
        save_causal_lm(adapted, load_tokens(str(folder)), tmp_path / "out", stop_strings=["\n"], card="a card")
    else:
        save_weights(adapted, tmp_path / "out", dtype="float32", adapter="default")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    plain = load_causal_lm(tmp_path / "out")
    assert {type(module).__name__ for module in plain.modules() if hasattr(module, "in_features")} == {"Linear"}
    with torch.no_grad():
        torch.testing.assert_close(scored(plain), scored(adapted), atol=2e-4, rtol=1e-3)


def test_the_identity_of_a_base_in_four_bits_names_them_and_the_weights_they_were_made_from(bitsandbytes, tmp_path):
    folder = str(write_checkpoint(tmp_path))
    section = ModelSection.model_validate({"base": folder, **NF4})
    plain = section.model_copy(update={"quantise": "none"})
    assert base_identity(section) == f"nf4:{base_identity(plain)}"
    assert base_identity(section, load_for(section, folder, dtype="float32", device="cpu")) == base_identity(section)
    assert base_identity(plain, load_for(plain, folder, dtype="float32", device="cpu")) == base_identity(plain)


def test_the_planned_bytes_of_a_trunk_in_four_bits_are_those_of_the_loaded_one(four_bits):
    _, model = four_bits
    held = 0
    for parameter in model.parameters():
        held += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            parts = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            held += sum(part.numel() * part.element_size() for part in parts)
    with weightless() as plan:
        assert parameter_bytes(plan.causal_lm(tiny_lm().config, "float32", quantise="nf4")) == held


# Moments in 8 bits


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in ((64, 128), (100, 41), (7,))]


def stepped(optimiser, first, steps):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in optimiser.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimiser.step(1.0, where="a test")
    return [parameter.detach().clone() for parameter in optimiser.parameters]


EIGHT = OptimiserSection(kind="adamw_8bit", learning_rate=1e-2, weight_decay=0.1)


def test_eight_bit_adamw_follows_adamw(bitsandbytes):
    usual = EIGHT.model_copy(update={"kind": "adamw"})
    start, ours, theirs = (
        torch.cat([w.detach().flatten() for w in weights()]),
        *(
            torch.cat([w.flatten() for w in stepped(Optimiser(weights(), section, 10), 0, 10)])
            for section in (EIGHT, usual)
        ),
    )
    moved = (theirs - start).norm()
    assert moved > 1
    assert (ours - theirs).norm() < 0.1 * moved
    small = [stepped(Optimiser(weights(), section, 10), 0, 10)[-1] for section in (EIGHT, usual)]
    torch.testing.assert_close(*small, atol=1e-6, rtol=1e-5)  # below 4,096 elements moments stay float32


def test_a_run_with_eight_bit_moments_that_was_stopped_goes_on_bit_for_bit(bitsandbytes):
    whole = stepped(Optimiser(weights(), EIGHT, 10), 0, 6)
    first = Optimiser(weights(), EIGHT, 10)
    half = stepped(first, 0, 3)
    kept = pack(first.state())
    again = Optimiser([nn.Parameter(w) for w in half], EIGHT, 10)
    again.load_state(unpack(*kept))
    assert all(torch.equal(a, b) for a, b in zip(stepped(again, 3, 3), whole, strict=True))


def test_the_planned_bytes_of_eight_bit_moments_are_those_that_are_kept(bitsandbytes):
    optimiser = Optimiser(weights(), EIGHT, 10)
    stepped(optimiser, 0, 1)
    places = {}
    for state in optimiser._adamw.state.values():
        for tensor in state.values():
            if isinstance(tensor, torch.Tensor):
                places[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    planned = sum(moment_bytes(w.numel(), "adamw_8bit") for w in optimiser.parameters) + MOMENT_TABLES
    assert sum(places.values()) == planned


# Both, in a run


@pytest.mark.slow
def test_qlora_with_eight_bit_moments_trains_a_reward_model_and_a_policy_and_saves_a_plain_model(
    bitsandbytes, tmp_path
):
    from direct_rlhf.data.types import PreferenceData, Prompt, PromptData, Turn
    from direct_rlhf.train.ppo import Inputs, train_ppo
    from direct_rlhf.train.reward import train_reward_model
    from direct_rlhf.train.start import Sources

    folder = write_checkpoint(tmp_path / "base", "mistral", scale=5.0)
    write_tokenizer(folder)
    eight = {"kind": "adamw_8bit"}
    ctx = make_context(
        tmp_path / "runs",
        folder,
        model={"base": str(folder), **NF4},
        reward={"batch_size": 4, "normalisation_prompts": 8, "fitness": {"on_fail": "continue"}, "optimiser": eight},
        ppo={
            "iterations": 2,
            "rollouts": 8,
            "minibatch_size": 4,
            "epochs": 1,
            "evaluate_every": 1,
            "evaluate_prompts": 4,
            "checkpoint_every": 1,
            "optimiser": {**eight, "learning_rate": 1e-2},
            "critic": {"warmup": 0, "optimiser": eight},
            "sampling": {"max_new_tokens": 6},
        },
    )
    pairs = [pair(i, " good" * (1 + i % 3), " bad") for i in range(12)]
    train_reward_model(ctx, PreferenceData(tuple(pairs[:8]), tuple(pairs[8:]), (), {}))
    prompts = [Prompt(f"p{i}", (Turn("human", f"tell me {i}"),), "helpful", f"x:{i}") for i in range(16)]
    tokens = load_tokens(str(folder))
    sources = Sources(ctx.run.path / "reward_model", tmp_path)
    out = train_ppo(
        ctx,
        PromptData(tuple(prompts[:12]), tuple(prompts[12:]), (), {}),
        Inputs("direct_ppo", str(folder), tokens, sources),
    )
    described = json.loads((ctx.run.path / "reward_model/reward.json").read_text())
    assert described["facts"]["quantise"] == "nf4"
    assert described["facts"]["base_sha256"].startswith("nf4:")
    moved = merged_state(add_lora(load_causal_lm(out), LORA))
    before = merged_state(add_lora(load_causal_lm(folder, quantise="nf4"), LORA))
    assert moved.keys() == before.keys()
    assert any(not torch.equal(moved[name], before[name]) for name in moved)
