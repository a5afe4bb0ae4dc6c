"""The fault kit: crashes at named points, and a file system that fails at its k-th call."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import safetensors.torch

from direct_rlhf.run import points

Fault = Literal["crash", "short", "full"]


class Crash(BaseException):
    """The process is gone: nothing may catch this, and nothing reaches the disk after it."""


@contextlib.contextmanager
def crash_at(name: str) -> Iterator[None]:
    """Crashes when the named point is reached; fails the test if it is not."""

    def reached(point: str) -> None:
        if point == name:
            raise Crash(name)

    token = points.hook.set(reached)
    try:
        with contextlib.suppress(Crash):
            yield
            raise AssertionError(f"the point {name} was not reached")
    finally:
        points.hook.reset(token)


class FaultyFS:
    """Counts the calls that change the disk, and fails call number ``at`` (from 0; None: none of them).

    crash: raises Crash instead of the call. short: writes half, then crashes. full: OSError(ENOSPC), once.
    After a crash every further call crashes too, so that no clean-up reaches the disk. ``crash`` may be replaced, for
    instance by ``os._exit`` in a child process.
    """

    NAMES = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "ftruncate")

    def __init__(self, at: int | None = None, fault: Fault = "crash", crash: Callable[[], Any] | None = None) -> None:
        self.at, self.fault, self.calls, self.dead = at, fault, 0, False
        self._crash = crash

    def __enter__(self) -> Self:
        self._real = {name: getattr(os, name) for name in self.NAMES}
        self._save_file = safetensors.torch.save_file
        for name, call in self._real.items():
            setattr(os, name, self._faulty(name, call))
        safetensors.torch.save_file = self._faulty("save_file", self._save_file)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for name, call in self._real.items():
            setattr(os, name, call)
        safetensors.torch.save_file = self._save_file
        return kind is Crash

    def _faulty(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return call(*args, **options)
            number, self.calls = self.calls, self.calls + 1
            if self.dead:
                raise Crash(name)
            if number != self.at:
                return call(*args, **options)
            if self.fault == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.fault == "short":
                self._half(name, call, args)
            self.dead = True
            if self._crash is not None:
                self._crash()
            raise Crash(name)

        return wrapped

    def _half(self, name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if name == "write":
            call(args[0], bytes(args[1])[: len(args[1]) // 2])
        elif name == "save_file":
            content = safetensors.torch.save(args[0])
            Path(args[1]).write_bytes(content[: len(content) // 2])


def every_call(action: Callable[[], object]) -> int:
    """How many calls that change the disk ``action`` makes."""
    with FaultyFS() as disk:
        action()
    return disk.calls
