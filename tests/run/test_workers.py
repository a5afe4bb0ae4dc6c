"""Requests to a server: several at a time, in order, stopped at once or once what is under way has come."""

import threading
import time

import pytest

from direct_rlhf.errors import BackendError, ConfigError, Interrupted
from direct_rlhf.run.workers import in_threads, key_from, retry_after, without_key


def never():
    return False


def fail(stopping):
    raise BackendError("no")


def test_results_come_in_the_order_of_the_works_and_each_is_seen_once():
    seen = []
    works = [lambda stopping, i=i: i for i in range(50)]
    assert in_threads(works, 4, never, stopped="", seen=seen.append) == list(range(50))
    assert sorted(seen) == list(range(50))


def test_the_first_error_comes_as_it_is_and_nothing_is_waited_for():
    start = time.monotonic()
    with pytest.raises(BackendError, match=r"^no$"):
        in_threads([lambda stopping: time.sleep(5), fail], 2, never, stopped="")
    assert time.monotonic() - start < 3


def test_what_is_under_way_is_waited_for_where_that_is_asked():
    ended = threading.Event()

    def slow(stopping):
        time.sleep(0.3)
        ended.set()

    with pytest.raises(BackendError, match=r"^no$"):
        in_threads([slow, fail], 2, never, stopped="", finish=True)
    assert ended.is_set()


def test_a_stop_says_what_it_was_given_and_tells_the_works():
    told = threading.Event()
    begun = threading.Event()

    def work(stopping):
        begun.set()
        if stopping.wait(10):
            told.set()

    with pytest.raises(Interrupted, match=r"^enough$"):
        in_threads([work], 1, begun.is_set, stopped="enough", finish=True)
    assert told.is_set()


def test_an_error_of_who_looks_at_the_results_ends_it():
    def look(result):
        raise BackendError(f"seen {result}")

    with pytest.raises(BackendError, match="seen 1"):
        in_threads([lambda stopping: 1], 1, never, stopped="", seen=look)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("37", 37.0), (" 0.5 ", 0.5), ("-3", 0.0), ("Mon, 12 Jan 1970 13:48:10 GMT", 90.0),
        ("Mon, 12 Jan 1970 13:46:00 GMT", 0.0), ("soon", 0.0), ("", 0.0), (None, 0.0),
    ],
)  # fmt: skip
def test_what_a_server_asks_to_wait_is_a_number_or_a_date(said, seconds):
    assert retry_after(said, lambda: 1_000_000.0) == seconds


def test_what_a_server_said_is_shown_short_and_without_the_key():
    assert without_key("bad  key\n abc", "abc") == "bad key ***"
    assert without_key("x" * 999, None) == "x" * 300


def test_a_key_comes_from_the_environment_and_its_absence_is_said(monkeypatch):
    assert key_from(None, "a.key", "the server") is None
    monkeypatch.setenv("MY_KEY", " secret ")
    assert key_from("MY_KEY", "a.key", "the server") == "secret"
    monkeypatch.setenv("MY_KEY", "  ")
    with pytest.raises(
        ConfigError, match=r"a\.key = MY_KEY: this environment variable is not set. Put the key of the server"
    ):
        key_from("MY_KEY", "a.key", "the server")
