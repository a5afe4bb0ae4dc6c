import gzip
import json
from pathlib import Path

import pytest

from direct_rlhf.errors import DataError
from direct_rlhf.evaluate.chats import Reply
from direct_rlhf.evaluate.judgments import NAME, Kept
from direct_rlhf.evaluate.mt_bench import read_judge_prompts
from direct_rlhf.evaluate.prompted import Panel
from direct_rlhf.evaluate.self_check import check_judge, read_human_pairs
from injections import write_prompts
from judge_chats import SaidChat

DATA = Path(__file__).parents[3] / "shared" / "data" / "llmbar" / "processed_human_agreement.jsonl.gz"


@pytest.fixture
def pairs(tmp_path):
    """Forty pairs; people prefer the answer that says `good`, half of them on the first place."""
    rows = [
        {
            "input": f"Question {i}?",
            "output_1": "a good answer" if i % 2 else "a poor answer",
            "output_2": "a poor answer" if i % 2 else "a good answer",
            "label": 1 if i % 2 else 2,
            "subset": "even" if i % 4 == 0 else "other",
        }
        for i in range(40)
    ]
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


@pytest.fixture
def checked(tmp_path, bars, pairs):
    prompts = read_judge_prompts(write_prompts(tmp_path / "prompts.jsonl"))

    def run(say):
        panel = Panel(SaidChat(say), Kept(tmp_path / NAME), bars)
        found = read_human_pairs(pairs, limit=None, subset=None, seed=0)
        return check_judge(panel, prompts, found, draws=300, seed=0)

    return run


def good_first(messages):
    return messages[1][1].index("a good answer") < messages[1][1].index("a poor answer")


def test_a_judge_of_the_peoples_mind_agrees_in_full(checked):
    check, _ = checked(lambda messages: "[[A]]" if good_first(messages) else "[[B]]")
    assert (check.summary.mean, check.inconsistency.rate, check.better_than_chance) == (1.0, 0.0, True)
    assert check.summary.low > 0.9
    assert check.summary.counts.n_scored == 40


def test_a_judge_against_the_people_is_no_better_than_chance(checked):
    check, _ = checked(lambda messages: "[[B]]" if good_first(messages) else "[[A]]")
    assert (check.summary.mean, check.better_than_chance) == (0.0, False)


@pytest.mark.promise("J6")
@pytest.mark.parametrize(("letter", "place"), [("A", "first"), ("B", "second"), ("C", None)])
def test_a_judge_that_always_says_the_same_is_at_chance(checked, letter, place):
    check, _ = checked(lambda messages: f"[[{letter}]]")
    assert (check.summary.mean, check.summary.low, check.better_than_chance) == (0.5, 0.5, False)
    assert check.inconsistency.rate == (1.0 if place else 0.0)
    assert check.inconsistency.favoured == {"first": 40 * (place == "first"), "second": 40 * (place == "second")}


def test_a_judge_that_is_right_in_one_order_alone_agrees_by_half(checked):
    """Right where the good answer stands first, and tied elsewhere: (1 + 0.5) / 2."""
    check, items = checked(lambda messages: "[[A]]" if good_first(messages) else "[[C]]")
    assert (check.summary.mean, check.inconsistency.rate) == (0.75, 1.0)
    assert {item.value for item in items} == {0.75}


@pytest.mark.promise("J2")
def test_failures_are_counted_and_in_no_agreement(checked):
    def say(messages):
        if "Question 3?" in messages[1][1]:
            return Reply(failure="timeout")
        if "Question 4?" in messages[1][1]:
            return "Neither."
        return "[[A]]" if good_first(messages) else "[[B]]"

    check, _ = checked(say)
    assert check.summary.counts.reasons == {"judge_failed": 1, "judge_unparsed": 1}
    found = check.as_json()
    assert (found["agreement"], found["n_scored"], found["n_failed"]) == (1.0, 38, 2)


def test_pairs_are_drawn_by_the_seed_and_kept_to_a_subset(pairs):
    drawn = [read_human_pairs(pairs, limit=10, subset=None, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 10
    assert len(read_human_pairs(pairs, limit=None, subset="even", seed=0)) == 10
    with pytest.raises(DataError, match="no human-labelled pairs of the subset 'odd'"):
        read_human_pairs(pairs, limit=None, subset="odd", seed=0)


@pytest.mark.parametrize("change", [{"label": 0}, {"label": True}, {"output_2": None}, {"input": 3}])
def test_a_row_that_is_no_pair_is_named(tmp_path, change):
    row = {"input": "?", "output_1": "a", "output_2": "b", "label": 1, **change}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"p.jsonl:1: no human-labelled pair"):
        read_human_pairs(tmp_path / "p.jsonl", limit=None, subset=None, seed=0)


@pytest.mark.skipif(not DATA.is_file(), reason="LLMBar is not in ../shared/data")
def test_the_real_pairs_are_read():
    pairs = read_human_pairs(DATA, limit=None, subset=None, seed=0)
    assert (len(pairs), {pair.label for pair in pairs}) == (466, {1, 2})
    assert len(read_human_pairs(DATA, limit=None, subset="MT-Bench", seed=0)) == 200
