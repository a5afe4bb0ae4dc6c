"""Stopping on request: the first signal asks, the second does not."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """A context manager that turns SIGINT and SIGTERM into a flag, read by calling it.

    The first signal sets the flag and says so; the second, of either kind, raises KeyboardInterrupt at once. On leaving
    the old handlers are back. Off the main thread, where Python allows no handlers, it does nothing.

    ``launched``: one of several processes under a launcher. Then a second signal does nothing, for the same one may
    come from the launcher and from whoever signalled that; who wants it at once ends the launcher. ``quiet``: nothing
    is said.
    """

    def __init__(self, *, launched: bool = False, quiet: bool = False) -> None:
        self.signalled = False  # this process itself
        self._launched, self._quiet = launched, quiet
        self._asked = False
        self._at_once = False
        self._old: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        return self._asked

    def ask(self) -> None:
        """Sets the flag, since another process was signalled."""
        self._asked = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block the first signal, too, raises KeyboardInterrupt; so does one from before it.

        For work that loses nothing by being broken off anywhere, and so need not ask.
        """
        with self._obeyed(at_once=True):
            if self._asked:
                raise KeyboardInterrupt
            yield

    @contextmanager
    def at_borders(self) -> Iterator[None]:
        """Inside ``at_once``: a block that reads the flag where it may be broken off."""
        with self._obeyed(at_once=False):
            yield

    @contextmanager
    def _obeyed(self, *, at_once: bool) -> Iterator[None]:
        before, self._at_once = self._at_once, at_once
        try:
            yield
        finally:
            self._at_once = before

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.signalled and self._launched:
            return
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = self._asked = True
        what = "stopping" if self._at_once else "saving and stopping"
        more = "" if self._at_once or self._launched else "; a second signal stops at once"
        if not self._quiet:
            text = f"\n{signal.Signals(number).name}: {what}{more}\n"
            os.write(2, text.encode())  # print() may not be called inside itself
        if self._at_once:
            raise KeyboardInterrupt
