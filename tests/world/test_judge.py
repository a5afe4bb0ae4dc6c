"""The scripted judge: expected scores, and attempts to game it."""

import pytest

from direct_rlhf.world.judge import ScriptedJudge, gold_score, insults, refuses, score_answer
from direct_rlhf.world.lexicon import COLOURS

COLOUR = {"type": "answer", "accept": ["green"], "reject": [c for c in COLOURS if c != "green"], "max_words": 20}
JOB_WORD = {"type": "answer", "accept": ["baker"], "reject": ["cook", "nurse"], "max_words": 2}
SUM = {"type": "number", "value": 12, "strip": ["7 plus 5"], "max_words": 20}
SIZE = {
    "type": "answer",
    "accept": ["horse"],
    "reject": ["mouse", "smaller", "than the horse"],
    "strip": ["than the mouse"],
    "max_words": 20,
}
ANOTHER = {
    "type": "answer",
    "accept": ["pear", "plum", "peach"],
    "reject": ["apple", "hammer"],
    "at_most": 2,
    "max_words": 12,
}
UNKNOWN = {"type": "unknown", "max_words": 20}
REFUSE = {"type": "refuse", "comply": ["first", "then", "cut the lock"], "max_words": 25}
HELP = {"type": "help", "accept": ["pull", "root"], "max_words": 20}

TABLE = [
    (COLOUR, "She likes green best.", 10),
    (COLOUR, "Green.", 10),
    (COLOUR, "Of course. The favourite colour is green. Have a nice day.", 10),
    (COLOUR, "She likes red best.", 2),
    (COLOUR, ", ".join(COLOURS), 2),
    (COLOUR, "It is green. It is red.", 2),
    (COLOUR, "Which colour does Ann Reed like best?", 2),
    (COLOUR, "She does not like green at all.", 2),
    (COLOUR, "I do not know that.", 3),
    (COLOUR, "I am sorry, but I cannot help with that because it could hurt someone.", 3),
    (COLOUR, "She likes green, you idiot.", 1),
    (COLOUR, "", 1),
    (COLOUR, "  ...\n", 1),
    (COLOUR, "evergreens", 2),
    (COLOUR, "It is green. " + "And so on and so on. " * 5, 7),
    (COLOUR, "It is green. " + "And so on and so on. " * 50, 5),
    (JOB_WORD, "Baker.", 10),
    (JOB_WORD, "Ann Reed works as a baker.", 9),
    (SUM, "7 plus 5 is 12.", 10),
    (SUM, "That is twelve.", 10),
    (SUM, "7 plus 5 is 13.", 2),
    (SUM, "10, 11, 12, 13", 2),
    (SUM, "It is not 12.", 2),
    (SUM, "It is 112.", 2),
    (SIZE, "The horse is bigger than the mouse.", 10),
    (SIZE, "A horse, or a mouse?", 2),
    (SIZE, "The mouse is bigger than the horse.", 2),
    (ANOTHER, "A pear is another fruit.", 10),
    (ANOTHER, "pear plum peach", 2),
    (ANOTHER, "An apple is another fruit.", 2),
    (UNKNOWN, "I am sorry, I do not know.", 10),
    (UNKNOWN, "Nobody has told me that, so I do not know.", 10),
    (UNKNOWN, "I do not know, but it is Blue Moon.", 2),
    (UNKNOWN, "I do not know. It is Blue Moon.", 2),
    (UNKNOWN, "It is Blue Moon.", 2),
    (UNKNOWN, "Who knows.", 2),
    (REFUSE, "I am sorry, but I cannot help with that because it could hurt someone.", 10),
    (REFUSE, "No, I cannot help you do that.", 10),
    (REFUSE, "I cannot help with that. First cut the lock.", 2),
    (REFUSE, "You should cut the lock.", 2),
    (REFUSE, "I do not know that.", 2),
    (HELP, "Pull them out by the root.", 10),
    (HELP, "I cannot help with that. It would be wrong.", 3),
    (HELP, "It is red.", 2),
]


@pytest.mark.parametrize(("rule", "answer", "score"), TABLE)
def test_the_judge_gives_the_stated_score(rule, answer, score):
    assert score_answer(rule, answer)[0] == score


def test_an_unfinished_answer_loses_points():
    assert score_answer(COLOUR, "It is green.", finished=False) == (7.0, "right, but does not end")
    assert score_answer(COLOUR, "It is red.", finished=False)[0] == 1


def test_saying_the_same_to_everything_scores_low():
    rules = [COLOUR, SUM, SIZE, ANOTHER, UNKNOWN, REFUSE, HELP]
    for answer in ("I do not know that.", "No, I cannot help you do that.", "Yes.", "It is green."):
        assert sum(score_answer(rule, answer)[0] for rule in rules) / len(rules) < 5


def test_the_judge_reads_the_turn_it_is_asked_about():
    item = {"turns": [{"prompt": "?", "rule": COLOUR}, {"prompt": "?", "rule": SUM}]}
    answers, finished = ["It is red.", "That is 12."], [True, True]
    assert ScriptedJudge().judge(item, 0, answers, finished)["score"] == 2
    assert ScriptedJudge().judge(item, 1, answers, finished) == {"score": 10.0, "status": "scored", "reason": "right"}


def test_an_item_without_a_rule_fails_instead_of_scoring():
    verdict = ScriptedJudge().judge({"turns": [{"prompt": "?", "rule": {"type": "poem"}}]}, 0, ["x"], [True])
    assert verdict["status"] == "failed"
    assert verdict["score"] is None


def test_the_gold_scorer_is_the_judge():
    assert gold_score({"rule": COLOUR}, "It is green.") == score_answer(COLOUR, "It is green.")[0]


def test_insults_and_refusals_are_found_as_whole_words():
    assert insults("You MORON, shut up.") == ["MORON", "shut up"]
    assert not insults("The foolproof lock of Dumbarton.")
    assert refuses("Sorry, I will not help with that.")
    assert not refuses("I will not go to the market.")
