import json

import pytest

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.types import Turn
from direct_rlhf.errors import DataError
from direct_rlhf.evaluate import generate
from direct_rlhf.evaluate.chats import LocalChat, RecordedChat, Reply, Request
from direct_rlhf.evaluate.generate import Answer
from direct_rlhf.recipe.schema import DialogueSection, JudgeSection

REQUESTS = [Request((("system", "Judge."), ("user", f"answer {i}"))) for i in range(5)]


@pytest.fixture
def local(tiny_folder):
    section = JudgeSection(model=str(tiny_folder), max_tokens=6, batch_size=2)
    return LocalChat(
        section, dtype="float32", device="cpu", seed=3, folder=None, should_stop=lambda: False, report=print
    )


def test_a_local_judge_answers_in_order_and_keeps_each_batch(local, monkeypatch):
    batches = []

    def scripted(model, tokens, asks, **settings):
        batches.append(len(asks))
        texts = [tokens.decode(list(ask.prompt_ids)) for ask in asks]
        return [
            Answer(failure="non_finite")
            if "answer 3" in text
            else Answer(text[-40:], finish="length" if "answer 4" in text else "eos")
            for text in texts
        ]

    monkeypatch.setattr(generate, "generate", scripted)
    kept = {}
    replies = local.replies(REQUESTS, kept.__setitem__)
    assert batches == [2, 2, 1]
    assert [reply.finish for reply in replies] == ["stop", "stop", "stop", "", "length"]
    assert [reply.failure for reply in replies] == ["", "", "", "non_finite", ""]
    assert "answer 1\n\nAssistant:" in replies[1].text
    assert kept == dict(enumerate(replies))


def test_a_local_judge_says_the_same_again_and_alone(local):
    together = local.replies(REQUESTS, lambda index, reply: None)
    assert local.replies(REQUESTS[2:3], lambda index, reply: None) == together[2:3]
    assert {"local", "tokenizer", "temperature", "max_tokens", "seed"} <= set(local.identity)


def test_a_prompt_that_does_not_fit_a_local_judge_fails_alone(local):
    long = Request((("user", "snow " * 400),))
    replies = local.replies([REQUESTS[0], long], lambda index, reply: None)
    assert [reply.failure for reply in replies] == ["", "prompt_too_long"]


def test_a_template_without_a_system_turn_gets_its_words_in_the_first_message(local, tokens):
    form = DialogueFormat(DialogueSection(), tokens)

    class Refusing:
        def prompt_text(self, turns):
            raise DataError("no system turns here")

    local.__dict__["_loaded"] = (None, form)
    assert local._turns(REQUESTS[0])[0] == Turn("system", "Judge.")
    del local.__dict__["_takes_system"]
    local.__dict__["_loaded"] = (None, Refusing())
    again = REQUESTS[0].then("Hm.", "And?")
    assert local._turns(again) == (Turn("human", "Judge.\n\nanswer 0"), Turn("assistant", "Hm."), Turn("human", "And?"))


def test_recorded_replies_are_found_by_the_request(tmp_path):
    path = tmp_path / "judgments.jsonl"
    path.write_text(
        json.dumps({"key": "k", "request": REQUESTS[1].sha256, "reply": "[[4]]", "finish": "length"}) + "\n"
    )
    kept = {}
    replies = RecordedChat(path).replies(REQUESTS[:2], kept.__setitem__)
    assert replies == [Reply(failure="not_recorded"), Reply("[[4]]", "length")]
    assert kept == dict(enumerate(replies))


@pytest.mark.parametrize("text", ["", '{"reply": "x"}\n', '{"request": "x", "reply": 3}\n', "[1]\n"])
def test_a_file_without_replies_is_refused(tmp_path, text):
    (tmp_path / "j.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"no recorded reply|holds no replies"):
        RecordedChat(tmp_path / "j.jsonl")


def test_an_empty_reply_makes_one_longer_message():
    assert REQUESTS[0].then(" ", "And?").messages == (("system", "Judge."), ("user", "answer 0\n\nAnd?"))
    assert REQUESTS[0].then("Hm.", "And?").messages[2:] == (("assistant", "Hm."), ("user", "And?"))
    assert REQUESTS[0].sha256 != REQUESTS[1].sha256
