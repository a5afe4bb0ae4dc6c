"""The GPU benchmark at a toy shape on the CPU, and its bounds by hand at the real one."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import gpu
import tiny
from gpu import GOALS, TOY, Size, all_held, decode_bytes, expect, layers_that_fit, score_flops, update_flops, weights

BODY = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096)
HEAD = 32000 * 4096
GIB = 2**30


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(monkeypatch, capsys, *arguments):
    """The closing line."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", "--rounds", "1", *arguments])
    gpu.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_quick_measures_every_case_on_the_cpu_and_holds_nothing(monkeypatch, capsys):
    line = run(monkeypatch, capsys, "--quick", "--profile")
    assert (line["bench"], line["goals"], line["held"]) == ("gpu", GOALS, False)
    measured = line["measured"]
    assert measured["device"] == "cpu"
    assert min(measured["bandwidth_bytes_per_s"], measured["product_flop_per_s"]) > 0
    for case in GOALS:
        unmeasured = {name for name, value in measured[case].items() if value is None}
        assert unmeasured == ({"times_trl"} if case.startswith("ppo") else set())
        assert min(value for value in measured[case].values() if isinstance(value, int | float)) >= 0
        assert sum(kernel["share"] for kernel in measured[case]["kernels"]) <= 1.001
        assert measured[case]["kernels"][0]["ms"] > 0
        assert len(measured[case]["kernels"]) == gpu.TOP
    for case in ("rollout 64", "rollout 256"):
        assert measured[case]["path"] == "fast"
        assert {"peak_memory_generate_mib", "peak_memory_sample_mib"} <= measured[case].keys()
    for case in ("ppo lora", "ppo full"):
        phases = [measured[case][f"{name}_s"] for name in ("sample", "score", "update")]
        assert sum(phases) == pytest.approx(measured[case]["iteration_s"], abs=0.002)
        assert {f"peak_memory_{name}_mib" for name in ("sample", "score", "update")} <= measured[case].keys()
        assert (measured[case]["answers"], measured[case]["layers"]) == (TOY.answers, TOY.layers)


def test_what_was_left_out_is_null(monkeypatch, capsys):
    line = run(monkeypatch, capsys, "--quick", "--only", "full", "--layers", "1", "--answers", "4")
    assert [case for case in GOALS if line["measured"][case] is not None] == ["ppo full"]
    assert (line["measured"]["ppo full"]["layers"], line["measured"]["ppo full"]["answers"]) == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), "needs a CUDA device"), (("--quick", "--answers", "6"), "multiple of the minibatch, 4; got 6")],
)
def test_what_cannot_be_measured_is_refused_before_any_work(monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, capsys, *arguments)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert words in said.err


def test_the_model_has_the_shape_of_mistral_7b():
    assert weights(Size()) == (BODY, HEAD)
    model = gpu.build(Size(), "meta", torch.bfloat16)
    assert sum(one.numel() for one in model.parameters()) == 7_241_732_096
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert model.config.sliding_window is None


def test_a_decode_step_reads_the_weights_and_the_keys_and_values_of_the_mean_length():
    cache = 2 * 32 * 8 * 128 * 2  # bytes a token
    for batch in (64, 256):
        assert decode_bytes(Size(), batch, 2) == 2 * (BODY + HEAD) + batch * (256 + 128) * cache


def test_an_update_is_counted_as_six_or_with_lora_four_operations_a_weight_and_token():
    tokens = 512 * (2 * BODY) + 256 * HEAD
    assert update_flops(Size(), 256, lora=False) == 6 * 256 * tokens
    assert update_flops(Size(), 256, lora=True) == 4 * 256 * tokens
    assert score_flops(Size(), 256) == 2 * 256 * tokens


def test_full_tuning_takes_the_layers_that_fit():
    found = [layers_that_fit(Size(), free * GIB) for free in (40, 80, 139, 200, 10_000)]
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (3, 32)
    for free, layers in zip((40, 80, 139, 200), found, strict=False):
        states = gpu.STATES * (weights(replace(Size(), layers=layers))[0] + 2 * HEAD)
        assert states < 0.85 * free * GIB
    assert layers_that_fit(replace(Size(), micro_batch_tokens=2048), 139 * GIB) > found[2]
    with pytest.raises(SystemExit, match=r"does not fit 8\.0 GiB"):
        layers_that_fit(Size(), 8 * GIB)


def test_no_token_ends_an_answer_on_either_side():
    model = gpu.build(TOY, "cpu", torch.float32)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tiny.EOS] = 1.0
        model.model.norm.weight.fill_(50.0)  # EOS is likely wherever the hidden state's sum is positive
    prompts = tiny.prompts(16, TOY.prompt, shortest=TOY.prompt)
    answers = gpu.ours(model, prompts, TOY.new, on_step=lambda _: None, seed=0)
    assert bool((answers.response_ids_BT == tiny.EOS).any())
    assert bool(answers.action_mask_BT.all())
    assert gpu.generate(model, prompts, TOY.new) == answers.action_mask_BT.numel() == 16 * TOY.new


def test_work_that_is_not_what_was_meant_ends_the_benchmark():
    expect(12, 12, "tokens")
    with pytest.raises(SystemExit, match="tokens: 11 instead of 12"):
        expect(11, 12, "tokens")


@pytest.mark.parametrize("missed", [None, 0.1])
def test_goals_are_held_only_if_all_of_them_were_measured_and_reached(missed):
    reached = {case: {name: 2 * goal for name, goal in goals.items()} for case, goals in GOALS.items()}
    assert all_held(reached)
    assert not all_held(reached | {"ppo full": None})
    for case, goals in GOALS.items():
        for name in goals:
            assert not all_held(reached | {case: reached[case] | {name: missed}})
