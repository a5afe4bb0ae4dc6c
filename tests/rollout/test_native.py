import math

import numpy as np
import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import ConfigError, DivergenceError, Interrupted
from direct_rlhf.rollout.native import draw, sample, sampler_path, uniforms
from direct_rlhf.rollout.types import FinishReason, SampleKey, SamplingSettings

FAST = ["llama", "llama3", "mistral", "mistral-window", "qwen2", "qwen2-window", "qwen3"]
CACHED = ["llama-dynamic", "gemma", "gemma2", "phi", "gpt2", "opt"]
ALL = [*FAST, *CACHED, "mamba"]
PROMPTS = [[1, 5, 9, 12, 7, 30, 8, 9, 10], [1, 44], [1, 3, 3, 17, 20], [1, 8, 9], [1, 60, 22, 4]]
KEYS = [SampleKey(seed=3, prompt_id=f"p{i}", iteration=0, index=0) for i in range(len(PROMPTS))]
SAMPLED = SamplingSettings(max_new_tokens=12)
GREEDY = SamplingSettings(max_new_tokens=12, temperature=0.0)


def answers(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids_BT, rollout.response_mask_BT, strict=True)]


def fresh_logprobs(model, prompt, ids, temperature=1.0):
    """Log-probabilities of an answer from one full forward, without padding or cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("name", ALL)
def test_greedy_answers_equal_those_of_transformers_generate(build, tokens, name):
    model = build(name)
    rollout = sample(model, tokens, PROMPTS, KEYS, GREEDY)
    for prompt, answer in zip(PROMPTS, answers(rollout), strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=2,
            pad_token_id=0,
        )
        assert answer == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ALL)
def test_logprobs_equal_a_fresh_forward(build, tokens, name):
    model = build(name)
    rollout = sample(model, tokens, PROMPTS, KEYS, SamplingSettings(max_new_tokens=12, temperature=0.7))
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers(rollout), strict=True)):
        expected = fresh_logprobs(model, prompt, answer, temperature=0.7)
        assert_close(rollout.logprob_BT[row, : len(answer)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_sample_does_not_depend_on_batch_mates_or_batch_size(build, tokens, name):
    model = build(name)
    together = sample(model, tokens, PROMPTS, KEYS, SAMPLED)
    in_pairs = sample(model, tokens, PROMPTS, KEYS, SAMPLED, batch_size=2)
    assert answers(in_pairs) == answers(together)
    assert_close(in_pairs.logprob_BT, together.logprob_BT, rtol=0, atol=1e-5)
    for row in range(len(PROMPTS)):
        alone = sample(model, tokens, PROMPTS[row : row + 1], KEYS[row : row + 1], SAMPLED)
        assert answers(alone) == answers(together)[row : row + 1]
        n = alone.logprob_BT.shape[1]
        assert_close(alone.logprob_BT[0], together.logprob_BT[row, :n], rtol=0, atol=1e-5)


def test_the_llama_family_runs_in_our_decoder_and_only_stateful_models_without_a_cache(build):
    expected = dict.fromkeys(FAST, "fast") | dict.fromkeys(CACHED, "cached") | {"mamba": "uncached"}
    assert {name: sampler_path(build(name)) for name in ALL} == expected


def test_equal_keys_give_equal_samples_and_any_other_part_of_a_key_another(build, tokens):
    model, prompt = build("mistral"), [PROMPTS[0]]
    settings = SamplingSettings(max_new_tokens=12, temperature=3.0)
    first = sample(model, tokens, prompt, [SampleKey(1, "a", 2, 3)], settings)
    again = sample(model, tokens, prompt, [SampleKey(1, "a", 2, 3)], settings)
    assert answers(first) == answers(again)
    assert torch.equal(first.logprob_BT, again.logprob_BT)
    for other in (SampleKey(0, "a", 2, 3), SampleKey(1, "b", 2, 3), SampleKey(1, "a", 1, 3), SampleKey(1, "a", 2, 0)):
        assert answers(sample(model, tokens, prompt, [other], settings)) != answers(first)


def test_sampled_tokens_follow_the_softmax(build, tokens):
    model, n = build("llama"), 6000
    keys = [SampleKey(0, "p", 0, i) for i in range(n)]
    rollout = sample(model, tokens, [PROMPTS[2]] * n, keys, SamplingSettings(max_new_tokens=1, temperature=2.0))
    with torch.no_grad():
        expected = (model(torch.tensor([PROMPTS[2]])).logits[0, -1] / 2.0).softmax(-1) * n
    counts = torch.bincount(rollout.response_ids_BT[:, 0], minlength=len(expected)).float()
    common = expected >= 5
    chi_square = ((counts - expected).square() / expected)[common].sum().item()
    degrees = int(common.sum()) - 1
    assert degrees > 10
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def test_the_draw_is_the_inverse_of_the_cumulative_distribution():
    logits = torch.tensor([0.1, 0.0, 0.4, 0.5]).log().expand(6, 4)
    token, logprob = draw(logits, torch.tensor([0.0, 0.05, 0.11, 0.49, 0.51, 1 - 2**-23]), 1.0)
    assert token.tolist() == [0, 0, 2, 2, 3, 3]
    assert_close(logprob, logits[0, token])


def test_a_token_of_probability_0_is_never_drawn_even_at_the_largest_uniform():
    logits = torch.full((1, 50_000), -math.inf)
    logits[0, :40_000] = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    token, logprob = draw(logits, torch.tensor([1 - 2**-23]), 1.0)
    assert token.item() < 40_000
    assert logprob.isfinite()


def test_uniforms_are_a_fixed_function_of_the_key_and_longer_draws_extend_shorter_ones():
    keys = [SampleKey(0, "prompt", 0, 0), SampleKey(0, "prompt", 0, 1)]
    drawn = uniforms(keys, 1000)
    assert np.array_equal(uniforms(keys[::-1], 10), drawn[::-1, :10])
    assert drawn[0, :3].tolist() == pytest.approx([0.61161685, 0.7466467, 0.4699034], abs=1e-7)
    assert abs(drawn.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.1


class Scripted(torch.nn.Module):
    """Emits a fixed list of ids for each first prompt token; has neither cache nor positions."""

    def __init__(self, scripts, vocab):
        super().__init__()
        self.scripts, self.vocab = scripts, vocab
        self.config, self.device = type("Config", (), {})(), torch.device("cpu")

    def forward(self, input_ids):
        logits = torch.full((*input_ids.shape, self.vocab), -30.0)
        for row, ids in enumerate(input_ids.tolist()):
            script = self.scripts[ids[0]]
            logits[row, -1, script[(len(ids) - 1) % len(script)]] = 30.0
        return type("Output", (), {"logits": logits})()


VOCABULARY = [
    "",
    "",
    "",
    "Yes",
    ".\n\n",
    "Human",
    ":",
    "\n\n",
    "\n\nHuman:",
    ".",
    "!\n\nHuman: hi",
    b"\xf0\x9f",
    b"\x98\x80",
]
STOP = ("\n\nHuman:",)
ENDINGS = {  # script, keep_stop -> kept ids, number of actions, finish, text
    "EOS": ([3, 9, 2], False, [3, 9, 2], 3, "eos", "Yes."),
    "EOS as the first token": ([2], False, [2], 1, "eos", ""),
    "a second EOS id": ([3, 0], False, [3, 0], 2, "eos", "Yes"),
    "stop string in several tokens": ([3, 7, 5, 6], False, [3, 2], 1, "stop", "Yes"),
    "stop string in one token": ([3, 8], False, [3, 2], 1, "stop", "Yes"),
    "stop string that starts inside a token": ([3, 4, 5, 6], False, [3, 4, 2], 2, "stop", "Yes."),
    "stop string in the middle of a token": ([3, 3, 10], False, [3, 3, 10, 2], 3, "stop", "YesYes!"),
    "stop string first": ([7, 5, 6], False, [7], 1, "stop", ""),
    "stop string alone in one token": ([8], False, [8], 1, "stop", ""),
    "stop string kept": ([3, 4, 5, 6], True, [3, 4, 5, 6], 4, "stop", "Yes."),
    "stop string kept, first": ([7, 5, 6], True, [7, 5, 6], 3, "stop", ""),
    "cap": ([3, 9, 3, 9, 3], False, [3, 9, 3, 9], 4, "length", "Yes.Yes."),
    "cap inside a stop string": ([3, 3, 7, 5, 6], False, [3, 3, 7, 5], 4, "length", "YesYes\n\nHuman"),
    "cap inside a character": ([3, 3, 3, 11], False, [3, 3, 3, 11], 4, "length", "YesYesYes"),
    "a character in two tokens": ([11, 12, 7, 5, 6], False, [11, 12, 7, 5], 4, "length", "😀\n\nHuman"),
}


@pytest.fixture(scope="module")
def scripted_tokens(pieces):
    return pieces([p if isinstance(p, bytes) else p.encode() for p in VOCABULARY], eos_ids=(2, 0))


@pytest.mark.parametrize("ending", ENDINGS)
def test_table_of_endings(scripted_tokens, ending):
    script, keep_stop, kept, n_actions, finish, text = ENDINGS[ending]
    settings = SamplingSettings(max_new_tokens=4, stop_strings=STOP, keep_stop=keep_stop)
    rollout = sample(Scripted({1: script}, len(VOCABULARY)), scripted_tokens, [[1]], KEYS[:1], settings)
    assert answers(rollout) == [kept]
    assert rollout.action_mask_BT.tolist() == [[t < n_actions for t in range(len(kept))]]
    assert rollout.finish == (FinishReason(finish),)
    assert rollout.texts == (text,)
    assert_close(rollout.logprob_BT, torch.zeros(1, len(kept)), rtol=0, atol=1e-6)


def test_rows_of_different_endings_share_a_padded_rollout(scripted_tokens):
    scripts = {1: [3, 9, 3, 9], 3: [2], 5: [3, 7, 5, 6], 6: [7, 5, 6], 9: [3, 2]}
    prompts = [[first] for first in scripts]
    rollout = sample(
        Scripted(scripts, len(VOCABULARY)),
        scripted_tokens,
        prompts,
        KEYS,
        SamplingSettings(4, stop_strings=STOP),
        policy_version=9,
    )
    assert rollout.response_ids_BT.tolist() == [[3, 9, 3, 9], [2, 0, 0, 0], [3, 2, 0, 0], [7, 0, 0, 0], [3, 2, 0, 0]]
    assert rollout.response_mask_BT.sum(1).tolist() == [4, 1, 2, 1, 2]
    assert rollout.action_mask_BT.sum(1).tolist() == [4, 1, 1, 1, 2]
    assert not rollout.logprob_BT[~rollout.action_mask_BT].any()
    assert [reason.value for reason in rollout.finish] == ["length", "eos", "stop", "stop", "eos"]
    assert (rollout.keys, rollout.policy_version, len(rollout)) == (tuple(KEYS), 9, 5)


def test_stop_strings_end_answers_of_a_byte_level_tokenizer():
    """Random bytes, most of them no UTF-8: each text ends before the stop string, and the kept ids decode to it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<eos>", *alphabet, "ĊĊ", ".ĊĊ"]
    bpe = models.BPE({name: i for i, name in enumerate(names)}, [("Ċ", "Ċ"), (".", "ĊĊ")])
    tokenizer = Tokenizer(bpe)
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.decoder = decoders.ByteLevel()
    real = Tokens("test", tokenizer, bos_id=None, eos_id=0, eos_ids=frozenset([0]), pad_id=1, sha256="")
    config = transformers.MistralConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config)
    keys = [SampleKey(0, "p", 0, i) for i in range(100)]
    settings = SamplingSettings(max_new_tokens=40, stop_strings=("\n\n", "a"))
    rollout = sample(model, real, [[5]] * 100, keys, settings)
    for row, (finish, text) in enumerate(zip(rollout.finish, rollout.texts, strict=True)):
        decoded = real.decode(rollout.response_ids_BT[row][rollout.action_mask_BT[row]].tolist())
        assert "\n\n" not in text
        assert "a" not in text
        assert decoded.startswith(text)
        if finish is FinishReason.STOP and text:
            assert len(decoded.removeprefix(text)) <= 2
            assert rollout.response_ids_BT[row][rollout.response_mask_BT[row]][-1] == real.eos_id
    assert set(rollout.finish) == set(FinishReason)


def test_prompts_are_left_padded_with_zeros(build, tokens):
    rollout = sample(build("gpt2"), tokens, PROMPTS[:2], KEYS[:2], SAMPLED)
    assert rollout.prompt_ids_BP.tolist() == [PROMPTS[0], [0] * 7 + PROMPTS[1]]
    assert rollout.prompt_mask_BP.sum(1).tolist() == [9, 2]


def test_streamed_text_adds_up_to_the_answers(scripted_tokens):
    scripts = {1: [11, 12, 7, 9], 3: [3, 4, 5, 6], 5: [3, 2]}
    streamed = {0: [], 1: [], 2: []}
    rollout = sample(
        Scripted(scripts, len(VOCABULARY)),
        scripted_tokens,
        [[1], [3], [5]],
        KEYS[:3],
        SamplingSettings(4, stop_strings=STOP),
        on_text=lambda row, text: streamed[row].append(text),
    )
    assert streamed == {0: ["😀", "\n\n."], 1: ["Yes", "."], 2: ["Yes"]}
    assert tuple("".join(parts) for parts in streamed.values()) == rollout.texts


def test_each_step_reports_the_answers_that_ended(build, tokens):
    ended = []
    sample(build("llama"), tokens, PROMPTS, KEYS, SAMPLED, on_step=ended.append)
    assert sum(ended) == len(PROMPTS)
    assert len(ended) <= 12


def test_an_interruption_leaves_no_answer_and_the_model_as_it_was(build, tokens):
    model = build("llama").train()
    polls = []
    with pytest.raises(Interrupted, match="drawn again on resume"):
        sample(model, tokens, PROMPTS, KEYS, SAMPLED, should_stop=lambda: polls.append(1) or len(polls) > 1)
    assert len(polls) == 2
    assert model.training


def test_dropout_of_a_model_in_training_mode_has_no_effect(build, tokens):
    model = build("gpt2")
    expected = sample(model, tokens, PROMPTS, KEYS, SAMPLED)
    model.train()
    assert torch.equal(sample(model, tokens, PROMPTS, KEYS, SAMPLED).logprob_BT, expected.logprob_BT)


def test_logprobs_can_be_used_in_a_loss(build, tokens):
    rollout = sample(build("llama"), tokens, PROMPTS[:1], KEYS[:1], SAMPLED)
    weight = torch.ones((), requires_grad=True)
    (rollout.logprob_BT * weight).sum().backward()
    assert weight.grad.item() == pytest.approx(rollout.logprob_BT.sum().item())


def test_a_peft_model_samples_like_the_model_it_wraps(build, tokens):
    expected = sample(build("mistral"), tokens, PROMPTS, KEYS, SAMPLED)
    wrapped = peft.get_peft_model(build("mistral"), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert sampler_path(wrapped) == "fast"
    rollout = sample(wrapped, tokens, PROMPTS, KEYS, SAMPLED)
    assert answers(rollout) == answers(expected)
    assert_close(rollout.logprob_BT, expected.logprob_BT, rtol=0, atol=1e-5)


def test_bfloat16_models_give_float32_logprobs_near_those_of_a_fresh_forward(build, tokens):
    model = build("mistral").bfloat16()
    rollout = sample(model, tokens, PROMPTS, KEYS, SAMPLED)
    assert rollout.logprob_BT.dtype == torch.float32
    gaps = [
        (rollout.logprob_BT[row, : len(answer)] - fresh_logprobs(model, prompt, answer)).abs()
        for row, (prompt, answer) in enumerate(zip(PROMPTS, answers(rollout), strict=True))
    ]
    assert torch.cat(gaps).mean() < 0.05


def test_a_policy_of_nan_is_named_with_its_prompt(build, tokens):
    model = build("llama")
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(DivergenceError, match=r"sampling prompt 'p\d' gave a log-probability that is not finite"):
        sample(model, tokens, PROMPTS, KEYS, SAMPLED)


def test_wrong_requests_are_named(build, tokens):
    model = build("llama")
    with pytest.raises(ValueError, match="one key for each"):
        sample(model, tokens, PROMPTS, KEYS[:1], SAMPLED)
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        sample(model, tokens, [[1], []], KEYS[:2], SAMPLED)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        sample(model, tokens, PROMPTS, KEYS, SamplingSettings(max_new_tokens=0))
    with pytest.raises(ConfigError, match="9 tokens and 120 new tokens do not fit the model's 128 positions"):
        sample(model, tokens, PROMPTS, KEYS, SamplingSettings(max_new_tokens=120))
