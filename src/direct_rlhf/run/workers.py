"""Asking a server: several requests at a time, how long to wait between tries, and the key that it wants."""

import email.utils
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from direct_rlhf.errors import ConfigError, Interrupted

POLL = 0.1  # seconds between looks at whether to stop
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled in between
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that wants longer is not waited for

T = TypeVar("T")


@dataclass(frozen=True)
class _Raised:
    error: BaseException


def in_threads(
    works: Sequence[Callable[[threading.Event], T]],
    workers: int,
    should_stop: Callable[[], bool],
    *,
    stopped: str,
    seen: Callable[[T], None] = lambda result: None,
    finish: bool = False,
) -> list[T]:
    """All results, in the order of ``works``. Each work is given an event that is set once nothing more is wanted.

    ``stopped`` is what the Interrupted says that ``should_stop`` leads to. ``seen`` gets each result as it comes, and
    may raise. ``finish``: at a stop or an error what is under way is waited for; otherwise nothing is, and a
    KeyboardInterrupt never waits, which is why the threads are daemons.
    Errors: the first one of a work or of ``seen``; Interrupted.
    """
    stopping = threading.Event()
    todo, done = deque(enumerate(works)), SimpleQueue[tuple[int, Any]]()

    def run() -> None:
        while not stopping.is_set():
            try:
                index, work = todo.popleft()
            except IndexError:
                return
            try:
                done.put((index, work(stopping)))
            except BaseException as error:  # raised again where the results are waited for
                done.put((index, _Raised(error)))
                return

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(workers, len(works)))]
    found: dict[int, T] = {}
    try:
        for thread in threads:
            thread.start()
        while len(found) < len(works):
            if should_stop():
                raise Interrupted(stopped)
            try:
                index, result = done.get(timeout=POLL)
            except Empty:
                continue
            if isinstance(result, _Raised):
                raise result.error
            found[index] = result
            seen(result)
    except Exception:
        stopping.set()
        for thread in threads if finish else ():
            thread.join()
        raise
    finally:
        stopping.set()
    return [found[index] for index in range(len(works))]


def retry_after(said: str | None, clock: Callable[[], float] = time.time) -> float:
    """Seconds that a server's `Retry-After` asks for, as a number or a date; 0 if it does not say."""
    said = (said or "").strip()
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - clock())
    except (ValueError, TypeError):
        return 0.0


def without_key(text: str, key: str | None) -> str:
    """What a server said, short, and without the key, which some send back."""
    text = text.replace(key, "***") if key else text
    return " ".join(text.split())[:300]


def key_from(variable: str | None, place: str, server: str) -> str | None:
    """The key of a ``server`` from the environment; None where it wants none.

    ``place`` is the recipe's key that names the variable. Errors: ConfigError if it is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"{place} = {variable}: this environment variable is not set. Put the key of {server} into it, or write "
            "null if the server wants none."
        )
    return key
