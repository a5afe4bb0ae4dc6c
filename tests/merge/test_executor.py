import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from direct_rlhf.errors import Interrupted, MergeError
from direct_rlhf.merge.executor import Execution
from direct_rlhf.merge.methods import METHODS
from direct_rlhf.merge.threads import MOMENT, Part, at_most
from direct_rlhf.merge.types import Block, Grain, Method
from direct_rlhf.recipe.merge_methods import LinearParameters
from merge.checkpoint_kit import (
    SHARDED,
    edit_config,
    merge,
    reshard,
    rewrite,
    same,
    settings_for,
    tensors,
    write_family,
    write_model,
)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family"))


def mean_of(block: Block, parameters: LinearParameters, survey: object) -> torch.Tensor:
    return torch.stack([expert.float() for expert in block.experts]).mean(0)


def plain_mean(grain: Grain, merge_block: Any = mean_of, **fields: Any) -> Execution:
    """An executor whose `linear` is a plain mean, run on pieces of a kind."""
    method = Method(
        "linear", "Mean", "tests", LinearParameters, lambda p: grain, merge_block, frozenset(), needs_base=False
    )
    return Execution(methods={"linear": method}, **fields)


# M4, as far as it is the executor's: what goes in comes out


@pytest.mark.promise("M4")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", ["5GB", SHARDED])
def test_one_model_in_is_the_same_model_out(tmp_path, dtype, shard):
    write_model(tmp_path / "a", dtype=dtype, shard=shard)
    out = merge(tmp_path, tmp_path / "out", merge_method="linear", models=["a"])
    assert same(tmp_path / "a", out)


def test_a_file_that_is_merged_alone_comes_out_byte_for_byte(tmp_path):
    write_model(tmp_path / "a")
    out = merge(tmp_path, tmp_path / "out", merge_method="linear", models=["a"])
    assert sorted(tensors(out)) == sorted(tensors(tmp_path / "a"))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "a", out)]
    assert sizes[0] == sizes[1]


@pytest.mark.promise("M4")
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"linear", "slerp", "model_stock"}))
def test_scale_0_is_the_base_to_the_last_bit(family, tmp_path, method):
    out = merge(family, tmp_path / "out", parameters={"lambda": 0}, **settings_for(method))
    assert same(family / "base", out)


@pytest.mark.promise("M4")
def test_a_negative_zero_of_the_base_survives(tmp_path):
    def signed(found):
        found["model.norm.weight"].zero_().neg_()
        return found

    write_family(tmp_path)
    for model in ("base", "a", "b"):
        rewrite(tmp_path / model, signed)
    out = merge(tmp_path, tmp_path / "out", merge_method="task_arithmetic", base_model="base")
    assert tensors(out)["model.norm.weight"].signbit().all()


# M3


@pytest.mark.promise("M3")
@pytest.mark.parametrize("method", sorted(METHODS))
def test_plain_transformers_loads_the_merge_of_every_method(family, tmp_path, method):
    out = merge(family, tmp_path / "out", **settings_for(method))
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    ids = AutoTokenizer.from_pretrained(out)("tell me one", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.promise("M3")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "bloom", "opt"])
@pytest.mark.parametrize("method", ["linear", "ties", "tsv_m"])
def test_tied_weights_merge_once_and_stay_tied(tmp_path, name, method):
    write_family(tmp_path, name)
    out = merge(tmp_path, tmp_path / "out", **settings_for(method))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tensors(out).keys() == tensors(tmp_path / "a").keys()


def with_head(scale):
    return lambda found: found | {"lm_head.weight": scale * found["model.embed_tokens.weight"].clone()}


@pytest.mark.promise("M3")
def test_a_tied_head_that_is_stored_all_the_same_is_left_out(tmp_path):
    write_family(tmp_path, "llama")
    expected = merge(tmp_path, tmp_path / "expected", merge_method="linear")
    rewrite(tmp_path / "b", with_head(1))
    out = merge(tmp_path, tmp_path / "out", merge_method="linear")
    assert same(expected, out)


@pytest.mark.promise("M3")
def test_a_tied_head_that_is_not_the_embeddings_is_refused(tmp_path):
    write_family(tmp_path, "llama")
    rewrite(tmp_path / "b", with_head(2))
    with pytest.raises(MergeError, match=r"b: its config ties the head to the embeddings.*another head"):
        merge(tmp_path, tmp_path / "out", merge_method="linear")
    assert not (tmp_path / "out").exists()


@pytest.mark.promise("M3")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_result_that_is_not_finite_is_refused_by_name_and_leaves_nothing(tmp_path, bad):
    def spoil(found):
        found["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
        return found

    write_family(tmp_path)
    rewrite(tmp_path / "b", spoil)
    with pytest.raises(MergeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds NaN or infinity in b"):
        merge(tmp_path, tmp_path / "out", merge_method="linear")
    assert not any("out" in path.name for path in tmp_path.iterdir())


@pytest.mark.promise("M3")
def test_a_result_that_its_type_cannot_hold_is_refused(tmp_path):
    def enlarge(found):
        found["model.norm.weight"] += 60000
        return found

    write_family(tmp_path, dtype="float32")
    for model in ("a", "b"):
        rewrite(tmp_path / model, enlarge)
    parameters = {"weight": 1, "normalize": False}
    with pytest.raises(MergeError, match=r"model\.norm\.weight: the result is beyond the range of float16"):
        merge(tmp_path, tmp_path / "out", merge_method="linear", parameters=parameters, out_dtype="float16")
    merge(tmp_path, tmp_path / "out", merge_method="linear", parameters=parameters, out_dtype="bfloat16")


# Types


def test_types_may_be_mixed_and_each_tensor_keeps_that_of_the_base(tmp_path):
    write_model(tmp_path / "base", dtype="float16")
    write_model(tmp_path / "a", seed=1, dtype="bfloat16")
    write_model(tmp_path / "b", seed=2, dtype="float32")

    def norm_in_float32(found):
        return found | {"model.norm.weight": found["model.norm.weight"].float()}

    rewrite(tmp_path / "base", norm_in_float32)
    out = merge(tmp_path, tmp_path / "out", merge_method="task_arithmetic", base_model="base", parameters={"lambda": 1})
    found, models = tensors(out), [tensors(tmp_path / name) for name in ("base", "a", "b")]
    assert found.pop("model.norm.weight").dtype == torch.float32
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    for name, tensor in found.items():
        base, a, b = (model[name].float() for model in models)
        torch.testing.assert_close(tensor, (a + b - base).half())


@pytest.mark.parametrize(("key", "dtype"), [("dtype", "float32"), ("out_dtype", "bfloat16"), ("dtype", "float16")])
def test_what_is_stored_can_be_chosen(family, tmp_path, key, dtype):
    out = merge(family, tmp_path / "out", merge_method="linear", **{key: dtype})
    assert {tensor.dtype for tensor in tensors(out).values()} == {getattr(torch, dtype)}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_a_table_that_is_no_weight_is_copied_and_must_agree(tmp_path):
    def with_counter(value):
        return lambda found: found | {"model.steps": torch.tensor([value])}

    write_family(tmp_path)
    for model in ("base", "a", "b"):
        rewrite(tmp_path / model, with_counter(7))
    out = merge(tmp_path, tmp_path / "out", merge_method="ties", base_model="base")
    assert torch.equal(tensors(out)["model.steps"], torch.tensor([7]))
    rewrite(tmp_path / "b", with_counter(8))
    with pytest.raises(MergeError, match=r"model\.steps: is no weight.*differs in .*b\. Models must agree"):
        merge(tmp_path, tmp_path / "again", merge_method="ties", base_model="base")


# M5


@pytest.mark.promise("M5")
@pytest.mark.parametrize("method", sorted(METHODS))
def test_shards_threads_and_blocks_do_not_change_a_bit(family, tmp_path, method):
    values = settings_for(method)
    expected = merge(family, tmp_path / "expected", Execution(threads=1), **values)
    other = tmp_path / "other"
    for number, model in enumerate(("base", "a", "b", "c"), start=1):
        reshard(family / model, other / model, number + 1, reverse=number % 2 == 0)
    out = merge(other, tmp_path / "out", Execution(threads=3, block=96), shard_size="20KB", **values)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert same(expected, out)


@pytest.mark.promise("M5")
@pytest.mark.parametrize("grain", list(Grain))
@given(threads=st.integers(1, 4), block=st.integers(100, 3000))
@settings(max_examples=20)
def test_every_grain_gives_the_same_mean(family, tmp_path_factory, grain, threads, block):
    folder = tmp_path_factory.mktemp("out")
    out = merge(family, folder / "out", plain_mean(grain, threads=threads, block=block), merge_method="linear")
    for name, tensor in tensors(out).items():
        a, b = (tensors(family / model)[name].float() for model in "ab")
        assert torch.equal(tensor, ((a + b) / 2).bfloat16())


@pytest.mark.promise("M5")
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.random])
def test_a_random_merge_repeats_with_its_seed_whatever_the_order_of_models(family, tmp_path, method):
    values = settings_for(method) | {"parameters": {"density": 0.5}}
    first = merge(family, tmp_path / "first", seed=1, **values)
    assert same(first, merge(family, tmp_path / "again", seed=1, **values))
    assert not same(first, merge(family, tmp_path / "other", seed=2, **values))
    turned = tensors(merge(family, tmp_path / "turned", seed=1, **values | {"models": ["c", "a", "b"]}))
    for name, tensor in tensors(first).items():
        torch.testing.assert_close(tensor, turned[name], rtol=2**-7, atol=1e-6)  # another order of addition


# M6


@pytest.mark.promise("M6")
@given(held=st.lists(st.integers(1, 50), max_size=20), threads=st.integers(1, 5), room=st.integers(1, 80))
def test_parts_in_work_never_hold_more_than_the_room_or_one_alone(held, threads, room):
    parts: list = [Part(None, number, number, held=size) for number, size in enumerate(held)]  # type: ignore[arg-type]
    working: list[Part] = []
    most: list[tuple[int, int]] = []

    def do(part: Part) -> None:
        working.append(part)
        most.append((len(working), sum(one.held for one in list(working))))
        working.remove(part)

    assert sorted(part.start for part in at_most(parts, do, threads, room, lambda: None)) == list(range(len(held)))
    assert all(count == 1 or (count <= threads and size <= room) for count, size in most)


MANY_LAYERS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from direct_rlhf.merge.executor import Execution, merge_models
from direct_rlhf.merge.types import Grain, Method
from direct_rlhf.recipe.merge import merge_of
from direct_rlhf.recipe.merge_methods import LinearParameters

root, grain = Path(sys.argv[1]), Grain(sys.argv[2])

def megabytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024 / 1e6

def mean(block, parameters, survey):
    global most
    most = max(most, megabytes("RssAnon"))
    return sum(expert.float() for expert in block.experts) / len(block.experts)

method = Method("linear", "Mean", "tests", LinearParameters, lambda p: grain, mean, frozenset(), needs_base=False)
values = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}
for layers in (4, 60):
    for model in "ab":
        (root / str(layers) / model).mkdir(parents=True)
        tensors = {f"model.layers.{n}.w": torch.full((512, 1024), n + 1.0) for n in range(layers)}
        save_file(tensors, root / str(layers) / model / "model.safetensors")
        (root / str(layers) / model / "config.json").write_text(json.dumps({"model_type": "toy"}))
    del tensors
    before = most = megabytes("RssAnon")
    how = Execution(threads=2, methods={"linear": method})
    merge_models(merge_of(values, root / str(layers)), root / str(layers) / "out", how=how)
print(most - before)
"""


@pytest.mark.promise("M6")
@pytest.mark.parametrize("grain", [Grain.ELEMENT, Grain.TENSOR])
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, grain):
    """Sixty tensors of 2 MB, two threads, each with at most the result and what the method makes: a few of them."""
    done = subprocess.run(
        [sys.executable, "-c", MANY_LAYERS, str(tmp_path), grain.value],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back to the system at once
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout.splitlines()[-1]) < 2 * 4 * 2.1 + 8


# Being stopped, and what else a caller hands in


def slow_mean(block, parameters, survey):
    time.sleep(2 * MOMENT)
    return mean_of(block, parameters, survey)


@pytest.mark.promise("S1")
def test_a_stop_is_heard_between_tensors_and_leaves_nothing(family, tmp_path):
    asked = iter([False, False, True])
    how = plain_mean(Grain.TENSOR, slow_mean, threads=1, should_stop=lambda: next(asked))
    with pytest.raises(Interrupted, match="stopped on request, nothing is left of it"):
        merge(family, tmp_path / "out", how, merge_method="linear")
    assert list(tmp_path.iterdir()) == []


def test_what_a_user_may_overlook_is_said(tmp_path):
    write_family(tmp_path)
    edit_config(tmp_path / "b", rope_theta=5.0)
    edit_config(tmp_path / "a", rope_theta=6.0)
    (tmp_path / "b" / "tokenizer.json").unlink()
    said: list[str] = []
    out = merge(tmp_path, tmp_path / "out", Execution(say=said.append), merge_method="linear", seed=3)
    assert said == [
        "Note: seed has no effect: linear draws nothing",
        "Note: rope_theta is 5.0 in b; the result keeps 6.0 of a",
        "Note: b has no tokenizer; it is taken to use that of the others",
    ]
    assert all(note.removeprefix("Note: ") in (out / "README.md").read_text() for note in said)


def test_the_torch_threads_are_put_back(family, tmp_path):
    before = torch.get_num_threads()
    merge(family, tmp_path / "out", merge_method="linear")
    assert torch.get_num_threads() == before


# Other vocabulary rows


def more_rows(found):
    return found | {
        name: torch.cat([found[name], torch.full((2, 32), 0.5).bfloat16()])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }


@pytest.mark.parametrize("source", ["base", "b"])
def test_common_rows_are_merged_and_the_others_are_those_of_the_tokenizers_model(tmp_path, source):
    write_family(tmp_path)
    expected = tensors(merge(tmp_path, tmp_path / "expected", merge_method="ties", base_model="base"))
    rewrite(tmp_path / "b", more_rows)
    edit_config(tmp_path / "b", vocab_size=322)
    out = merge(
        tmp_path,
        tmp_path / "out",
        merge_method="ties",
        base_model="base",
        vocabulary="common_rows",
        tokenizer_source=source,
    )
    found = tensors(out)
    rows = 320 if source == "base" else 322
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
    for name, tensor in found.items():
        assert torch.equal(tensor[:320], expected[name][:320]), name
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert found[name].shape[0] == rows
        assert (found[name][320:] == 0.5).all()
    AutoModelForCausalLM.from_pretrained(out)
