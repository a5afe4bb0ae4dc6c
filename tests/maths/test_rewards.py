import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, sampled_from
from torch.testing import assert_close

from direct_rlhf.maths.masked import selected
from direct_rlhf.maths.rewards import clip_scores, explained_variance, finish_scores, token_rewards
from maths.batches import exactly, random_batch

OFF = {
    "rule": "replace",
    "low_quantile": -2.0,
    "penalty": 1.5,
    "factor": 0.5,
    "cap": 10,
    "overlong_buffer": 0,
    "overlong_penalty": 1.0,
    "per_token_penalty": 0.0,
    "min_response_tokens": 0,
}
# finished of full length, finished early, cut with a good score, cut with a bad score, one token
SCORE = torch.tensor([1.0, 2.0, 3.0, -4.0, 0.5])
LENGTH = torch.tensor([10, 4, 10, 10, 1])
UNFINISHED = torch.tensor([False, False, True, True, False])

# what the sampler returns for each ending (1 = action, 0 = a swapped-in EOS or padding) and the slot of the score
ENDINGS = {
    "stop string with nothing kept": ([1, 0, 0, 0], 0),
    "EOS as the first token": ([1, 0, 0, 0], 0),
    "stop string after two tokens, swapped EOS in slot 2": ([1, 1, 0, 0], 1),
    "EOS after two tokens": ([1, 1, 1, 0], 2),
    "full length": ([1, 1, 1, 1], 3),
    "stop tokens kept as actions": ([1, 1, 1, 1], 3),
}


@pytest.mark.promise("N8")
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_score_lands_on_the_last_action(ending):
    actions, slot = ENDINGS[ending]
    reward = token_rewards(torch.tensor([2.5]), torch.zeros(1, 4), torch.tensor([actions]).bool(), beta=0.1)
    assert reward.tolist() == [[2.5 if t == slot else 0.0 for t in range(4)]]


@pytest.mark.promise("N8")
def test_a_table_worked_out_by_hand_pays_the_last_action_and_no_prompt_or_padding():
    """beta = 0.5. Rows: two prompt slots and three actions; one prompt slot and an EOS at once; one prompt slot, two
    actions and a swapped-in EOS. Every slot has a log-ratio, 0.9 where none may count."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]).bool()
    k1 = torch.tensor([[0.9, 0.9, 0.2, -0.4, 0.6], [0.9, -0.2, 0.9, 0.9, 0.9], [0.9, 0.4, 0.2, 0.9, math.nan]])
    expected = [[0, 0, -0.1, 0.2, 2.7], [0, -0.9, 0, 0, 0], [0, -0.2, 1.9, 0, 0]]
    assert_close(token_rewards(torch.tensor([3.0, -1.0, 2.0]), k1, mask, beta=0.5), torch.tensor(expected))


def test_rewards_of_a_row_sum_to_score_minus_kl_and_padding_rows_are_zero():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]]).bool()
    k1 = torch.tensor([[0.5, -0.25, math.nan], [math.inf, 1.0, 2.0], [math.nan] * 3])
    reward = token_rewards(torch.tensor([1.0, -1.0, math.nan]), k1, mask, beta=0.2)
    assert_close(reward.sum(1), torch.tensor([1 - 0.2 * 0.25, -1 - 0.2 * 3.0, 0.0]))
    assert not reward[~mask].any()


def test_without_kl_weight_the_reward_is_the_raw_score():
    mask = torch.ones(2, 3, dtype=torch.bool)
    reward = token_rewards(torch.tensor([1.0, -2.0]), torch.randn(2, 3), mask, beta=0.0)
    assert reward.tolist() == [[0, 0, 1.0], [0, 0, -2.0]]


@given(seed=integers(0, 999), beta=floats(-2, 2))
def test_a_loop_gives_the_same_rewards(seed, beta):
    (k1, score, _), mask = random_batch(seed)
    score, lengths = score[:, 0], mask.sum(1).tolist()
    expected = torch.zeros_like(k1)
    for b, t in mask.nonzero().tolist():
        expected[b, t] = -beta * k1[b, t] + (score[b] if t == lengths[b] - 1 else 0)
    exactly(token_rewards(score, k1, mask, beta=beta), expected)


def finish_one(score, length, unfinished, s):
    """(score, keep) of one answer, by the rules as they are written down."""
    unfinished = unfinished or length < s["min_response_tokens"]
    if unfinished and s["rule"] == "replace":
        score = s["low_quantile"]
    elif unfinished and s["rule"] == "subtract":
        score -= s["penalty"]
    elif unfinished and s["rule"] == "scale":
        score = s["low_quantile"] + s["factor"] * (score - s["low_quantile"])
    if s["overlong_buffer"]:
        over = (length - (s["cap"] - s["overlong_buffer"])) / s["overlong_buffer"]
        score -= s["overlong_penalty"] * min(max(over, 0), 1)
    return score - s["per_token_penalty"] * length, not (unfinished and s["rule"] == "mask")


@given(
    seed=integers(0, 999),
    rule=sampled_from(["replace", "subtract", "scale", "mask"]),
    buffer=integers(0, 8),
    shortest=integers(0, 5),
)
def test_a_loop_over_answers_gives_the_same_final_scores(seed, rule, buffer, shortest):
    draw = torch.Generator().manual_seed(seed)
    score, length = torch.randn(7, generator=draw, dtype=torch.float64), torch.randint(1, 11, (7,), generator=draw)
    unfinished = torch.rand(7, generator=draw) < 0.5
    settings = OFF | {"rule": rule, "overlong_buffer": buffer, "min_response_tokens": shortest}
    settings["per_token_penalty"] = 0.05
    found, keep = finish_scores(score, length, unfinished, **settings)
    answers = zip(score.tolist(), length.tolist(), unfinished.tolist(), strict=True)
    expected = [finish_one(*answer, settings) for answer in answers]
    # penalties of integer lengths are float32
    assert found.tolist() == pytest.approx([value for value, _ in expected], abs=1e-6)
    assert keep.tolist() == [kept for _, kept in expected]


@pytest.mark.parametrize(
    ("rule", "expected", "kept"),
    [
        ("replace", [1.0, 2.0, -2.0, -2.0, 0.5], [1, 1, 1, 1, 1]),
        ("subtract", [1.0, 2.0, 1.5, -5.5, 0.5], [1, 1, 1, 1, 1]),
        ("scale", [1.0, 2.0, 0.5, -3.0, 0.5], [1, 1, 1, 1, 1]),
        ("mask", [1.0, 2.0, 3.0, -4.0, 0.5], [1, 1, 0, 0, 1]),
    ],
)
def test_each_unfinished_rule_on_one_table(rule, expected, kept):
    score, keep = finish_scores(SCORE, LENGTH, UNFINISHED, **{**OFF, "rule": rule})
    assert score.tolist() == expected
    assert keep.tolist() == [bool(k) for k in kept]


@pytest.mark.parametrize(("rule", "last"), [("replace", -2.0), ("subtract", -1.0), ("scale", -0.75)])
def test_answers_that_are_too_short_count_as_unfinished(rule, last):
    score, _ = finish_scores(SCORE, LENGTH, UNFINISHED, **{**OFF, "rule": rule, "min_response_tokens": 2})
    assert score[-1].item() == last
    assert score[1].item() == 2.0


def test_the_overlong_ramp_grows_over_the_buffer_to_the_full_penalty_at_the_cap():
    length = torch.tensor([5, 6, 8, 10])
    score, _ = finish_scores(
        torch.zeros(4),
        length,
        torch.zeros(4, dtype=torch.bool),
        **{**OFF, "overlong_buffer": 4, "overlong_penalty": 2.0},
    )
    assert score.tolist() == [0.0, 0.0, -1.0, -2.0]


def test_every_token_costs_its_penalty():
    score, _ = finish_scores(SCORE, LENGTH, UNFINISHED, **{**OFF, "per_token_penalty": 0.1})
    assert_close(score, torch.tensor([0.0, 1.6, -3.0, -3.0, 0.4]))


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule must be replace, subtract, scale or mask, got 'drop'"):
        finish_scores(SCORE, LENGTH, UNFINISHED, **{**OFF, "rule": "drop"})


def test_clipped_scores_are_counted_and_nan_is_left_to_be_caught():
    score, hits = clip_scores(torch.tensor([-11.0, 10.0, math.inf, 0.5, math.nan]), 10.0)
    assert score[:4].tolist() == [-10.0, 10.0, 10.0, 0.5]
    assert score[4].isnan()
    assert hits.item() == 2


def test_explained_variance_of_perfect_constant_and_wrong_critics():
    returns, mask = torch.tensor([[1.0, 2.0, 4.0, math.nan]]), torch.tensor([[True, True, True, False]])
    (clean,) = selected(mask, returns)
    assert explained_variance(clean, returns, mask).item() == 1
    assert explained_variance(torch.full_like(clean, 9.0), returns, mask).item() == pytest.approx(0, abs=1e-6)
    assert explained_variance(-clean, returns, mask).item() == pytest.approx(-3, abs=1e-5)
    assert explained_variance(clean, torch.ones_like(clean), mask).item() == 0


@given(seed=integers(0, 999))
def test_explained_variance_equals_its_loop(seed):
    (value, returns, _), mask = random_batch(seed)
    pairs = [(value[b, t].item(), returns[b, t].item()) for b, t in mask.nonzero().tolist()]

    def variance(xs):
        return sum((x - sum(xs) / len(xs)) ** 2 for x in xs) / len(xs)

    expected = 1 - variance([r - v for v, r in pairs]) / variance([r for _, r in pairs])
    assert explained_variance(value, returns, mask).item() == pytest.approx(expected, abs=1e-10)


@given(seed=integers(0, 999), limit=floats(0.1, 3))
def test_clipped_scores_equal_their_loop(seed, limit):
    (scores, _, _), _ = random_batch(seed)
    score, hits = clip_scores(scores[0], limit)
    assert score.tolist() == [min(max(s, -limit), limit) for s in scores[0].tolist()]
    assert hits.item() == sum(abs(s) > limit for s in scores[0].tolist())
