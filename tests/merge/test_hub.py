"""Hub models: small files first, weights when all checks have passed, the commit recorded. The hub is a folder here."""

import json
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import NotASafetensorsRepoError

from direct_rlhf.errors import ConfigError, MergeError
from direct_rlhf.merge.checkpoints import read_tensors
from direct_rlhf.merge.executor import Execution
from merge.checkpoint_kit import SHARDED, edit_config, merge, same, write_model

COMMIT = "c0ffee" * 6 + "c0ff"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of repositories; what is fetched of them is listed in `fetched`."""
    root, cache, fetched = tmp_path / "hub", tmp_path / "cache", []

    def snapshot_download(name, *, revision, allow_patterns):
        if not (root / name).is_dir():
            raise OSError(f"404: {name}")
        folder = cache / name / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        for file in (root / name).iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns) and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
                fetched.append(file.name)
        return str(folder)

    def get_safetensors_metadata(name, *, revision):
        assert revision == COMMIT
        if not list((root / name).glob("*.safetensors")):
            raise NotASafetensorsRepoError(name)
        files = {}
        for tensor, place in read_tensors(root / name, name).items():
            info = SimpleNamespace(dtype=place.dtype, shape=list(place.shape), data_offsets=(place.start, place.end))
            files.setdefault(place.file.name, SimpleNamespace(tensors={})).tensors[tensor] = info
        return SimpleNamespace(files_metadata=files)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
    return SimpleNamespace(root=root, fetched=fetched)


@pytest.mark.promise("X3")
@pytest.mark.parametrize("shard", ["5GB", SHARDED])
def test_a_hub_model_is_merged_and_its_commit_recorded(hub, tmp_path, shard):
    write_model(hub.root / "me/a", seed=1, shard=shard)
    (hub.root / "me/a" / "consolidated.safetensors").write_bytes(b"the same weights once more")
    write_model(tmp_path / "a", seed=1)
    write_model(tmp_path / "b", seed=2)
    expected = merge(tmp_path, tmp_path / "expected", merge_method="linear")
    said = []
    out = merge(
        tmp_path, tmp_path / "out", Execution(say=said.append), merge_method="linear", models=["me/a@main", "b"]
    )
    assert same(out, expected)
    assert said == ["Fetching me/a@main from the hub"]
    assert "consolidated.safetensors" not in hub.fetched
    assert json.loads((out / "merge.json").read_text())["commits"] == {"me/a@main": COMMIT}
    assert COMMIT in (out / "README.md").read_text()


@pytest.mark.promise("M1")
@pytest.mark.parametrize("where", ["config", "tokenizer", "tensors"])
def test_no_weights_are_fetched_of_models_that_do_not_fit(hub, tmp_path, where):
    write_model(hub.root / "me/a", "gpt2" if where == "config" else "mistral")
    write_model(tmp_path / "b", "qwen2" if where == "tensors" else "mistral")
    if where == "tensors":
        edit_config(tmp_path / "b", model_type="mistral", architectures=["MistralForCausalLM"])
    if where == "tokenizer":
        content = json.loads((tmp_path / "b/tokenizer.json").read_text())
        content["added_tokens"].append({"id": 320, "content": "<x>"})
        (tmp_path / "b/tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MergeError):
        merge(tmp_path, tmp_path / "out", merge_method="linear", models=["me/a", "b"])
    assert hub.fetched
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


@pytest.mark.promise("X1")
def test_a_hub_model_of_pickles_is_refused(hub, tmp_path):
    write_model(hub.root / "me/a")
    (hub.root / "me/a/model.safetensors").rename(hub.root / "me/a/pytorch_model.bin")
    with pytest.raises(MergeError, match=r"me/a: it has no safetensors, and a pickle, which can run code, is not read"):
        merge(tmp_path, tmp_path / "out", merge_method="linear", models=["me/a"])
    assert "pytorch_model.bin" not in hub.fetched


def test_a_hub_model_out_of_reach_is_said(hub, tmp_path):
    with pytest.raises(
        ConfigError, match=r"me/nothing: cannot be fetched from the Hugging Face hub \(404: me/nothing\)"
    ):
        merge(tmp_path, tmp_path / "out", merge_method="linear", models=["me/nothing"])
