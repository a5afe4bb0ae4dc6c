import email.utils
import threading
import time

import pytest

from direct_rlhf.errors import ConfigError, Interrupted, JudgeError
from direct_rlhf.evaluate import endpoint
from direct_rlhf.evaluate.chats import Reply, Request
from direct_rlhf.evaluate.endpoint import Budget, EndpointChat
from direct_rlhf.recipe.schema import JudgeSection
from judge_server import JudgeServer


def requests(n):
    return [Request((("system", "Judge."), ("user", f"answer {i}"))) for i in range(n)]


def echo(messages):
    return f"said of {messages[-1]['content']}"


def chat_of(server, *, budget=None, pause=None, should_stop=lambda: False, clock=None, **changed):
    settings = {"base_url": server.url, "model": "m", "concurrency": 1, "timeout": 0.4, **changed}
    more = {"clock": clock} if clock else {}
    return EndpointChat(
        JudgeSection(**settings),
        budget or Budget(None, None),
        should_stop=should_stop,
        pause=pause or (lambda seconds: None),
        **more,
    )


def ask(chat, asked, keep=lambda index, reply: None):
    return chat.replies(asked, keep)


@pytest.mark.promise("J1")
@pytest.mark.parametrize("fault", ["429", "500", "503", "timeout", "reset", "json", "page", "shape", "empty"])
def test_what_may_pass_is_tried_again(fault):
    waited = []
    with JudgeServer(echo, lambda messages, nth: fault if nth <= 2 else None) as server:
        (reply,) = ask(chat_of(server, pause=waited.append), requests(1))
    assert reply == Reply("said of answer 0", "stop")
    assert len(server.asked) == 3
    assert [0.5 <= waited[0] <= 1, 1 <= waited[1] <= 2, len(waited)] == [True, True, 2]


@pytest.mark.promise("J1")
@pytest.mark.parametrize("fault", ["400", "401", "403", "404"])
def test_a_refusal_is_final(fault):
    waited = []
    with JudgeServer(echo, lambda messages, nth: fault) as server:
        (reply,) = ask(chat_of(server, pause=waited.append), requests(1))
    assert (reply.failure, reply.text) == (f"http_{fault}", "")
    assert (len(server.asked), waited) == (1, [])


@pytest.mark.promise("J1")
def test_the_wait_doubles_up_to_a_minute_and_is_spread():
    waited = []
    with JudgeServer(echo, lambda messages, nth: "500") as server:
        replies = ask(chat_of(server, pause=waited.append, retries=9), requests(2))
    assert [reply.failure for reply in replies] == ["http_500"] * 2
    for tries in (waited[:9], waited[9:]):
        assert all(
            0.5 * top <= seconds <= top for seconds, top in zip(tries, (1, 2, 4, 8, 16, 32, 60, 60, 60), strict=True)
        )
    assert waited[:9] != waited[9:]


@pytest.mark.promise("J1")
def test_a_server_that_names_a_time_is_not_asked_before():
    waited = []
    with JudgeServer(echo, lambda messages, nth: "429" if nth == 1 else None, headers={"Retry-After": "37"}) as server:
        ask(chat_of(server, pause=waited.append), requests(1))
    assert waited == [37]
    waited.clear()
    date = email.utils.formatdate(1_000_090, usegmt=True)
    with JudgeServer(echo, lambda messages, nth: "503" if nth == 1 else None, headers={"Retry-After": date}) as server:
        ask(chat_of(server, pause=waited.append, clock=lambda: 1_000_000), requests(1))
    assert waited == [90]


def test_a_server_that_asks_for_an_hour_is_not_waited_for():
    waited = []
    with JudgeServer(echo, lambda messages, nth: "429", headers={"Retry-After": "3600"}) as server:
        (reply,) = ask(chat_of(server, pause=waited.append), requests(1))
    assert (reply.failure, waited, len(server.asked)) == ("http_429", [], 1)


def test_a_reply_that_the_cap_cut_or_a_filter_took_is_paid_and_marked():
    with JudgeServer(echo, lambda messages, nth: "cut") as server:
        assert ask(chat_of(server), requests(1)) == [Reply("said of answer 0", "length")]
    with JudgeServer(echo, lambda messages, nth: "filtered") as server:
        assert ask(chat_of(server), requests(1)) == [Reply("", "content_filter")]


@pytest.mark.promise("J2")
@pytest.mark.parametrize("every", [20, 2])
def test_what_fails_for_good_is_a_failure_and_the_others_are_there(every):
    bad = lambda messages, nth: "500" if int(messages[-1]["content"].split()[1]) % every == 0 else None
    with JudgeServer(echo, bad) as server:
        replies = ask(chat_of(server, concurrency=4, retries=1), requests(40))
    assert [bool(reply.failure) for reply in replies] == [i % every == 0 for i in range(40)]
    assert all(reply.text == ("" if reply.failure else f"said of answer {i}") for i, reply in enumerate(replies))


def test_a_server_that_never_answers_ends_the_work_early():
    with (
        JudgeServer(echo, lambda messages, nth: "401") as server,
        pytest.raises(JudgeError, match="8 requests in a row"),
    ):
        ask(chat_of(server), requests(40))
    assert len(server.asked) < 20


def test_replies_are_in_order_for_any_number_at_a_time():
    with JudgeServer(
        echo, lambda messages, nth: "500" if nth == 1 and "7" in messages[-1]["content"] else None
    ) as server:
        found = [ask(chat_of(server, concurrency=n), requests(30)) for n in (1, 8)]
    assert found[0] == found[1] == [Reply(f"said of answer {i}", "stop") for i in range(30)]


def test_what_is_sent_is_the_messages_and_the_decoding():
    with JudgeServer(echo) as server:
        ask(chat_of(server, max_tokens=11), requests(1))
        ask(chat_of(server, temperature=None, limit_field="max_completion_tokens", max_tokens=12), requests(1))
    messages = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "answer 0"}]
    assert server.asked[0] == {"model": "m", "messages": messages, "temperature": 0.0, "max_tokens": 11}
    assert server.asked[1] == {"model": "m", "messages": messages, "max_completion_tokens": 12}


@pytest.mark.promise("X4")
def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    with JudgeServer(echo, lambda messages, nth: "401") as server:
        chat = chat_of(server, api_key_env="JUDGE_KEY")
        (reply,) = ask(chat, requests(1))
        assert server.keys == {"Bearer sk-very-secret"}
        assert "secret" not in str(reply) + str(chat.identity) + chat.name
        assert "***" in reply.detail
        ask(chat_of(server), requests(1))
    assert server.keys == {"Bearer sk-very-secret", "Bearer none"}


def test_a_key_that_is_not_set_is_said_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with (
        JudgeServer(echo) as server,
        pytest.raises(ConfigError, match="JUDGE_KEY: this environment variable is not set"),
    ):
        chat_of(server, api_key_env="JUDGE_KEY")


@pytest.mark.promise("J7")
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_cap_of_seven_calls_sends_seven(concurrency):
    kept = {}
    budget = Budget(7, None)
    with JudgeServer(echo) as server, pytest.raises(JudgeError, match=r"cap of 7 calls .*--resume.*max_calls"):
        ask(chat_of(server, budget=budget, concurrency=concurrency), requests(20), kept.__setitem__)
    assert len(server.asked) == 7
    assert len(kept) == 7


@pytest.mark.promise("J7")
def test_further_tries_count_as_calls():
    with JudgeServer(echo, lambda messages, nth: "500") as server, pytest.raises(JudgeError, match="cap of 3 calls"):
        ask(chat_of(server, budget=Budget(3, None)), requests(1))
    assert len(server.asked) == 3


@pytest.mark.promise("J7")
def test_money_is_counted_from_the_servers_tokens_and_never_passes_the_cap():
    # a call may cost (16 characters / 2) * 1 + 100 * 2 = 208 millionths, and does cost 10 * 1 + 20 * 2 = 50
    prices = {"price_in": 1.0, "price_out": 2.0, "max_tokens": 100}
    budget = Budget(None, 400e-6)
    kept = {}
    with (
        JudgeServer(echo, usage={"prompt_tokens": 10, "completion_tokens": 20}) as server,
        pytest.raises(JudgeError, match=r"0\.0002 of the cap of 0\.0004 are spent"),
    ):
        ask(chat_of(server, budget=budget, **prices), [Request((("user", "answer 123456 89"),))] * 20, kept.__setitem__)
    assert len(server.asked) == 4  # 0, 50, 100, 150 and 208 fit; 200 and 208 do not
    assert budget.cost == pytest.approx(200e-6)
    assert [reply.cost for reply in kept.values()] == [pytest.approx(50e-6)] * 4


def test_a_server_that_counts_no_tokens_is_reckoned_by_characters():
    with JudgeServer(echo) as server:
        (reply,) = ask(chat_of(server, price_in=1.0, price_out=2.0), requests(1))
    assert reply.cost == pytest.approx((14 / 2 + 2 * 16 / 2) / 1e6)


def test_a_request_to_stop_ends_it_and_what_was_there_is_kept():
    kept = {}
    with JudgeServer(echo) as server, pytest.raises(Interrupted, match="--resume"):
        ask(chat_of(server, should_stop=lambda: len(kept) >= 3), requests(500), kept.__setitem__)
    assert 3 <= len(kept) <= len(server.asked) < 500


def test_a_wait_ends_when_the_judge_is_to_stop(monkeypatch):
    """The default pause is the event that a stop sets; a sleep of a minute would outlast this test."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 60.0)
    asked = threading.Event()
    with JudgeServer(echo, lambda messages, nth: asked.set() or "500") as server:
        section = JudgeSection(base_url=server.url, model="m", concurrency=1)
        chat = EndpointChat(section, Budget(None, None), should_stop=asked.is_set)
        with pytest.raises(Interrupted):
            ask(chat, requests(3))
    assert len(server.asked) == 1


@pytest.mark.promise("S2")
def test_a_second_signal_waits_for_no_reply_that_is_under_way():
    """The first stop is heard while the server is silent; what the second raises comes out at once."""
    silent = threading.Event()
    looks = []

    def should_stop():
        looks.append(time.monotonic())
        if len(looks) > 2:
            raise KeyboardInterrupt
        return False

    with JudgeServer(echo, lambda messages, nth: silent.wait(4) and None) as server:
        chat = chat_of(server, timeout=30, should_stop=should_stop)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ask(chat, requests(3))
        assert time.monotonic() - start < 3
        silent.set()


def test_an_error_of_whoever_keeps_the_replies_comes_out():
    def full(index, reply):
        raise OSError("the disk is full")

    with JudgeServer(echo) as server, pytest.raises(OSError, match="the disk is full"):
        ask(chat_of(server, concurrency=3), requests(20), full)
    assert len(server.asked) <= 3
