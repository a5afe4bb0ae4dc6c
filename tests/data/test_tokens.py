import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from data.tiny_tokenizers import byte_level, save
from direct_rlhf.data.tokens import Tokens, load_tokens
from direct_rlhf.errors import ConfigError

NAMES = ["plain", "gpt2", "llama", "chat"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTENT = st.lists(st.sampled_from([*SPECIAL, "The sky", "\n\nHuman:", " ", "é", "<", "s>"]) | st.text(max_size=6)).map(
    "".join
)


def test_bos_is_what_the_tokenizer_itself_adds(all_tokens):
    assert {name: tokens.bos_id for name, tokens in all_tokens.items()} == {
        "plain": None, "gpt2": None, "llama": 1, "chat": None,
    }  # fmt: skip
    assert all_tokens["llama"].encode("The sky", bos=True) == [1, *all_tokens["llama"].encode("The sky")]
    assert all_tokens["plain"].encode("The sky", bos=True) == all_tokens["plain"].encode("The sky")


@pytest.mark.parametrize(("flag", "bos_id"), [(True, 1), (False, None)])
def test_an_explicit_add_bos_token_decides(tmp_path, model_folders, flag, bos_id):
    for name in ("plain", "llama"):
        folder = Path(shutil.copytree(model_folders[name], tmp_path / name))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": flag}))
        assert load_tokens(str(folder)).bos_id == bos_id


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(name, all_tokens, model_folders):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(model_folders[name])
    text = "\n\nHuman: What is  the colour?\n\nAssistant: Blue, naïve ⚑ one."
    assert all_tokens[name].encode(text, bos=True) == theirs(text)["input_ids"]
    assert all_tokens[name].vocab_size == len(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_pad_never_is_an_eos(name, all_tokens):
    tokens = all_tokens[name]
    assert tokens.pad_id not in tokens.eos_ids
    assert 0 <= tokens.pad_id < tokens.vocab_size


@pytest.mark.promise("T6")
@pytest.mark.parametrize("name", NAMES)
@given(text=CONTENT)
def test_content_never_becomes_a_special_token(name, all_tokens, text):
    tokens = all_tokens[name]
    ids = tokens.encode(text)
    assert not set(ids) & set(tokens.special_ids.values())
    if name != "llama":  # its decoder drops one leading space, by design
        assert tokens.decode(ids) == text


@pytest.mark.promise("T6")
def test_a_vocabulary_that_holds_the_special_text_as_a_piece_does_not_forge_it(tmp_path):
    pieces = [(piece, -1.0) for piece in ["<unk>", "</s>", *"</s>abc "]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>"])
    tokens = load_tokens(str(save(tmp_path, tokenizer, eos_token="</s>", unk_token="<unk>")))
    assert tokens.eos_id in tokens.tokenizer.encode("a</s>b").ids, "the trap is not set"
    assert tokens.eos_id not in tokens.encode("a</s>b")
    assert tokens.decode(tokens.encode("a</s>b")) == "a</s>b"


def test_decoding_leaves_special_tokens_out(tokens):
    assert tokens.decode([1, *tokens.encode("The sky"), tokens.eos_id]) == "The sky"


def test_all_configured_special_ids_end_an_answer_and_others_do_not(tmp_path, model_folders):
    folder = Path(shutil.copytree(model_folders["chat"], tmp_path / "chat"))
    tokens = load_tokens(str(folder))
    turn_end, letter = tokens.special_ids["<|im_end|>"], tokens.encode("a")[0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [turn_end, tokens.eos_id]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": letter}))  # a default that means another token here
    tokens = load_tokens(str(folder))
    assert tokens.eos_id == tokens.special_ids["</s>"]
    assert tokens.eos_ids == {tokens.eos_id, turn_end}


def test_without_an_eos_name_the_first_configured_id_is_appended(tmp_path):
    folder = save(tmp_path, byte_level("<unk>", "<s>", "</s>", "<end>"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))
    tokens = load_tokens(str(folder))
    assert (tokens.eos_id, tokens.eos_ids) == (3, {2, 3})


def test_a_missing_eos_says_what_to_do(tmp_path):
    folder = save(tmp_path, byte_level("<unk>", "</s>"))
    with pytest.raises(ConfigError) as caught:
        load_tokens(str(folder))
    assert str(caught.value) == (
        f"{folder}: the tokenizer names no end-of-sequence token, so answers could not end. Set `eos_token` in "
        f"{folder / 'tokenizer_config.json'} to one of its special tokens: </s>, <unk>."
    )


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(
        ConfigError, match=r"holds no tokenizer \(looked for tokenizer.json, .*\)\. Give a model folder"
    ):
        load_tokens(str(tmp_path))


def test_a_folder_of_older_files_is_converted_to_the_same_ids(tmp_path, all_tokens, model_folders):
    tokens = all_tokens["gpt2"]
    model = json.loads(tokens.tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]), encoding="utf-8"
    )
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    shutil.copyfile(model_folders["gpt2"] / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    converted = load_tokens(str(tmp_path))
    text = "\n\nHuman: The sky <|endoftext|> é"
    assert converted.encode(text) == tokens.encode(text)
    assert (converted.eos_id, converted.bos_id) == (tokens.eos_id, tokens.bos_id)
    converted.save(tmp_path / "copy")
    assert load_tokens(str(tmp_path / "copy")).encode(text) == tokens.encode(text)


def test_a_damaged_tokenizer_is_named(tmp_path, model_folders):
    folder = Path(shutil.copytree(model_folders["plain"], tmp_path / "plain"))
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer .* Fetch the file again\."):
        load_tokens(str(folder))


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError) as caught:
        load_tokens("nobody/nothing")
    assert str(caught.value) == (
        "nobody/nothing: its tokenizer cannot be fetched from the Hugging Face hub (offline mode is enabled). Check the name "
        "and the connection (`hf auth login` for gated models), or give a folder that holds the model."
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_tokenizer_is_the_same_one(name, all_tokens, tmp_path):
    tokens: Tokens = all_tokens[name]
    tokens.save(tmp_path / "copy")
    copy = load_tokens(str(tmp_path / "copy"))
    assert (copy.sha256, copy.bos_id, copy.eos_ids, copy.pad_id) == (
        tokens.sha256,
        tokens.bos_id,
        tokens.eos_ids,
        tokens.pad_id,
    )
    assert copy.encode("The sky </s>") == tokens.encode("The sky </s>")


def test_our_choice_of_pad_is_not_saved(all_tokens, tmp_path):
    all_tokens["gpt2"].save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"


@pytest.mark.promise("U3")
def test_the_data_room_imports_no_torch():
    rooms = ", ".join(f"direct_rlhf.data.{name}" for name in ("load", "dialogue", "tokens", "show", "formats"))
    code = (
        f"import {rooms}, sys; print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
