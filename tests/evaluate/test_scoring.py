import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_rlhf.evaluate import scoring, trees
from direct_rlhf.evaluate.scoring import score_continuations
from direct_rlhf.evaluate.trees import TokenTree, hidden_at, takes_trees
from direct_rlhf.models.memory import ChunkSize
from scored_models import CONFIGS, VOCABULARY, build, slowly


def random_requests(seed, n_contexts=8):
    rng = random.Random(seed)
    draw = lambda low, high: [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))]
    requests = [
        (context, draw(1, 6)) for context in (draw(1, 20) for _ in range(n_contexts)) for _ in range(rng.randint(1, 5))
    ]
    rng.shuffle(requests)
    return requests


@pytest.mark.promise("J10")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("share", [True, False])
def test_scores_equal_one_request_at_a_time(name, share):
    model, requests = build(name), random_requests(1)
    found = score_continuations(model, requests, batch=ChunkSize("test", 5), share=share)
    for request, score in zip(requests, found, strict=True):
        expected = slowly(model, *request)
        assert score.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert score.greedy == expected.greedy


@pytest.mark.promise("J10")
@given(seed=st.integers(0, 10_000), batch_size=st.integers(1, 40), share=st.booleans())
@settings(max_examples=15, deadline=None)
def test_batch_size_sharing_and_order_change_nothing(seed, batch_size, share):
    model, requests = MISTRAL, random_requests(seed, 4)
    expected = score_continuations(model, requests, batch=ChunkSize("test", 64), share=False)
    order = random.Random(seed).sample(range(len(requests)), len(requests))
    found = score_continuations(model, [requests[i] for i in order], batch=ChunkSize("test", batch_size), share=share)
    for i, score in zip(order, found, strict=True):
        assert score.logprob == pytest.approx(expected[i].logprob, abs=1e-4)
        assert score.greedy == expected[i].greedy


MISTRAL = build("mistral")


def test_greedy_continuations_are_recognised():
    context = [5, 9, 3]
    ids = list(context)
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(MISTRAL(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    best, other = ids[3:], [*ids[3:6], (ids[6] + 1) % VOCABULARY]
    scores = score_continuations(MISTRAL, [(context, best), (context, other)], batch=ChunkSize("test", 4))
    assert [score.greedy for score in scores] == [True, False]


def test_equal_contexts_are_computed_once(monkeypatch):
    tokens_seen = []
    backbone = trees.backbone

    def counting(model):
        inner = backbone(model)

        def run(input_ids, **kwargs):
            tokens_seen.append(input_ids.numel())
            return inner(input_ids=input_ids, **kwargs)

        return run

    requests = [(list(range(40)), [i, i + 1, i + 2]) for i in range(5)]
    monkeypatch.setattr(trees, "backbone", counting)
    score_continuations(MISTRAL, requests, batch=ChunkSize("test", 8), share=False)
    plain = sum(tokens_seen)
    tokens_seen.clear()
    monkeypatch.setattr(scoring, "takes_trees", lambda model: True)
    score_continuations(MISTRAL, requests, batch=ChunkSize("test", 8))
    assert (plain, sum(tokens_seen)) == (5 * 42, 40 + 5 * 2)


def test_architectures_without_4d_masks_take_the_plain_path():
    assert takes_trees(MISTRAL)
    assert not takes_trees(build("bloom"))


def test_many_continuations_of_a_long_context_are_split(monkeypatch):
    monkeypatch.setattr(scoring, "GROUP_TOKENS", 8)
    requests = [([7, 8, 9], [i, i + 1, i + 2, i + 3]) for i in range(9)]
    found = score_continuations(MISTRAL, requests, batch=ChunkSize("test", 2))
    for request, score in zip(requests, found, strict=True):
        assert score.logprob == pytest.approx(slowly(MISTRAL, *request).logprob, abs=1e-4)


def test_an_empty_continuation_has_no_score_and_is_counted_as_done():
    done = []
    scores = score_continuations(
        MISTRAL, [([1, 2], []), ([1, 2], [3])], batch=ChunkSize("test", 4), on_batch=done.append
    )
    assert math.isnan(scores[0].logprob)
    assert math.isfinite(scores[1].logprob)
    assert sum(done) == 2


def test_branches_of_a_tree_have_the_states_of_separate_sequences():
    tree = TokenTree.chain([5, 9, 3, 8])
    fork = tree.grow(1, [4, 6])
    twig = tree.grow(fork[0], [11])
    slots = [[3, 1, *fork, *twig]]
    packed, plain = (hidden_at(MISTRAL, [tree], slots, packed=flag) for flag in (True, False))
    assert torch.allclose(packed, plain, atol=1e-5)
    with torch.no_grad():
        alone = MISTRAL.model(input_ids=torch.tensor([[5, 9, 4, 11]])).last_hidden_state[0, -1]
    assert torch.allclose(packed[-1], alone, atol=1e-5)
