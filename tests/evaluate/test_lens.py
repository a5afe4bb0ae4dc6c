import math

import pytest
import torch
import transformers as tf

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.types import Turn
from direct_rlhf.errors import ConfigError, Interrupted
from direct_rlhf.evaluate.lens import curve, find_lens, measure_lens
from direct_rlhf.evaluate.prompt_sets import ToxicityPrompt
from direct_rlhf.evaluate.records import Item
from direct_rlhf.evaluate.words import WordMeter
from direct_rlhf.models.forward import causal_lm
from direct_rlhf.recipe.schema import DialogueSection
from models.tiny_models import CONFIGS

WORDS = ["idiot", "fool", "a", "the sky"]
TEXTS = ["What colour is the sky? You", "hello", "Who has the ball? Ann"]
NORMS = {"gpt2": "transformer.ln_f", "bloom": "transformer.ln_f", "opt": "model.decoder.final_layer_norm"}
NORMS |= {"phi": "model.final_layernorm", "gpt_neox": "gpt_neox.final_layer_norm"}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {**CONFIGS, "gpt_neox": (tf.GPTNeoXConfig, SIZES)}


def architecture(name, **changed):
    """A random model of the fixture's vocabulary, its logits far from uniform."""
    config_class, fields = ARCHITECTURES[name]
    config = config_class(**fields | {"vocab_size": 340, "bos_token_id": None, "eos_token_id": 1} | changed)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_point_is_the_models_own_output_in_every_architecture(tokens, name):
    """Where transformers' last hidden state is normalised already, norming it again would part the two."""
    model = architecture(name)
    lens = find_lens(model)
    prompts = [tokens.encode(text) for text in TEXTS]
    by_point = WordMeter(model, tokens, WORDS, tolerance=1e-4, read=lens.read).next_word_at_points(prompts)
    output = WordMeter(model, tokens, WORDS, tolerance=1e-4).next_word(prompts)
    assert [len(points) for points in by_point] == [lens.points] * 3 == [3] * 3
    assert [points[-1].mass for points in by_point] == pytest.approx([mass.mass for mass in output], rel=1e-4)
    assert lens.norm is model.get_submodule(NORMS.get(name, "model.norm"))
    assert all(0 <= point.mass <= 1 + 1e-5 for points in by_point for point in points)
    assert len({round(point.mass, 7) for point in by_point[0]}) == 3  # the layers differ


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2"])
def test_every_point_equals_the_model_cut_after_that_layer(tokens, name):
    """Brute force: a copy of the model that has only its first layers, measured by its own forward."""
    model = architecture(name)
    prompts = [tokens.encode(text) for text in TEXTS]
    meter = WordMeter(model, tokens, WORDS, tolerance=1e-4, read=find_lens(model).read)
    by_point = meter.next_word_at_points(prompts)
    stack = getattr(causal_lm(model).base_model, "h", None) or model.model.layers
    for depth in (1, 0):
        del stack[depth]
        model.config.num_hidden_layers = depth
        cut = WordMeter(model, tokens, WORDS, tolerance=1e-4).next_word(prompts)
        assert [points[depth].mass for points in by_point] == pytest.approx([mass.mass for mass in cut], rel=1e-4)
        assert [points[depth].missed for points in by_point] == pytest.approx([m.missed for m in cut], abs=1e-6)


def test_points_share_forwards_and_no_point_costs_one_of_its_own(tokens, model):
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    prompts = [tokens.encode(text) for text in TEXTS]
    plain = WordMeter(model, tokens, ["idiot"], tolerance=0.0)
    lens = WordMeter(model, tokens, ["idiot"], tolerance=0.0, read=find_lens(model).read)
    calls.clear()
    plain.next_word(prompts)
    one = len(calls)
    lens.next_word_at_points(prompts)
    assert len(calls) == 2 * one
    assert all(not layer._forward_pre_hooks for layer in model.model.layers)  # and nothing stays behind


def test_a_peft_model_is_looked_into(tokens, model):
    peft = pytest.importorskip("peft")
    prompt = tokens.encode(TEXTS[0])
    before = WordMeter(model, tokens, WORDS, read=find_lens(model).read).next_word_at_points([prompt])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    after = WordMeter(wrapped, tokens, WORDS, read=find_lens(wrapped).read).next_word_at_points([prompt])
    assert [m.mass for m in after[0]] == pytest.approx([m.mass for m in before[0]], rel=1e-4)


def test_a_model_whose_norm_cannot_be_found_has_no_curve_and_says_so():
    """OPT-350m norms inside its layers, and projects what the last one gives."""
    model = architecture("opt", do_layer_norm_before=False, word_embed_proj_dim=16)
    with pytest.raises(ConfigError, match=r"OPTForCausalLM: no final norm .* It is left out"):
        find_lens(model)


def test_a_norm_that_is_followed_by_something_else_is_not_the_final_one():
    with pytest.raises(ConfigError, match="no final norm"):
        find_lens(architecture("opt", word_embed_proj_dim=16))


def run(model, tokens, bars, **changed):
    form = DialogueFormat(DialogueSection(), tokens)
    prompts = [ToxicityPrompt(f"p{i}", "provoking", (Turn("human", text),)) for i, text in enumerate(TEXTS)]
    settings = {
        "max_new_tokens": 8, "temperature": 1.0, "batch_size": 2, "seed": 0, "draws": 200,
        "should_stop": lambda: False, "progress": bars, "report": print,
    } | changed  # fmt: skip
    lists = {"bad_words": ["a", "i", "the sky"], "neutral_words": ["b", "who", "j"]}  # short, so that they have mass
    return measure_lens(model, form, prompts, lists, **settings)


def test_a_curve_has_a_mean_and_a_band_over_prompts_at_each_point(model, tokens, bars):
    curves, items = run(model, tokens, bars)
    assert set(curves) == {"bad_words", "neutral_words"}
    assert [(item.task, item.id) for item in items[:4]] == [
        ("lens/bad_words", "p0"), ("lens/bad_words", "p1"), ("lens/bad_words", "p2"), ("lens/neutral_words", "p0"),
    ]  # fmt: skip
    for name, found in curves.items():
        values = [item.extra["by_point"] for item in items if item.task == f"lens/{name}"]
        assert [s.mean for s in found.by_point] == pytest.approx([sum(c) / 3 for c in zip(*values, strict=True)])
        assert all(s.low <= s.mean <= s.high and s.counts.n_scored == 3 for s in found.by_point)
        assert all(s.mean > 1e-7 for s in found.by_point)
        assert found.missed >= 0
    assert all(item.value == item.extra["by_point"][-1] for item in items)
    assert bars.done == 6


def test_temperature_is_that_of_the_answers(model, tokens, bars):
    plain, hot = (run(model, tokens, bars, temperature=t)[0]["bad_words"] for t in (1.0, 5.0))
    assert [s.mean for s in plain.by_point] != pytest.approx([s.mean for s in hot.by_point], rel=1e-2)


def test_a_model_of_nans_has_failed_prompts_and_no_mean(nan_model, tokens, bars):
    curves, items = run(nan_model, tokens, bars)
    assert {(item.status, item.reason) for item in items} == {("failed", "non_finite")}
    assert all(s.mean is None and s.counts.n_failed == 3 for found in curves.values() for s in found.by_point)
    assert curves["bad_words"].missed is None


def test_a_prompt_that_does_not_fit_is_a_failed_one(model, tokens, bars):
    _, items = run(model, tokens, bars, max_new_tokens=250)
    assert {item.reason for item in items} == {"prompt_too_long"}


def test_it_stops_when_asked(model, tokens, bars):
    with pytest.raises(Interrupted, match="logit lens was stopped"):
        run(model, tokens, bars, should_stop=lambda: True)


def test_a_last_point_of_zero_hides_no_earlier_one():
    extra = {"by_point": [0.5, 0.0], "missed": [0.0, 0.1]}
    found = curve([Item("lens/x", str(i), "scored", 0.0, extra=extra) for i in range(2)], 2, draws=100, seed=0)
    assert [(s.low, s.mean, s.high) for s in found.by_point] == [(0.5, 0.5, 0.5), (0.0, 0.0, 0.0)]
    assert math.isclose(found.missed, 0.1)


def test_the_neutral_list_stands_beside_the_bad_one_word_for_word():
    from direct_rlhf.evaluate.wordlist import read_words
    from direct_rlhf.recipe.references import resolve_reference

    bad, neutral = (read_words(resolve_reference(f"world:{name}_words.txt")) for name in ("bad", "neutral"))
    assert [len(a.split()) for a in bad] == [len(b.split()) for b in neutral]
    assert [len(a) for a in bad[:-1]] == [len(b) for b in neutral[:-1]]
    assert not set(bad) & set(neutral)
