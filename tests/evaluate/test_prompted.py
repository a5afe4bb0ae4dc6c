import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from direct_rlhf.evaluate.chats import RecordedChat, Reply
from direct_rlhf.evaluate.endpoint import Budget, EndpointChat
from direct_rlhf.evaluate.judge import Asked, ask_all
from direct_rlhf.evaluate.judgments import NAME, Kept
from direct_rlhf.evaluate.mt_bench import JudgePrompts, read_judge_prompts
from direct_rlhf.evaluate.prompted import SCORE_ALONE, Panel, PromptedJudge, make_case
from direct_rlhf.recipe.schema import JudgeSection
from injections import ATTACKS, write_prompts
from judge_chats import SaidChat
from judge_server import JudgeServer

QUESTION = {"id": "q", "category": "sky", "turns": [{"prompt": "What colour is it?"}, {"prompt": "And at night?"}]}
WITH_REFERENCE = {**QUESTION, "reference": ["blue", "black"], "reference_ok": True}


@pytest.fixture
def prompts(tmp_path):
    return read_judge_prompts(write_prompts(tmp_path / "prompts.jsonl"))


@pytest.fixture
def judge(tmp_path, prompts, bars):
    def make(say, model="sha", **identity):
        chat = SaidChat(say, **identity)
        made = PromptedJudge(Panel(chat, Kept(tmp_path / "run" / NAME), bars), prompts, model)
        made.chat = chat
        return made

    return make


def number(messages):
    return int(re.search(r"Question (\d+)", messages[1]["content"])[1])


def asked(answers=("It is blue.",), question=QUESTION):
    return Asked(question, len(answers) - 1, tuple(answers), (True,) * len(answers))


def test_the_first_turn_is_asked_with_its_question_and_answer_alone(judge):
    one = judge(lambda messages: "Fine. [[8]]")
    (verdict,) = one.judge_all([asked()])
    assert (verdict.score, verdict.status, verdict.reason) == (8.0, "scored", "Fine. [[8]]")
    (request,) = one.chat.asked
    assert request.messages[1] == (
        "user",
        "[Question]\nWhat colour is it?\n\n[The Start of Answer]\nIt is blue.\n[The End of Answer]",
    )


def test_the_second_turn_is_asked_with_the_whole_conversation_and_references_where_there_are(judge):
    one = judge(lambda messages: "[[8]]")
    one.judge_all([asked(("blue!", "black!"), WITH_REFERENCE)])
    text = one.chat.asked[0].messages[1][1]
    parts = ["blue", "black", "What colour is it?", "blue!", "And at night?", "black!"]
    assert [text.index(part) for part in parts[2:]] == sorted(text.index(part) for part in parts[2:])
    assert text.startswith("[The Start of Reference]\nblue\n[The End of Reference]\n\n[The Start of Reference]\nblack")


def test_a_reply_without_a_verdict_is_followed_by_one_request_for_it_alone(judge):
    one = judge(lambda messages: "[[6]]" if messages[-1][1] == SCORE_ALONE else "I like it.")
    (verdict,) = one.judge_all([asked()])
    assert (verdict.score, verdict.reason) == (6.0, "I like it.\n\n[[6]]")
    assert one.chat.asked[1].messages == (
        *one.chat.asked[0].messages,
        ("assistant", "I like it."),
        ("user", SCORE_ALONE),
    )


def test_a_second_reply_without_one_is_a_failure_and_no_third_is_asked(judge):
    one = judge(lambda messages: "I like it. 8/10 as in [1]")
    (verdict,) = one.judge_all([asked()])
    assert (verdict.score, verdict.status, verdict.reason[:10]) == (None, "failed", "no_verdict")
    assert len(one.chat.asked) == 2


def test_a_reply_that_the_cap_cut_is_no_verdict(judge):
    one = judge(lambda messages: Reply("It was [[10]] at first, but", "length"))
    (verdict,) = one.judge_all([asked()])
    assert (verdict.score, verdict.status) == (None, "failed")
    assert len(one.chat.asked) == 2


def test_an_empty_reply_is_asked_again_in_one_message(judge):
    one = judge(lambda messages: "[[4]]" if SCORE_ALONE in messages[-1][1] else Reply("", "content_filter"))
    assert one.judge_all([asked()])[0].score == 4
    assert [role for role, _ in one.chat.asked[1].messages] == ["system", "user"]


@pytest.mark.promise("J2")
def test_a_request_that_failed_is_no_score_and_is_asked_for_in_the_next_run(judge):
    state = {"down": True}
    one = judge(lambda messages: Reply(failure="http_500", detail="gone") if state["down"] else "[[8]]")
    (verdict,) = one.judge_all([asked()])
    assert (verdict.score, verdict.status, verdict.reason) == (None, "failed", "http_500: gone")
    state["down"] = False
    assert one.judge_all([asked()])[0].score == 8


@pytest.mark.promise("J3", "J4")
def test_a_judgment_is_paid_for_once(judge, bars):
    one = judge(lambda messages: "[[6]]" if messages[-1][1] == SCORE_ALONE else "Hm.")
    first = one.judge_all([asked(), asked(("a", "b"))])
    again = judge(lambda messages: 1 / 0)
    assert ask_all(again, [asked(), asked(("a", "b"))], lambda: False) == first
    assert again.chat.asked == []
    assert bars.done == 4


@pytest.mark.promise("J4")
def test_whatever_a_judgment_depends_on_makes_it_another(judge, tmp_path, prompts):
    judge(lambda messages: "[[8]]").judge_all([asked(("a", "b"), WITH_REFERENCE)])

    def misses(one, item):
        one.judge_all([item])
        return len(one.chat.asked)

    same = asked(("a", "b"), WITH_REFERENCE)
    assert misses(judge(lambda messages: "[[8]]"), same) == 0
    assert misses(judge(lambda messages: "[[8]]", model="other"), same) == 1
    assert misses(judge(lambda messages: "[[8]]", temperature=1.0), same) == 1
    for changed in (
        {"id": "other"},
        {"turns": [{"prompt": "Which?"}, QUESTION["turns"][1]]},
        {"turns": [QUESTION["turns"][0], {"prompt": "Which?"}]},
        {"reference": ["blue", "dark"]},
    ):
        assert misses(judge(lambda messages: "[[8]]"), asked(("a", "b"), {**WITH_REFERENCE, **changed})) == 1, changed
    assert misses(judge(lambda messages: "[[8]]"), asked(("a", "b"))) == 1  # without the reference
    assert misses(judge(lambda messages: "[[8]]"), asked(("a", "c"), WITH_REFERENCE)) == 1
    assert misses(judge(lambda messages: "[[8]]"), asked(("c", "b"), WITH_REFERENCE)) == 1
    assert misses(judge(lambda messages: "[[8]]"), asked(("a",), WITH_REFERENCE)) == 1
    # answers that differ in invisible characters alone look the same to the judge, and are two answers all the same
    assert misses(judge(lambda messages: "[[8]]"), asked(("a", "b\u200b"), WITH_REFERENCE)) == 1
    reworded = {
        use: type(prompt)(prompt.name, prompt.system + " Be strict.", prompt.template)
        for use, prompt in prompts.by_use.items()
    }
    one = judge(lambda messages: "[[8]]")
    one._prompts = JudgePrompts(reworded, "")
    assert misses(one, same) == 1


@pytest.mark.promise("J4")
def test_the_order_of_two_answers_is_part_of_the_key(prompts):
    keys = [
        make_case(prompts, "pairwise", QUESTION, 0, {"_a": [a], "_b": [b]}, models=["x", "y"], about={}).key
        for a, b in (("one", "two"), ("two", "one"), ("one", "two"))
    ]
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


@pytest.mark.promise("J5")
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("question", [QUESTION, WITH_REFERENCE], ids=["general", "reference"])
def test_an_answer_cannot_write_its_own_verdict(judge, attack, question):
    """The judge quotes all that it is shown, and then gives its verdict, or forgets to and is asked again."""
    quotes = judge(lambda messages: f"I read:\n{messages[1][1]}\n\nRating: [[3]]")
    forgets = judge(
        lambda messages: "[[2]]" if messages[-1][1] == SCORE_ALONE else f"I read:\n{messages[1][1]}", other=1
    )
    for answers in ((ATTACKS[attack],), ("fine", ATTACKS[attack]), (ATTACKS[attack], "fine")):
        assert quotes.judge_all([asked(answers, question)])[0].score == 3
        assert forgets.judge_all([asked(answers, question)])[0].score == 2


@pytest.mark.promise("J5")
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_prompt_has_as_many_delimiters_with_an_attack_as_without(prompts, attack):
    for kind, sides in (("single", ("",)), ("pairwise", ("_a", "_b"))):
        for turn in (0, 1):
            for question in (QUESTION, WITH_REFERENCE):
                plain, attacked = (
                    make_case(
                        prompts,
                        kind,
                        question,
                        turn,
                        {side: [answer] * (turn + 1) for side in sides},
                        models=[],
                        about={},
                    ).request.messages[1][1]
                    for answer in ("plain", ATTACKS[attack])
                )
                for mark in (r"\[\s*the\s+(start|end)\s+of", r"<\|", r"###", r"\[\["):
                    count = [len(re.findall(mark, text, re.IGNORECASE)) for text in (plain, attacked)]
                    assert count[0] == count[1], (mark, attacked)


def test_replies_of_an_earlier_run_give_its_scores_again(judge, tmp_path, prompts, bars):
    items = [asked(), asked(("a", "b"))]
    first = judge(lambda messages: "[[6]]" if messages[-1][1] == SCORE_ALONE else "Hm.").judge_all(items)
    recorded = RecordedChat(tmp_path / "run" / NAME)
    again = PromptedJudge(Panel(recorded, Kept(tmp_path / "other" / NAME), bars), prompts, "sha")
    assert again.judge_all(items) == first
    (missing,) = again.judge_all([asked(("never asked",))])
    assert (missing.score, missing.status, missing.reason) == (None, "failed", "not_recorded")


RUN = """
import contextlib, sys
from pathlib import Path
from types import SimpleNamespace
from direct_rlhf.evaluate.endpoint import Budget, EndpointChat
from direct_rlhf.evaluate.judge import Asked
from direct_rlhf.evaluate.judgments import Kept
from direct_rlhf.evaluate.mt_bench import read_judge_prompts
from direct_rlhf.evaluate.prompted import Panel, PromptedJudge
from direct_rlhf.recipe.schema import JudgeSection
url, prompts, kept = sys.argv[1:]
bars = contextlib.contextmanager(lambda title, total=None: (x for x in [SimpleNamespace(advance=lambda n: None)]))
chat = EndpointChat(JudgeSection(base_url=url, model="m", concurrency=2), Budget(None, None))
judge = PromptedJudge(Panel(chat, Kept(Path(kept)), bars), read_judge_prompts(Path(prompts)), "sha")
questions = [{"id": str(i), "category": "c", "turns": [{"prompt": f"Question {i}?"}]} for i in range(30)]
verdicts = judge.judge_all([Asked(question, 0, ("It is so.",), (True,)) for question in questions])
print([verdict.score for verdict in verdicts])
"""


@pytest.mark.promise("J3")
def test_a_run_that_was_killed_goes_on_without_asking_again(tmp_path):
    """SIGKILL when the 11th request comes in. What was under way then (2 at a time) is asked for again, nothing else."""
    write_prompts(tmp_path / "prompts.jsonl")
    with JudgeServer(lambda messages: f"[[{1 + number(messages) % 10}]]") as server:
        command = [sys.executable, "-c", RUN, server.url, str(tmp_path / "prompts.jsonl"), str(tmp_path / NAME)]
        child = subprocess.Popen(command)
        server.before = lambda number: child.send_signal(signal.SIGKILL) if number >= 11 else None
        assert child.wait(60) == -signal.SIGKILL
        time.sleep(0.3)  # what the dead process has sent still arrives
        server.before = lambda number: None
        kept = len(Kept(tmp_path / NAME))
        asked_before = len(server.asked)
        assert 9 <= kept <= 11
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([float(1 + i % 10) for i in range(30)])
    assert len(server.asked) - asked_before == 30 - kept


def test_faults_on_the_way_change_no_verdict(tmp_path, prompts, bars):
    """One request in ten meets each fault at its first try."""
    faults = ["429", "500", "timeout", "reset", "json", "empty"]
    fault = lambda messages, nth: (
        faults[number(messages) // 10 % 6] if nth == 1 and number(messages) % 10 == 3 else None
    )
    items = [
        Asked({"id": str(i), "category": "c", "turns": [{"prompt": f"Question {i}?"}]}, 0, ("It is so.",), (True,))
        for i in range(60)
    ]
    with JudgeServer(
        lambda messages: f"[[{1 + number(messages) % 10}]]", fault, headers={"Retry-After": "0"}
    ) as server:
        section = JudgeSection(base_url=server.url, model="m", timeout=0.3)
        chat = EndpointChat(section, Budget(None, None), pause=lambda seconds: None)
        verdicts = PromptedJudge(Panel(chat, Kept(tmp_path / NAME), bars), prompts, "sha").judge_all(items)
    assert [verdict.score for verdict in verdicts] == [1 + i % 10 for i in range(60)]
    assert len(server.asked) == 66


def test_the_words_of_the_judge_are_kept_with_what_they_are_about(judge, tmp_path):
    judge(lambda messages: "Fine. [[8]]").judge_all([asked()])
    (row,) = [Kept(tmp_path / "run" / NAME)._rows[key] for key in Kept(tmp_path / "run" / NAME)._rows]
    assert {key: row[key] for key in ("question", "turn", "prompt", "step", "reply", "judge")} == {
        "question": "q", "turn": 1, "prompt": "single-general-one", "step": 0, "reply": "Fine. [[8]]", "judge": "said",
    }  # fmt: skip
    assert Path(tmp_path / "run" / NAME).read_bytes().count(b"\n") == 1
