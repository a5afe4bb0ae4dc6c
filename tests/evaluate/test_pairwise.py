import pytest
from hypothesis import given
from hypothesis import strategies as st

from direct_rlhf.evaluate.chats import Reply
from direct_rlhf.evaluate.judgments import NAME, Kept
from direct_rlhf.evaluate.mt_bench import read_judge_prompts
from direct_rlhf.evaluate.pairwise import Both, inconsistency, judge_pairs
from direct_rlhf.evaluate.prompted import CHOICE_ALONE, Panel
from direct_rlhf.evaluate.records import Item
from injections import ATTACKS, write_prompts
from judge_chats import SaidChat

QUESTIONS = [
    {"id": f"q{i}", "category": "sky" if i % 2 else "snow", "turns": [{"prompt": f"What, {i}?"}, {"prompt": "And?"}]}
    for i in range(8)
]
CHOICES = st.sampled_from("ABC")


def answers(text, *, without=()):
    """An item a turn, as the conversation suite writes them."""
    return [
        Item(
            "conversation",
            f"{q['id']}:{turn}",
            "failed",
            None,
            reason="prompt_too_long",
            cluster=q["id"],
            extra={"turn": turn},
        )
        if (q["id"], turn) in without
        else Item(
            "conversation", f"{q['id']}:{turn}", "scored", 5.0, output=text, cluster=q["id"], extra={"turn": turn}
        )
        for turn in (1, 2)
        for q in QUESTIONS
    ]


@pytest.fixture
def judged(tmp_path, bars):
    prompts = read_judge_prompts(write_prompts(tmp_path / "prompts.jsonl"))

    def run(say, a, b):
        chat = SaidChat(say)
        panel = Panel(chat, Kept(tmp_path / NAME), bars)
        result, items = judge_pairs(panel, prompts, QUESTIONS, a, b, models=("x", "y"), draws=300, seed=1)
        return result, items, chat

    return run


def prefers(text):
    """A judge that finds the side on which the text stands."""

    def say(messages):
        shown = messages[1][1]
        place = shown.index(text)
        second = max(shown.find("Answer B]"), shown.find("Conversation B|>"))
        return "[[B]]" if place > second > 0 else "[[A]]"

    return say


@pytest.mark.parametrize(
    ("straight", "turned", "value", "favoured"),
    [
        ("A", "B", 1.0, None), ("B", "A", 0.0, None), ("C", "C", 0.5, None),
        ("A", "A", 0.5, "first"), ("B", "B", 0.5, "second"),
        ("A", "C", 0.5, "first"), ("C", "A", 0.5, "first"), ("B", "C", 0.5, "second"), ("C", "B", 0.5, "second"),
    ],
)  # fmt: skip
def test_what_two_orders_make_together(straight, turned, value, favoured):
    both = Both(straight, turned)
    assert (both.value, both.favoured, both.consistent) == (value, favoured, favoured is None)


@given(CHOICES, CHOICES)
def test_turning_a_pair_round_turns_its_value_round(straight, turned):
    assert Both(straight, turned).value == 1 - Both(turned, straight).value
    assert Both(straight, turned).favoured == Both(turned, straight).favoured


@pytest.mark.promise("J6")
def test_the_model_that_wins_in_both_orders_wins(judged):
    result, items, chat = judged(prefers("good"), answers("good"), answers("poor"))
    assert (result.summary.mean, result.verdict) == (1.0, "higher")
    assert result.outcomes == {"wins": 16, "ties": 0, "losses": 0}
    assert result.inconsistency.rate == 0
    assert len(chat.asked) == 32
    assert {summary.counts.n_scored for summary in result.by_turn.values()} == {8}
    assert set(result.by_category) == {"sky", "snow"}
    assert {item.value for item in items} == {1.0}
    turned, _, _ = judged(prefers("good"), answers("poor"), answers("good"))
    assert (turned.summary.mean, turned.verdict) == (0.0, "lower")


@pytest.mark.promise("J6")
@pytest.mark.parametrize(("letter", "place"), [("A", "first"), ("B", "second")])
def test_a_judge_that_always_prefers_one_place_is_inconsistent_throughout(judged, letter, place):
    result, items, _ = judged(lambda messages: f"[[{letter}]]", answers("good"), answers("poor"))
    found = result.inconsistency
    assert (found.rate, found.high, found.favoured[place]) == (1.0, 1.0, 16)
    assert (result.summary.mean, result.summary.low, result.summary.high) == (0.5, 0.5, 0.5)
    assert result.verdict == "no difference shown"
    assert all(item.extra["consistent"] is False for item in items)


@pytest.mark.promise("J8")
def test_two_identical_models_are_not_told_apart(judged):
    """Equal answers make equal requests in both orders, and a judge with an opinion on them is of one place."""
    by_prompt = lambda messages: f"[[{'ABC'[sum(messages[1][1].encode()) % 3]}]]"
    result, _, _ = judged(by_prompt, answers("same"), answers("same"))
    assert result.outcomes == {"wins": 0, "ties": 16, "losses": 0}
    assert result.verdict == "no difference shown"
    assert result.summary.low <= 0.5 <= result.summary.high


@pytest.mark.promise("J2")
def test_a_pair_with_one_verdict_alone_has_failed_and_is_in_no_rate(judged):
    def say(messages):
        shown = messages[1][1]
        if "What, 3?" in shown and "And?" not in shown and shown.index("poor") < shown.index("good"):
            return Reply(failure="http_500", detail="gone")
        if "What, 4?" in shown and "And?" in shown:
            return "I cannot say."
        return prefers("good")(messages)

    result, items, chat = judged(say, answers("good"), answers("poor", without={("q5", 2)}))
    assert {item.id: item.reason for item in items if item.status == "failed"} == {
        "q3:1": "judge_failed",
        "q4:2": "judge_unparsed",
        "q5:2": "no_answer",
    }
    assert (result.summary.mean, result.summary.counts.n_scored, result.inconsistency.rate) == (1.0, 13, 0)
    assert result.summary.headline(0.95) is None
    assert sum(messages.messages[-1][1] == CHOICE_ALONE for messages in chat.asked) == 2


@pytest.mark.promise("J5")
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_answer_cannot_win_by_what_it_says_of_itself(judged, attack):
    quotes = lambda messages: f"I read {messages[1][1]}\n\n[[C]]"
    result, _, _ = judged(quotes, answers(ATTACKS[attack]), answers("poor"))
    assert result.outcomes == {"wins": 0, "ties": 16, "losses": 0}


def test_inconsistency_of_nothing_is_unknown():
    assert inconsistency([]).as_json() == {
        "inconsistency_rate": None, "inconsistency_ci": None, "favoured": {"first": 0, "second": 0},
    }  # fmt: skip
