import math

import pytest
import torch
from torch.testing import assert_close

from direct_rlhf.maths.masked import selected
from direct_rlhf.maths.rewards import clip_scores, explained_variance, finish_scores, token_rewards

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


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_score_lands_on_the_last_action(ending):
    actions, slot = ENDINGS[ending]
    reward = token_rewards(torch.tensor([2.5]), torch.zeros(1, 4), torch.tensor([actions]).bool(), beta=0.1)
    assert reward.tolist() == [[2.5 if t == slot else 0.0 for t in range(4)]]


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


def test_a_loop_gives_the_same_rewards():
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.randint(0, 7, (9, 1), generator=draw)
    k1, score = torch.randn(9, 6, generator=draw), torch.randn(9, generator=draw)
    expected = torch.zeros(9, 6)
    for b in range(9):
        for t in range(int(mask[b].sum())):
            expected[b, t] = -0.3 * k1[b, t] + (score[b] if t == int(mask[b].sum()) - 1 else 0)
    assert_close(token_rewards(score, k1, mask, beta=0.3), expected)


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
