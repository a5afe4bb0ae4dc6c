"""Asking a server: several requests at a time, and the key that it wants."""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from direct_rlhf.errors import ConfigError, Interrupted

POLL = 0.1  # seconds between looks at whether to stop

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
