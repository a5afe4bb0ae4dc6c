"""Contexts that share a long beginning: found, computed once, and with the numbers of separate sequences."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_rlhf.evaluate import scoring, trees, trunks
from direct_rlhf.evaluate.scoring import score_continuations
from direct_rlhf.evaluate.trees import TokenTree
from direct_rlhf.evaluate.trunks import GrownTrunk, Trunk, find_trunks, takes_trunks
from direct_rlhf.models.memory import ChunkSize
from scored_models import CONFIGS, VOCABULARY, build, slowly

BLOCK = [(11 * i) % VOCABULARY for i in range(30)]
MISTRAL = build("mistral")


def arrays(contexts):
    return [np.array(context, dtype=np.int32) for context in contexts]


def few_shot_requests(seed, n_contexts=6, block=BLOCK):
    """A block, questions after it, and some choices for each."""
    rng = random.Random(seed)
    draw = lambda low, high: [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))]
    requests = [
        (block + question, draw(1, 5)) for question in (draw(1, 9) for _ in range(n_contexts)) for _ in range(3)
    ]
    rng.shuffle(requests)
    return requests


@pytest.fixture
def small_trunks(monkeypatch):
    """Trunks that save as little as the tests' short blocks do."""
    monkeypatch.setattr(trunks, "SAVED", 20)


def test_contexts_with_a_common_block_are_one_trunk_and_keep_a_token_of_their_own():
    block, other = list(range(600)), list(range(1000, 1700))
    contexts = arrays([[*block, 7, 8], [*other, 1], [*block, 9], [*block, 7, 9], [*other, 2], [5, 6], [*other, 3, 3]])
    found, alone = find_trunks(contexts)
    assert {(trunk.length, frozenset(trunk.members)) for trunk in found} == {
        (600, frozenset({0, 2, 3})),
        (700, frozenset({1, 4, 6})),
    }
    assert alone == [5]
    # where one context is the beginning of all others, its last token stays its own
    found, alone = find_trunks(arrays([block, [*block, 1], [*block, 2]]))
    assert found == [Trunk(599, found[0].members)]
    assert alone == []


def test_what_saves_too_little_is_no_trunk():
    block = list(range(trunks.SAVED // 2 - 1))
    found, alone = find_trunks(arrays([[*block, i, i] for i in range(3)]))
    assert (found, alone) == ([], [0, 1, 2])
    found, alone = find_trunks(arrays([[*block, 999, i, i] for i in range(3)]))
    assert [trunk.length for trunk in found] == [trunks.SAVED // 2]
    assert find_trunks([]) == ([], [])


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12))
def test_every_context_is_in_one_place_and_begins_with_its_trunk(contexts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trunks, "SAVED", 4)
        patch.setattr(trunks, "SHORTEST", 2)
        found, alone = find_trunks(arrays(contexts))
    assert sorted([*alone, *(i for trunk in found for i in trunk.members)]) == list(range(len(contexts)))
    for trunk in found:
        assert len({tuple(contexts[i][: trunk.length]) for i in trunk.members}) == 1
        assert all(len(contexts[i]) > trunk.length for i in trunk.members)
        assert trunk.length * (len(trunk.members) - 1) >= 4


@pytest.mark.promise("J10")
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_after_a_shared_block_equal_one_request_at_a_time(name, small_trunks):
    model, requests = build(name), few_shot_requests(1)
    found = score_continuations(model, requests, batch=ChunkSize("test", 4))
    for request, score in zip(requests, found, strict=True):
        expected = slowly(model, *request)
        assert score.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert score.greedy == expected.greedy


@pytest.mark.promise("J10")
@given(seed=st.integers(0, 10_000), batch_size=st.integers(1, 20), slots=st.integers(1, 60))
@settings(max_examples=15, deadline=None)
def test_neither_batch_size_nor_row_size_changes_a_score(seed, batch_size, slots):
    requests = few_shot_requests(seed, 5)
    expected = score_continuations(MISTRAL, requests, batch=ChunkSize("test", 64), share=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trunks, "SAVED", 20)
        patch.setitem(trunks.ROW_SLOTS, "cpu", slots)
        found = score_continuations(MISTRAL, requests, batch=ChunkSize("test", batch_size))
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.greedy == other.greedy


def test_the_block_is_computed_once(monkeypatch, small_trunks):
    seen = []
    backbone = trees.backbone

    def counting(model):
        inner = backbone(model)

        def run(input_ids, **kwargs):
            seen.append(input_ids.numel())
            return inner(input_ids=input_ids, **kwargs)

        return run

    monkeypatch.setattr(trunks, "backbone", counting)
    monkeypatch.setattr(trees, "backbone", counting)
    for name in ("takes_trees", "takes_trunks"):
        monkeypatch.setattr(scoring, name, lambda model: True)
    requests = [([*BLOCK, i], [i, i + 1, i + 2]) for i in range(7) for _ in range(2)]
    score_continuations(MISTRAL, requests, batch=ChunkSize("test", 64))
    assert sum(seen) == len(BLOCK) + 7 * (1 + 2 * 2)


@pytest.mark.parametrize("name", ["mistral", "gpt2", "gemma2", "mistral with a window"])
def test_models_whose_keys_and_values_can_be_kept_are_recognised(name):
    assert takes_trunks(build(name))


def test_a_model_that_keeps_its_past_otherwise_is_scored_without_trunks(monkeypatch, small_trunks):
    def wrong(self, grown, slots):
        return torch.zeros(sum(map(len, slots)), MISTRAL.config.hidden_size)

    expected = score_continuations(MISTRAL, few_shot_requests(3), batch=ChunkSize("test", 8), share=False)
    monkeypatch.setattr(GrownTrunk, "hidden_at", wrong)
    assert not takes_trunks(MISTRAL)
    found = score_continuations(MISTRAL, few_shot_requests(3), batch=ChunkSize("test", 8))
    assert [score.logprob for score in found] == pytest.approx([score.logprob for score in expected], abs=1e-4)


def test_beyond_the_attention_window_each_request_runs_alone(small_trunks):
    model = build("mistral with a window")
    requests = few_shot_requests(5, block=BLOCK)  # 30 tokens and more, where the model sees 10
    found = score_continuations(model, requests, batch=ChunkSize("test", 8))
    for request, score in zip(requests, found, strict=True):
        assert score.logprob == pytest.approx(slowly(model, *request).logprob, abs=1e-4)


def test_states_of_trees_after_a_trunk_are_those_of_whole_sequences():
    tree = TokenTree.chain([3, 4])
    leaf = tree.grow(1, [5, 6])[-1]
    found = GrownTrunk(MISTRAL, BLOCK).hidden_at([tree, TokenTree.chain([9])], [[1, leaf], [0]])
    with torch.no_grad():
        whole, other = (
            MISTRAL.model(input_ids=torch.tensor([BLOCK + ids])).last_hidden_state[0] for ids in ([3, 4, 5, 6], [9])
        )
    torch.testing.assert_close(found, torch.stack([whole[-3], whole[-1], other[-1]]), atol=1e-4, rtol=1e-4)
