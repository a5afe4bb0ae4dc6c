import math

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers
from torch.testing import assert_close

from direct_rlhf import precision
from direct_rlhf.rollout import decoder as decoder_module
from direct_rlhf.rollout.decoder import Decoder, compute_dtype, supports
from direct_rlhf.rollout.native import draw, sample
from direct_rlhf.rollout.types import SampleKey, SamplingSettings

PROMPTS = [[1, 5, 9, 12, 7, 30, 8, 9, 10], [1, 44], [1, 3, 3, 17, 20]]


def keys(n):
    return [SampleKey(3, f"p{i}", 0, 0) for i in range(n)]


def own_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", ["mistral", "mistral-window", "qwen2", "qwen2-window", "qwen3", "llama3"])
def test_rows_that_start_move_and_end_at_any_time_keep_the_models_own_logits(build, monkeypatch, name, few):
    model = build(name)
    monkeypatch.setattr(decoder_module, "prefers_onednn", lambda device, dtype: few)
    with torch.inference_mode():
        decoder = Decoder(model, rows=3, slots=24, longest=9)
        rows = [list(prompt) for prompt in PROMPTS]
        logits = decoder.prefill([0, 1, 2], rows)
        for index in range(13):
            for row, ids in enumerate(rows):
                if (index, row) == (4, 1):  # it rests
                    continue
                assert_close(logits[row], own_logits(model, ids), atol=2e-4, rtol=1e-3)
            if index == 3:  # the middle answer has ended; it rests a step, then a new prompt takes its place
                decoder.rest([1])
            if index == 4:
                rows[1] = [1, 7, 8]
                logits[1] = decoder.prefill([1], [rows[1]])[0]
            if index == 8:  # the first one ends, and the last moves to its place
                decoder.keep([2, 1])
                rows, logits = [rows[2], rows[1]], logits[[2, 1]]
            token_A = logits.argmax(-1)
            for ids, token in zip(rows, token_A.tolist(), strict=True):
                ids.append(token)
            logits = decoder.step(token_A)


def test_prompts_that_stand_several_times_run_once(build, tokens, monkeypatch):
    seen = []
    real = Decoder._prefill

    def counting(self, rows, prompts):
        seen.append([list(prompt) for prompt in prompts])
        return real(self, rows, prompts)

    model = build("mistral")
    grouped = [prompt for prompt in PROMPTS for _ in range(4)]
    names = [SampleKey(0, str(row // 4), 0, row % 4) for row in range(12)]
    settings_ = SamplingSettings(10, temperature=2.0)
    supports(model)  # it is tried on a prompt of its own
    monkeypatch.setattr(Decoder, "_prefill", counting)
    together = sample(model, tokens, grouped, names, settings_)
    assert sorted(seen[0]) == sorted(PROMPTS)
    assert len(seen) == 1
    for row in range(12):
        alone = sample(model, tokens, grouped[row : row + 1], names[row : row + 1], settings_)
        n = int(alone.response_mask_BT.sum())
        assert together.response_ids_BT[row, :n].tolist() == alone.response_ids_BT[0].tolist()
        assert_close(together.logprob_BT[row, :n], alone.logprob_BT[0], atol=1e-5, rtol=0)


def test_waiting_prompts_take_the_rows_of_ended_answers_while_others_go_on(build, tokens, monkeypatch):
    fills = []
    real = Decoder.prefill

    def noting(self, rows, prompts):
        fills.append((len(self.first), list(rows)))
        return real(self, rows, prompts)

    model = build("llama")
    prompts, n = [PROMPTS[2]] * 40, 40
    supports(model)
    monkeypatch.setattr(Decoder, "prefill", noting)
    rollout = sample(model, tokens, prompts, keys(n), SamplingSettings(30, temperature=3.0), batch_size=8)
    assert fills[0] == (0, list(range(8)))
    assert any(in_use == 8 and len(rows) < 8 for in_use, rows in fills[1:])  # some rows only: the others go on
    alone = sample(model, tokens, prompts[33:34], keys(n)[33:34], SamplingSettings(30, temperature=3.0))
    length = int(alone.response_mask_BT.sum())
    assert rollout.response_ids_BT[33, :length].tolist() == alone.response_ids_BT[0].tolist()


@pytest.mark.parametrize("fused_bytes", [0, 2**30])
def test_adapters_count_whether_their_update_is_merged_into_a_copy_or_not(build, monkeypatch, fused_bytes):
    monkeypatch.setattr(decoder_module, "FUSED_BYTES", fused_bytes)
    wrapped = peft.get_peft_model(build("qwen2"), peft.LoraConfig(r=2, target_modules="all-linear")).eval()
    plain = own_logits(build("qwen2"), PROMPTS[0])
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.inference_mode():
        logits = Decoder(wrapped, rows=1, slots=12, longest=9).prefill([0], [PROMPTS[0]])[0]
        assert_close(logits, own_logits(wrapped, PROMPTS[0]), atol=1e-4, rtol=1e-3)
        assert (logits - plain).abs().max() > 0.1
        with wrapped.disable_adapter():
            off = Decoder(wrapped, rows=1, slots=12, longest=9).prefill([0], [PROMPTS[0]])[0]
    assert_close(off, plain, atol=1e-4, rtol=1e-3)


def test_a_model_whose_own_forward_differs_is_left_to_it(build, tokens):
    model = build("llama")
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: own(x) + 0.2
    assert not supports(model)
    rollout = sample(model, tokens, PROMPTS[:1], keys(1), SamplingSettings(5, temperature=0.0))
    ids = list(PROMPTS[0])
    for token in rollout.response_ids_BT[0].tolist():
        assert token == int(own_logits(model, ids).argmax())
        ids.append(token)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_computed_only_where_the_processor_has_it(build, monkeypatch, native, expected):
    monkeypatch.setattr(precision, "has_bfloat16", lambda: native)
    model = build("mistral")
    assert compute_dtype(model) is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(model) is expected
        with torch.inference_mode():
            decoder = Decoder(model, rows=2, slots=12, longest=9)
            logits = decoder.prefill([0], [PROMPTS[2]])[0]
            after = decoder.step(logits.argmax(-1, keepdim=True))[0]
    assert decoder.key.dtype is expected
    tolerance = 0.15 if native else 1e-3
    fresh = own_logits(model, PROMPTS[2])
    assert (logits.float() - fresh).abs().max() < tolerance * fresh.abs().max()
    fresh = own_logits(model, [*PROMPTS[2], int(logits.argmax())])
    assert (after.float() - fresh).abs().max() < tolerance * fresh.abs().max()


@settings(max_examples=60, deadline=None)
@given(seed=integers(0, 999), vocabulary=integers(1, 300), u=floats(0, 1 - 2**-23, width=32), spread=integers(0, 30))
def test_the_draw_by_blocks_is_the_inverse_of_the_whole_cumulative_distribution(seed, vocabulary, u, spread):
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    token, logprob = draw(logits, torch.tensor([u], dtype=torch.float32), 1.0)
    p = logits[0].double().softmax(-1).numpy()
    upto = np.concatenate([[0.0], np.cumsum(p)])
    assert p[token.item()] > 0
    assert upto[token.item()] - 1e-5 <= u <= upto[token.item() + 1] + 1e-5
    assert logprob.item() == pytest.approx(math.log(p[token.item()]), abs=1e-4)


def test_a_long_queue_passes_the_last_column_many_times(build, tokens):
    model, settings_ = build("mistral-window"), SamplingSettings(9, temperature=3.0)
    prompts = [PROMPTS[row % 3] for row in range(60)]
    queued = sample(model, tokens, prompts, keys(60), settings_, batch_size=2)
    at_once = sample(model, tokens, prompts, keys(60), settings_)
    assert torch.equal(queued.response_ids_BT, at_once.response_ids_BT)
    assert_close(queued.logprob_BT, at_once.logprob_BT, atol=1e-5, rtol=0)


def test_prompts_beyond_the_token_budget_of_one_forward_are_cut_into_several(build, monkeypatch):
    model = build("llama")
    with torch.inference_mode():
        whole = Decoder(model, rows=3, slots=12, longest=9).prefill([0, 1, 2], PROMPTS)
        monkeypatch.setattr(decoder_module, "PREFILL_TOKENS", 9)
        decoder, sizes = Decoder(model, rows=3, slots=12, longest=9), []
        real = decoder._prefill
        monkeypatch.setattr(decoder, "_prefill", lambda rows, some: sizes.append(len(some)) or real(rows, some))
        assert_close(decoder.prefill([0, 1, 2], PROMPTS), whole, atol=1e-5, rtol=1e-4)
    assert sizes == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [8, 3])
def test_a_weight_that_is_laid_out_for_its_kernel_gives_the_same_products(dtype, rows):
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((512, 256), (512,)))
    x = torch.randn(rows, 256, generator=generator).to(dtype)
    assert weight.numel() >= decoder_module.LAID_OUT
    with torch.inference_mode():
        for given in (bias, None):
            found = decoder_module._linear(weight, given, 8, fuse=True)(x)
            assert_close(found, torch.nn.functional.linear(x, weight, given), atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_that_all_end_with_their_first_token_make_room_for_the_next(build, pieces, name, batch_size):
    n_ids = build(name).config.vocab_size
    every_id_ends = pieces([b"x"] * n_ids, eos_ids=tuple(range(n_ids)))
    prompts = [[1, 5 + row] for row in range(5)]
    rollout = sample(build(name), every_id_ends, prompts, keys(5), SamplingSettings(7), batch_size=batch_size)
    assert rollout.response_mask_BT.tolist() == [[True]] * 5
    for row, prompt in enumerate(prompts):
        token = rollout.response_ids_BT[row, 0]
        expected = own_logits(build(name), prompt).log_softmax(-1)[token]
        assert rollout.logprob_BT[row, 0].item() == pytest.approx(expected.item(), abs=1e-5)
