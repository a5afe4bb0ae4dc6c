"""Stopping on request: the first signal asks, the second does not."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """A context manager that turns SIGINT and SIGTERM into a flag, read by calling it.

    The first signal sets the flag and says so; the second, of either kind, raises KeyboardInterrupt at once. On leaving
    the old handlers are back. Off the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self._asked = False
        self._old: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        message = f"\n{signal.Signals(number).name}: saving and stopping; a second signal stops at once\n"
        os.write(2, message.encode())  # print() may not be called again from inside itself
