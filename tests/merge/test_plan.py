"""M1: what does not fit together is refused before one weight is read."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from direct_rlhf.errors import ConfigError, MergeError
from direct_rlhf.merge import plan as planning
from direct_rlhf.merge.plan import plan_merge, summary
from direct_rlhf.merge.weights import Mapped
from direct_rlhf.recipe.merge import merge_of
from merge.checkpoint_kit import edit_config, merge, rewrite, write_family

TIES = {"merge_method": "ties", "base_model": "base", "models": ["a", "b"]}


@pytest.fixture
def root(tmp_path):
    return write_family(tmp_path / "models")


@pytest.fixture(autouse=True)
def spy(monkeypatch):
    """Counts the tensors that are read."""
    reads = []
    monkeypatch.setattr(Mapped, "_file", lambda self, path: reads.append(path))
    yield reads
    assert reads == []


def edit_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rename_token(content):
    vocabulary = content["model"]["vocab"]
    token = next(name for name, index in vocabulary.items() if index == 200)
    vocabulary["zz"] = vocabulary.pop(token)


def add_token(content):
    content["added_tokens"].append({"id": 320, "content": "<|im_start|>", "special": True})


def swap_tokens(content):
    vocabulary = content["model"]["vocab"]
    one, other = (next(name for name, index in vocabulary.items() if index == wanted) for wanted in (10, 11))
    vocabulary[one], vocabulary[other] = 11, 10


def to_pickle(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def without(name):
    return lambda folder: rewrite(folder, lambda found: {k: v for k, v in found.items() if k != name})


def narrower(folder):
    rewrite(folder, lambda found: found | {"model.layers.0.mlp.up_proj.weight": torch.zeros(47, 32).bfloat16()})


def wider_vocabulary(folder):
    def wider(found):
        names = ("model.embed_tokens.weight", "lm_head.weight")
        return found | {name: torch.zeros(322, 32).bfloat16() for name in names}

    rewrite(folder, wider)


def as_type(dtype):
    def change(folder):
        rewrite(folder, lambda found: found | {"model.norm.weight": found["model.norm.weight"].to(dtype)})

    return change


def missing_shard(folder):
    content = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def outside(folder):
    content = {"metadata": {}, "weight_map": {"model.norm.weight": "../base/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


MISMATCHES = [
    pytest.param(
        lambda b: edit_config(b, model_type="llama", architectures=["LlamaForCausalLM"]),
        r"^b: its architecture is llama \(LlamaForCausalLM\), that of base mistral \(MistralForCausalLM\)\.",
        id="architecture",
    ),
    pytest.param(
        lambda b: edit_config(b, num_key_value_heads=4),
        r"^b: num_key_value_heads is 4 in its config.json, 2",
        id="heads",
    ),
    pytest.param(
        lambda b: edit_config(b, num_local_experts=8), None, id="a key that only one config has is no mismatch"
    ),
    pytest.param(lambda b: edit_config(b, tie_word_embeddings=True), r"^b: tie_word_embeddings is True", id="tied"),
    pytest.param(
        lambda b: edit_config(b, quantization_config={"bits": 4}),
        r"^b: it is quantised .* Merge the model it was made from",
        id="quantised",
    ),
    pytest.param(
        lambda b: edit_config(b, model_type=None), r"^b: .*config.json names no model_type", id="no model type"
    ),
    pytest.param(lambda b: (b / "config.json").unlink(), r"^b: no model: .* has no config.json", id="no config"),
    pytest.param(
        lambda b: (b / "config.json").write_text("{"), r"^b: .*config.json cannot be read", id="broken config"
    ),
    pytest.param(
        narrower, r"up_proj.weight is \[47, 32\] in b and \[48, 32\] in base\. Only .* equal shapes", id="shape"
    ),
    pytest.param(
        without("model.norm.weight"),
        r"^b: its tensors are not those of base: it lacks model\.norm\.weight\.$",
        id="a tensor less",
    ),
    pytest.param(
        lambda b: rewrite(b, lambda found: found | {"extra.weight": torch.zeros(2)}),
        r"it has extra\.weight beside\.$",
        id="a tensor more",
    ),
    pytest.param(
        wider_vocabulary,
        r"embed_tokens.weight is \[322, 32\] in b .*: other vocabulary rows\. .*vocabulary: common_rows",
        id="vocabulary rows",
    ),
    pytest.param(
        lambda b: edit_tokenizer(b, rename_token),
        r"^b: its vocabulary is not that of base: it lacks '.+' \(200\); it also has 'zz' \(200\)",
        id="token renamed",
    ),
    pytest.param(lambda b: edit_tokenizer(b, add_token), r"it also has '<\|im_start\|>' \(320\)", id="token added"),
    pytest.param(
        lambda b: edit_tokenizer(b, swap_tokens),
        r"2 have other ids, such as '.+': 11 instead of 10",
        id="tokens swapped",
    ),
    pytest.param(
        lambda b: edit_tokenizer(b, lambda content: content["model"]["merges"].reverse()),
        r"its merges differ",
        id="merges",
    ),
    pytest.param(
        lambda b: (b / "tokenizer.json").write_text("{"),
        r"^b: .*tokenizer.json is not valid JSON",
        id="broken tokenizer",
    ),
    pytest.param(to_pickle, r"^b: its weights are pytorch_model.bin, a pickle.*save_pretrained", id="pickle"),
    pytest.param(
        lambda b: (b / "model.safetensors").unlink(),
        r"^b: no weights in .* \(looked for model.safetensors",
        id="no weights",
    ),
    pytest.param(cut, r"^b: .*model.safetensors is damaged or cut off", id="cut off"),
    pytest.param(garbage, r"^b: .*model.safetensors is damaged or cut off", id="garbage"),
    pytest.param(missing_shard, r"^b: model-00002-of-00002.safetensors is missing in", id="missing shard"),
    pytest.param(
        outside, r"^b: .* names '../base/model.safetensors', which is no safetensors file of this", id="outside"
    ),
    pytest.param(as_type(torch.float64), r"^b: model.norm.weight is stored as F64\. Merged are F32", id="float64"),
    pytest.param(as_type(torch.float8_e4m3fn), r"^b: model.norm.weight is stored as F8_E4M3", id="float8"),
    pytest.param(as_type(torch.int32), r"^model.norm.weight is stored as I32 in b and as BF16 in base", id="integers"),
]


@pytest.mark.promise("M1", "X1", "X6")
@pytest.mark.parametrize(("spoil", "message"), MISMATCHES)
def test_models_that_do_not_fit_are_refused_before_a_weight_is_read(root, tmp_path, spoil, message):
    spoil(root / "b")
    loaded = merge_of({**TIES, "models": [{"model": "a"}, {"model": "b"}]}, root)
    if message is None:
        plan_merge(loaded, tmp_path / "out")
        return
    with pytest.raises(MergeError, match=message):
        merge(root, tmp_path / "out", **TIES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


@pytest.mark.promise("M1")
def test_several_mismatches_come_at_once(root, tmp_path):
    edit_config(root / "a", num_key_value_heads=4)
    edit_config(root / "b", num_attention_heads=8)
    edit_tokenizer(root / "b", rename_token)
    with pytest.raises(MergeError) as caught:
        merge(root, tmp_path / "out", **TIES)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["a", "b", "b"]


@pytest.mark.promise("M1")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_model": "nowhere"}, r"nowhere: no such model"),
        ({"merge_method": "tiess"}, r"merge_method = \"tiess\".*Did you mean ties\?"),
        ({"base_model": None}, r"needs a base_model"),
        ({"merge_method": "slerp", "models": ["a"], "base_model": None}, r"needs exactly 2 models to merge, got 1"),
        ({"parameters": {"density": 2}}, r"parameters.density = 2: must be at most 1"),
        ({"tokenizer_source": "union"}, r"vocabularies are not joined"),
        (
            {"merge_method": "della", "parameters": {"density": [0.9, 0.97], "epsilon": 0.05}},
            r"della: for model\.layers\.1\.\S+ \(layer 1\): .*density \+ epsilon below 1",
        ),
    ],
)
def test_wrong_files_are_refused_before_a_weight_is_read(root, tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        merge(root, tmp_path / "out", **{key: value for key, value in (TIES | values).items() if value is not None})


@pytest.mark.promise("M1")
def test_slices_must_be_all_layers(root, tmp_path):
    def sliced(last):
        sources = [{"model": name, "layer_range": [0, last]} for name in ("a", "b")]
        return merge_of({"merge_method": "linear", "slices": [{"sources": sources}]}, root)

    assert len(plan_merge(sliced(2), tmp_path / "out").jobs) == 21
    with pytest.raises(MergeError, match=r"slices: layer_range must be \[0, 2\] for every source"):
        plan_merge(sliced(1), tmp_path / "out")


@pytest.mark.promise("M1")
def test_tables_that_a_model_makes_for_itself_may_be_missing(root, tmp_path):
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    rewrite(root / "b", lambda found: found | table)
    loaded = merge_of({**TIES, "models": [{"model": "a"}, {"model": "b"}]}, root)
    assert not any("inv_freq" in job.name for job in plan_merge(loaded, tmp_path / "out").jobs)


@pytest.mark.promise("M1")
@pytest.mark.parametrize(("change", "refused"), [(add_token, False), (rename_token, True), (swap_tokens, True)])
def test_common_rows_need_ids_that_mean_one_token(root, tmp_path, change, refused):
    edit_tokenizer(root / "b", change)
    loaded = merge_of({**TIES, "models": [{"model": "a"}, {"model": "b"}], "vocabulary": "common_rows"}, root)
    if not refused:
        plan_merge(loaded, tmp_path / "out")
        return
    with pytest.raises(
        MergeError, match=r"b: its vocabulary contradicts that of base: id \d+ is '.+' there and '.+' here"
    ):
        plan_merge(loaded, tmp_path / "out")


def test_merges_written_in_either_form_are_equal(root, tmp_path):
    def other_form(content):
        merges = content["model"]["merges"]
        content["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m.split(" ") for m in merges]

    edit_tokenizer(root / "b", other_form)
    plan_merge(merge_of({**TIES, "models": [{"model": "a"}, {"model": "b"}]}, root), tmp_path / "out")


# The output folder and the disk


def planned(root, out, **options):
    return plan_merge(
        merge_of({"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}, root), out, **options
    )


@pytest.mark.promise("M1")
def test_an_output_folder_that_is_taken_is_refused(root, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    planned(root, out)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"out: exists already\..*--overwrite"):
        planned(root, out)
    with pytest.raises(ConfigError, match=r"out: holds something that is no model"):
        planned(root, out, overwrite=True)
    (out / "config.json").write_text("{}")
    planned(root, out, overwrite=True)
    with pytest.raises(ConfigError, match=r"thesis.tex: is a file"):
        planned(root, out / "thesis.tex")


@pytest.mark.parametrize("place", ["a", "."])
def test_a_model_is_never_replaced_by_a_merge_of_it(root, place):
    (root / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a, which is merged"):
        planned(root, root / place, overwrite=True)


@pytest.mark.promise("R2")
def test_a_folder_that_cannot_be_written_is_said_first(root, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"cannot be written"):
        planned(root, tmp_path / "deep" / "out")


@pytest.mark.promise("R1")
def test_a_disk_without_room_is_said_before_it_starts_with_both_figures(root, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda path: 1000)
    with pytest.raises(MergeError, match=r"out: the disk has too little room: \d+ bytes needed, 1000 free"):
        planned(root, tmp_path / "out")


# What a plan says


def test_the_plan_counts_what_is_read_and_written(root, tmp_path):
    plan = planned(root, tmp_path / "out")
    sizes = [sum(t.nbytes for t in load_file(root / name / "model.safetensors").values()) for name in "ab"]
    assert plan.n_input_bytes == sum(sizes)
    assert plan.layout.n_bytes - sum(len(shard.header) for shard in plan.layout.shards.values()) == sizes[0]
    assert dict(summary(plan))["tensors"] == "21 (21 BF16)"


@pytest.mark.promise("M1", "U3")
def test_planning_imports_no_torch(root, tmp_path):
    (root / "merge.yaml").write_text("merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n")
    code = (
        "import sys; from direct_rlhf.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers'} & set(sys.modules); sys.exit(code or bool(heavy))"
    )
    args = ["merge", str(root / "merge.yaml"), "--out", str(tmp_path / "out"), "--dry-run"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Nothing wrong. Nothing was written." in done.stdout
    assert not (tmp_path / "out").exists()


def test_misaligned_files_of_other_writers_are_read(root, tmp_path, monkeypatch):
    monkeypatch.undo()
    file = root / "a" / "model.safetensors"
    save_file(load_file(file), file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * (1 - len(header) % 2)  # an odd length
    assert len(header) % 2 == 1
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    out = merge(root, tmp_path / "out", merge_method="linear", models=["a"])
    assert all(
        torch.equal(t, load_file(root / "a" / "model.safetensors")[n])
        for n, t in load_file(out / "model.safetensors").items()
    )
