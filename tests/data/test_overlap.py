import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.pair_files import everything, jsonl, load, pair_row, section
from direct_rlhf.data.overlap import human_turns, normalised_hash, overlaps
from direct_rlhf.data.types import Prompt, Turn

BENCHMARK = [
    ("facts:0", "Which trade does Leo Davis follow?"),
    ("facts:1", "What is the capital of France?"),
    ("facts:1", "Question: What is the capital of France?\nAnswer:"),
    ("sums:0", "17 - 2 ="),
    ("conversation:7", "What is the capital of France?"),
]


@pytest.mark.promise("T4")
def test_planted_benchmark_questions_are_reported_with_their_row_and_item(tmp_path):
    planted = {
        20: {"prompt": "what is the  CAPITAL of france"},
        30: {"prompt": "\n\nHuman: Hello there\n\nAssistant: Hi\n\nHuman: Which trade does “Leo Davis” follow?"},
        40: {"prompt": [{"role": "user", "content": "17 – 2 = ?"}]},
    }
    rows = [pair_row(at) | planted.get(at, {}) for at in range(60)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows))
    pairs = everything(load(tmp_path, section("a.jsonl")))
    assert sorted(overlaps(human_turns(pairs), BENCHMARK)) == [
        ("a.jsonl:21", "conversation:7"),
        ("a.jsonl:21", "facts:1"),
        ("a.jsonl:31", "facts:0"),
        ("a.jsonl:41", "sums:0"),
    ]


@pytest.mark.promise("T4")
def test_clean_training_data_overlap_with_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*[pair_row(at) for at in range(60)]))
    assert overlaps(human_turns(everything(load(tmp_path, section("a.jsonl")))), BENCHMARK) == []


def test_every_human_turn_of_prompts_counts_and_no_other_turn():
    turns = (Turn("system", "Be kind."), Turn("human", "a"), Turn("assistant", "b"), Turn("human", "c"))
    assert list(human_turns([Prompt("1", turns, "k", "f:1")])) == [("f:1", "a"), ("f:1", "c")]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is it?", "  what\tIS\n it"),
        ("Don't stop", "Don’t stop!"),
        ("ＡＢＣ １２", "abc 12"),
        ("Straße", "STRASSE"),
        ("a well-known fact", "a well - known fact"),
        ("17 − 2", "17 - 2."),
        ("one – two", "one — two"),
    ],
)
def test_form_makes_no_difference(one, other):
    assert normalised_hash(one) == normalised_hash(other) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("17 + 2", "17 - 2"),
        ("6 * 2", "6 / 2"),
        ("6 < 2", "6 > 2"),
        ("20 %", "20"),
        ("naïve", "naive"),
        ("in form", "inform"),
        ("no", "now"),
    ],
)
def test_content_makes_a_difference(one, other):
    assert normalised_hash(one) != normalised_hash(other)


def test_texts_without_a_word_overlap_with_nothing():
    assert normalised_hash(" ?!\n") == ""
    assert overlaps([("f:1", "..."), ("f:2", "")], [("item", "?"), ("other", "")]) == []


WORD = st.text(st.characters(categories=["Ll", "Lu", "Nd"]), min_size=1, max_size=6)
BETWEEN = st.lists(st.sampled_from([" ", "\n", "\t", ", ", ". ", " (", ") ", "\u00a0", "… "]), min_size=1).map("".join)


@given(words=st.lists(WORD, min_size=1, max_size=6), between=BETWEEN, around=st.sampled_from(["", " ", "?", "«"]))
def test_space_and_punctuation_between_words_never_hide_an_overlap(words, between, around):
    assert normalised_hash(around + between.join(words) + around) == normalised_hash(" ".join(words))


@given(text=st.text(st.characters()))
def test_any_text_has_a_hash(text):
    assert len(normalised_hash(text)) in (0, 16)


def test_a_hash_is_the_same_on_every_machine():
    known = hashlib.sha256(b"what is the capital of france").hexdigest()[:16]
    assert normalised_hash("What is the capital of France?") == known == "d832be57fc35827e"
