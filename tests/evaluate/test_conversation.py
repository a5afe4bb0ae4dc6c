import json
import math

import pytest

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.types import Turn
from direct_rlhf.errors import DataError, Interrupted
from direct_rlhf.evaluate import conversation
from direct_rlhf.evaluate.conversation import evaluate_conversation, read_questions
from direct_rlhf.evaluate.judge import Judgment, ask, load_judge
from direct_rlhf.recipe.schema import ConversationSection, DialogueSection

QUESTIONS = [
    {
        "id": f"q{i}",
        "category": "sky" if i % 2 else "snow",
        "turns": [{"prompt": f"What colour is it, {i}?"}, {"prompt": "And now?"}],
    }
    for i in range(4)
]


class Judge:
    """Scores by turn, and remembers what it was shown."""

    name = "stand-in"

    def __init__(self, verdict=None):
        self.shown = []
        self.verdict = verdict or (lambda item, turn: Judgment(10.0 - 3 * turn, "scored", "fine"))

    def judge(self, item, turn, answers, finished):
        self.shown.append((item["id"], turn, list(answers), list(finished)))
        return self.verdict(item, turn)


@pytest.fixture
def form(tokens):
    return DialogueFormat(DialogueSection(), tokens)


def run(model, form, bars, judge, questions=QUESTIONS, **changed):
    settings = {
        "max_new_tokens": 10,
        "temperature": 1.0,
        "batch_size": 3,
        "seed": 5,
        "draws": 200,
        "should_stop": lambda: False,
        "report": print,
    }
    return evaluate_conversation(model, form, questions, judge, progress=bars, **{**settings, **changed})


def test_the_second_turn_follows_the_models_own_first_answer(model, form, bars, monkeypatch):
    asked = []
    generate = conversation.generate

    def watched(model, tokens, asks, **settings):
        asked.extend(asks)
        return generate(model, tokens, asks, **settings)

    monkeypatch.setattr(conversation, "generate", watched)
    judge = Judge()
    _, items = run(model, form, bars, judge)
    first = {item.cluster: item.output for item in items if item.extra["turn"] == 1}
    second_asks = {one.id: one.prompt_ids for one in asked if one.turn == 1}
    for question in QUESTIONS:
        turns = (
            Turn("human", question["turns"][0]["prompt"]),
            Turn("assistant", first[question["id"]].strip()),
            Turn("human", "And now?"),
        )
        assert list(second_asks[question["id"]]) == form.encode_prompt(turns, 1000)
    assert all(answers[0] == first[name] for name, turn, answers, _ in judge.shown if turn == 1)
    assert all(len(answers) == turn + 1 == len(finished) for _, turn, answers, finished in judge.shown)


def test_scores_by_turn_and_category_with_both_turns_of_a_question_as_one_unit(model, form, bars):
    result, items = run(model, form, bars, Judge())
    assert [item.id for item in items] == [f"q{i}:{turn}" for turn in (1, 2) for i in range(4)]
    assert result.summary.mean == 8.5
    assert {key: summary.mean for key, summary in result.by_turn.items()} == {"1": 10.0, "2": 7.0}
    assert {key: summary.counts.n_scored for key, summary in result.by_category.items()} == {"sky": 4, "snow": 4}
    assert {item.unit for item in items} == {"q0", "q1", "q2", "q3"}
    assert (result.summary.low, result.summary.high) == (8.5, 8.5)  # the turns of a question move together
    assert bars.done == 8


@pytest.mark.promise("J9")
def test_how_an_answer_ended_is_recorded_and_told_to_the_judge(model, form, bars):
    judge = Judge()
    _, items = run(model, form, bars, judge)
    finish = {item.id: item.finish for item in items}
    assert set(finish.values()) <= {"eos", "stop", "length"}
    for name, turn, _, finished in judge.shown:
        assert finished[turn] == (finish[f"{name}:{turn + 1}"] != "length")


@pytest.mark.promise("D3")
def test_an_answer_does_not_depend_on_the_questions_beside_it(model, form, bars):
    _, together = run(model, form, bars, Judge())
    _, alone = run(model, form, bars, Judge(), questions=QUESTIONS[2:3], batch_size=1)
    assert [item.output for item in alone] == [item.output for item in together if item.cluster == "q2"]


@pytest.mark.promise("J2")
@pytest.mark.parametrize(
    ("verdict", "status", "reason"),
    [
        (lambda item, turn: 1 / 0, "failed", "judge_failed"),
        (lambda item, turn: None, "failed", "judge_failed"),
        (lambda item, turn: {"score": 5}, "failed", "judge_failed"),
        (lambda item, turn: Judgment(None, "failed", "no connection"), "failed", "judge_failed"),
        (lambda item, turn: {"score": 15, "status": "scored", "reason": ""}, "unparsed", "judge_unparsed"),
        (lambda item, turn: {"score": 0, "status": "scored", "reason": ""}, "unparsed", "judge_unparsed"),
        (lambda item, turn: {"score": math.nan, "status": "scored", "reason": ""}, "unparsed", "judge_unparsed"),
        (lambda item, turn: {"score": "9", "status": "scored", "reason": ""}, "unparsed", "judge_unparsed"),
    ],
)
def test_a_judge_at_fault_never_becomes_a_score(model, form, bars, verdict, status, reason):
    fault_at = lambda item, turn: verdict(item, turn) if item["id"] == "q1" else Judgment(4.0, "scored", "")
    result, items = run(model, form, bars, Judge(fault_at))
    assert {(item.status, item.value, item.reason) for item in items if item.cluster == "q1"} == {
        (status, None, reason)
    }
    assert result.summary.mean == 4.0
    assert result.summary.counts.n_scored == 6
    assert result.summary.headline(0.95) is None


def test_a_scored_judgment_keeps_its_reason_and_a_plain_mapping_is_taken_too():
    verdict = ask(
        Judge(lambda item, turn: {"score": 7, "status": "scored", "reason": "brief"}), {"id": "q"}, 0, ["a"], [True]
    )
    assert verdict == Judgment(7.0, "scored", "brief")
    with pytest.raises(ValueError, match="if and only if"):
        Judgment(None, "scored", "")


def test_a_dialogue_that_does_not_fit_fails_with_the_turns_after_it(model, form, bars):
    long = {"id": "long", "category": "sky", "turns": [{"prompt": "snow " * 300}, {"prompt": "And now?"}]}
    result, items = run(model, form, bars, Judge(), questions=[*QUESTIONS, long])
    assert {item.id: item.reason for item in items if item.status == "failed"} == {
        "long:1": "prompt_too_long",
        "long:2": "turn_before_failed",
    }
    assert result.summary.counts.n_scored == 8


def test_a_model_of_nans_gives_failed_items(nan_model, form, bars):
    judge = Judge()
    result, _ = run(nan_model, form, bars, judge)
    assert result.summary.mean is None
    assert result.summary.counts.reasons == {"non_finite": 4, "turn_before_failed": 4}
    assert judge.shown == []


def test_a_request_to_stop_is_heard(model, form, bars):
    with pytest.raises(Interrupted):
        run(model, form, bars, Judge(), should_stop=lambda: True)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ('{"id": "q0", "turns": [{"prompt": "x"}]}', "a text that no other row has"),
        ('{"id": 3, "turns": [{"prompt": "x"}]}', "a text that no other row has"),
        ('{"id": "a", "turns": []}', "it needs turns"),
        ('{"id": "a", "turns": [{"prompt": " "}]}', "each of its turns needs a prompt"),
        ("{broken", "not a question"),
    ],
)
def test_a_question_that_is_none_is_named_with_its_line(tmp_path, row, text):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + row + "\n")
    with pytest.raises(DataError, match=rf"questions.jsonl:2: not a question .*{text}|questions.jsonl:2: .*{text}"):
        read_questions(path)


def test_the_scripted_judge_scores_the_worlds_own_questions(tmp_path):
    judge = load_judge(ConversationSection())
    row = {
        "id": "x",
        "turns": [{"prompt": "?", "rule": {"type": "answer", "accept": ["blue"], "reject": ["red"], "max_words": 20}}],
    }
    right, wrong = (ask(judge, row, 0, [answer], [True]) for answer in ("It is blue.", "It is red."))
    assert right.score == 10
    assert wrong.score < 5
    assert ask(judge, {"id": "x", "turns": []}, 0, ["It is blue."], [True]).status == "failed"
