"""The shipped base loads anywhere, is small, and is a fair base."""

import json
from pathlib import Path

import pytest

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.world.tokenizer import VOCAB_SIZE, train_tokenizer

WORLD = Path(__file__).parents[2] / "src" / "direct_rlhf" / "world"
BASE = WORLD / "base"


@pytest.fixture(scope="module")
def base():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype="float32").eval()


def test_the_tokenizer_round_trips_and_keeps_its_special_ids_apart():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = "\n\nHuman: What is 12 plus 7? Ünïcode, too — \t“so”.\n\nAssistant: That is 19."
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    tokens = load_tokens(str(BASE))
    assert tokens.encode(text, bos=True) == ids
    assert tokens.vocab_size == VOCAB_SIZE


def test_turn_markers_never_merge_with_their_neighbours():
    tokens = load_tokens(str(BASE))
    whole = tokens.encode("\n\nHuman: Hello.\n\nAssistant: It is 7.")
    parts = ("\n\nHuman:", " Hello.", "\n\nAssistant:", " It is 7.")
    assert whole == [i for part in parts for i in tokens.encode(part)]


def test_the_tokenizer_is_remade_byte_for_byte(tmp_path):
    train_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()


def test_the_base_is_a_small_mistral_without_a_chat_template(base):
    from transformers import AutoTokenizer

    assert type(base).__name__ == "MistralForCausalLM"
    assert 2e6 < base.num_parameters() < 4e6
    assert base.config.sliding_window is None
    assert base.generation_config.eos_token_id == base.config.eos_token_id == load_tokens(str(BASE)).eos_id
    assert AutoTokenizer.from_pretrained(BASE).chat_template is None
    assert not list(BASE.glob("*.bin"))


@pytest.mark.parametrize(("skill", "least"), [("facts", 0.5), ("opposites", 0.6), ("comparison", 0.75)])
def test_the_base_knows_clearly_more_than_chance(base, skill, least):
    import torch

    tokens = load_tokens(str(BASE))
    rows = [json.loads(line) for line in (WORLD / "files" / "tasks" / f"{skill}.jsonl").read_text().splitlines()[:40]]
    right = 0
    for row in rows:
        context = tokens.encode(row["prompt"], bos=True)
        scores = []
        for choice in row["choices"]:
            ids = tokens.encode(" " + choice)
            with torch.no_grad():
                logprob = base(torch.tensor([context + ids])).logits[0].log_softmax(-1)
            at = torch.arange(len(context) - 1, len(context) + len(ids) - 1)
            scores.append(float(logprob[at, torch.tensor(ids)].sum()))
        right += scores.index(max(scores)) == row["gold"]
    assert right / len(rows) >= least
