"""Tokenizers and real data of the data room's tests."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tokenizers import AddedToken

from data.tiny_tokenizers import TEMPLATE, byte_level, llama_like, save
from direct_rlhf.data.tokens import Tokens, load_tokens

# the first call of a library takes longer than a deadline, and on a busy machine so does drawing an example
settings.register_profile("data", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("data")

HH_FOLDERS = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    chat = byte_level("<unk>", "<s>", "</s>", "<pad>")
    chat.add_special_tokens([AddedToken(word, special=True) for word in ("<|im_start|>", "<|im_end|>")])
    return {
        "plain": save(root / "plain", byte_level("<unk>", "<s>", "</s>", "<pad>"), **names, pad_token="<pad>"),
        "gpt2": save(
            root / "gpt2",
            byte_level("<|endoftext|>"),
            bos_token="<|endoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            pad_token="<|endoftext|>",
        ),
        "llama": save(root / "llama", llama_like(), **names),
        "chat": save(root / "chat", chat, **names, pad_token="<pad>", chat_template=TEMPLATE),
    }


@pytest.fixture(scope="session")
def all_tokens(model_folders: dict[str, Path]) -> dict[str, Tokens]:
    return {name: load_tokens(str(folder)) for name, folder in model_folders.items()}


@pytest.fixture(scope="session")
def tokens(all_tokens: dict[str, Tokens]) -> Tokens:
    return all_tokens["plain"]


@pytest.fixture
def hh() -> Path:
    """The folder of the real Anthropic HH files."""
    if not (HH_FOLDERS / "hh_rlhf_helpful_test").is_dir():
        pytest.skip(f"the real HH files are not there: {HH_FOLDERS / 'hh_rlhf_helpful_test'}")
    return HH_FOLDERS
