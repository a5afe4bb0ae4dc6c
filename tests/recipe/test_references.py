"""What names in a recipe point at."""

from pathlib import Path

import pytest

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe import references
from direct_rlhf.recipe.references import HubReference, resolve_model, resolve_reference


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "package" / "world"
    (folder / "base").mkdir(parents=True)
    (folder / "files").mkdir()
    for name in ("files/helpful.jsonl", "base/config.json", "secret.py", "../outside.txt"):
        (folder / name).write_text("{}")
    monkeypatch.setattr(references, "WORLD_FOLDER", folder)
    return folder


def test_world_names_lead_into_the_package(world: Path) -> None:
    assert resolve_reference("world:helpful.jsonl", None) == world / "files" / "helpful.jsonl"
    assert resolve_reference("world:base", None) == world / "base"
    assert resolve_model("world:base", None) == world / "base"


def test_unknown_world_name_gets_a_suggestion(world: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_reference("world:helpfull.jsonl", None)
    assert str(caught.value) == (
        "world:helpfull.jsonl: the embedded world has no such file. Did you mean world:helpful.jsonl? "
        "It has: base, helpful.jsonl."
    )


@pytest.mark.promise("X6")
@pytest.mark.parametrize("name", ["../../outside.txt", "/etc/passwd", "", "..", "../../../package", "a\0b", "x" * 5000])
def test_world_name_cannot_leave_the_world(name: str, world: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        resolve_reference(f"world:{name}", None)


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("hf:Anthropic/hh-rlhf", HubReference("dataset", "Anthropic/hh-rlhf")),
        ("hf:Anthropic/hh-rlhf:test[:10]", HubReference("dataset", "Anthropic/hh-rlhf", split="test[:10]")),
        ("hf:a/b@refs/pr/1:train", HubReference("dataset", "a/b", split="train", revision="refs/pr/1")),
        (
            "hf:Anthropic/hh-rlhf/harmless-base@main:train",
            HubReference("dataset", "Anthropic/hh-rlhf", split="train", revision="main", folder="harmless-base"),
        ),
    ],
)
def test_hub_data_set_is_taken_apart(ref: str, expected: HubReference) -> None:
    assert resolve_reference(ref, None) == expected


@pytest.mark.parametrize("ref", ["hf:", "hf:name", "hf:a/b:", "hf:../x", "hf:a/b c"])
def test_malformed_hub_data_set_is_refused(ref: str) -> None:
    with pytest.raises(ConfigError, match=r"not a hub data set\. Write hf:OWNER/NAME"):
        resolve_reference(ref, None)


def test_path_starts_from_the_folder_and_then_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, working = tmp_path / "recipes", tmp_path / "working"
    for folder in (recipes, working):
        folder.mkdir()
        (folder / "both.jsonl").write_text("")
    (working / "one.jsonl").write_text("")
    monkeypatch.chdir(working)
    assert resolve_reference("both.jsonl", recipes) == recipes / "both.jsonl"
    assert resolve_reference("both.jsonl", None) == Path("both.jsonl")
    assert resolve_reference("one.jsonl", recipes) == Path("one.jsonl")
    assert resolve_reference(str(working / "one.jsonl"), recipes) == working / "one.jsonl"
    with pytest.raises(ConfigError) as caught:
        resolve_reference("none.jsonl", recipes)
    assert str(caught.value) == (
        f"none.jsonl: no such file or folder. Looked at: {recipes / 'none.jsonl'}, {working / 'none.jsonl'}. "
        "Give an existing path, world:NAME or hf:OWNER/NAME[:SPLIT]."
    )


def test_existing_folder_wins_over_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model("owner/name", tmp_path) == tmp_path / "owner" / "name"
    assert resolve_model("owner/other", tmp_path, revision="v1") == HubReference("model", "owner/other", revision="v1")
    assert str(resolve_model("hf:owner/other", tmp_path)) == "owner/other"


@pytest.mark.parametrize("ref", ["gpt2", "./missing", "/missing/model", "a/b/c", "x" * 5000])
def test_what_is_neither_folder_nor_hub_id_is_refused(ref: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no such model\. It is no folder .* and not shaped like a hub id, OWNER/NAME"
    ):
        resolve_model(ref, tmp_path)


def test_run_directory_is_not_a_model_and_the_message_names_its_models(tmp_path: Path) -> None:
    (tmp_path / "run" / "models" / "sft").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=rf"this is a run directory, not a model\. Its models: {tmp_path}/run/models/sft\."
    ):
        resolve_model("run", tmp_path)
