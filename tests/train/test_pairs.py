"""Preference pairs as ids and as batches: which are used, what a batch holds, and what is left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import pair

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.errors import DataError
from direct_rlhf.recipe.schema import DataSection, DialogueSection
from direct_rlhf.train.pairs import EncodedPair, encode_pairs, of_kinds, pair_batches
from toys import toy_folder

PAIRS = [pair(i, "good", "bad", kind) for i, kind in enumerate(["helpful", "harmless", "honest", "helpful"])]


@pytest.fixture(scope="module")
def dialogue(tmp_path_factory):
    return DialogueFormat(DialogueSection(), load_tokens(str(toy_folder(tmp_path_factory.mktemp("base")))))


def test_pairs_of_the_named_kinds_are_kept_in_their_order():
    assert of_kinds(PAIRS, ["helpful"], "reward") == [PAIRS[0], PAIRS[3]]
    assert of_kinds(PAIRS, ["honest", "harmless"], "cost") == [PAIRS[1], PAIRS[2]]


def test_no_kind_named_means_all_pairs():
    assert of_kinds(PAIRS, [], "reward") == PAIRS


def test_kinds_that_no_pair_has_are_an_error_that_lists_those_there_are():
    with pytest.raises(DataError) as caught:
        of_kinds(PAIRS, ["harmful", "rude"], "cost")
    assert str(caught.value) == (
        "cost.kinds = harmful, rude: no preference pair is of such a kind (the data have: harmless, helpful, honest). "
        "Name kinds of the data in cost.kinds, or set `kind` of a source under data.preferences."
    )
    with pytest.raises(DataError, match=r"^reward\.kinds = rude: "):
        of_kinds(PAIRS, ["rude"], "reward")


def test_kinds_beside_one_that_is_there_may_be_missing():
    assert of_kinds(PAIRS, ["honest", "rude"], "reward") == [PAIRS[2]]


def test_no_pairs_at_all_are_no_fault_of_the_kinds():
    assert of_kinds([], ["rude"], "reward") == []


@pytest.mark.promise("T3")
@pytest.mark.parametrize(("chosen", "rejected"), [("x" * 40, "y"), ("x", "y" * 40)])
def test_a_pair_of_which_one_side_does_not_fit_is_left_out_whole(dialogue, chosen, rejected):
    section = DataSection(max_answer_tokens=20)
    encoded = encode_pairs([pair(1, "good", "bad"), pair(2, chosen, rejected)], dialogue, section)
    assert [item.pair.id for item in encoded] == ["p1"]


def test_both_answers_of_an_encoded_pair_end_with_eos_and_share_their_prompt(dialogue):
    (item,) = encode_pairs([pair(1, "good", "bad indeed")], dialogue, DataSection())
    tokens = dialogue.tokens
    assert item.chosen_ids[-1] == item.rejected_ids[-1] == tokens.eos_id
    assert tokens.decode(item.chosen_ids).strip() == "good"
    assert tokens.decode(item.rejected_ids).strip() == "bad indeed"
    assert "tell me 1" in tokens.decode(item.prompt_ids)
    assert item.length == len(item.prompt_ids) + len(item.rejected_ids)


def encoded(lengths):
    """Pairs of (prompt, chosen, rejected) lengths whose ids say whose they are."""
    made = []
    for row, (n_prompt, n_chosen, n_rejected) in enumerate(lengths):
        code = 10 * (row + 1)
        made.append(EncodedPair(PAIRS[0], [code] * n_prompt, [code + 1] * n_chosen, [code + 2] * n_rejected))
    return made


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


@settings(deadline=None)
@given(lengths=st.lists(sizes, min_size=1, max_size=12), slots=st.integers(1, 120))
def test_batches_hold_each_pair_once_with_both_answers_and_no_more_slots_than_allowed(lengths, slots):
    pairs = encoded(lengths)
    seen = []
    for batch in pair_batches(pairs, "cpu", slots):
        n = len(batch.rows)
        assert batch.ids_BL.shape[0] == 2 * n
        assert n == 1 or batch.ids_BL.numel() <= slots
        for place, row in enumerate(batch.rows):
            item = pairs[row]
            for at, answer in ((place, item.chosen_ids), (n + place, item.rejected_ids)):
                assert batch.ids_BL[at][batch.mask_BL[at]].tolist() == item.prompt_ids + answer
                assert batch.ids_BL[at][batch.answer_BL[at]].tolist() == answer
        assert not torch.any(batch.answer_BL & ~batch.mask_BL)
        seen += batch.rows
    assert sorted(seen) == list(range(len(pairs)))
