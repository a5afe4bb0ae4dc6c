"""Finds out that another process of the run is gone, and ends this one: no process waits for what cannot come.

A thread in every process says every half second that it lives. The first process hears all of them, the others hear the
first. A process that was killed or stopped says nothing any more; one that fails says so itself. Whatever the main
thread does meanwhile (a collective waits without hearing signals), the thread ends the process, with the cause.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from direct_rlhf import errors
from direct_rlhf.errors import BackendError, DirectRLHFError, Interrupted
from direct_rlhf.run.lock import process_start
from direct_rlhf.run.signals import StopFlag

BEAT = 0.5  # seconds between two signs of life
AT_ONCE = "stopped at once. Go on with --resume."
LAST_WORDS = 5.0  # seconds that the main thread has to end in order once a failure is known


@dataclass(frozen=True)
class Failure:
    """Why the run cannot go on."""

    rank: int  # whose fault; -1: the launcher's
    kind: str  # name of the error's class
    message: str

    def error(self) -> DirectRLHFError:
        return error_named(self.kind, self.message)


def error_named(kind: str, message: str) -> DirectRLHFError:
    """One of our errors by the name of its class."""
    found: type[DirectRLHFError] = getattr(errors, kind, BackendError)
    return found(message)


def name_of(error: BaseException) -> str:
    """The name under which ``error_named`` makes its like."""
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.__name__
    return next((kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__), "BackendError")


class Watch(threading.Thread):
    """``store`` is a client of its own of torch's key-value store, which all processes share.

    ``patience``: seconds without a sign after which a process counts as lost. ``on_failure`` is called in the process
    that speaks for all (the first one that is left) before it ends.
    """

    def __init__(self, store: Any, rank: int, size: int, *, patience: float, stop: StopFlag) -> None:
        super().__init__(name="watch", daemon=True)
        self.on_failure: Callable[[DirectRLHFError], None] = lambda error: None
        self._store, self._rank, self._size, self._patience, self._stop = store, rank, size, patience, stop
        self._failure: Failure | None = None
        self._known = threading.Event()
        self._ended = threading.Event()
        self._beats = 0
        self._others = range(1, size) if rank == 0 else range(1)
        self._heard: dict[int, tuple[bytes, float]] = {}  # last sign of who is here, and for how long it is the last
        self._pids: dict[int, tuple[int, str | None]] = {}  # of those on this machine, with their start
        self._parent = os.getppid()
        me = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
        store.set(f"who/{rank}", json.dumps(me))
        self._beat()

    @property
    def speaks(self) -> bool:
        """Whether this process says what has happened: the first one, or the second where the first is lost."""
        lost_first = self._failure is not None and self._failure.rank == 0
        return self._rank == (1 if lost_first else 0)

    def failure(self, seconds: float = 0.0) -> Failure | None:
        """What has failed elsewhere, if that is known now or within ``seconds``."""
        self._known.wait(seconds)
        return self._failure

    def publish(self, error: BaseException) -> None:
        """Tells the others that this process cannot go on; the first who says so is heard."""
        message = str(error) if isinstance(error, DirectRLHFError) else f"{type(error).__name__}: {error}"
        if isinstance(error, KeyboardInterrupt):
            message = AT_ONCE
        if self._rank and not isinstance(error, (KeyboardInterrupt, Interrupted)):
            message = f"process {self._rank}: {message}"
        try:
            self._store.compare_set("failed", "", json.dumps(asdict(Failure(self._rank, name_of(error), message))))
        except RuntimeError:  # the launcher and its store are gone: then nobody is left to be told
            return

    def end(self) -> None:
        """The main thread takes over: from here on nothing is watched."""
        self._ended.set()
        if self.is_alive() and self is not threading.current_thread():
            self.join(LAST_WORDS)  # in vain where the store no longer answers

    def run(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(BEAT):
            # Time that this process itself was stopped for does not count: the others were, too, or will be heard soon.
            now = time.monotonic()
            passed, before = min(now - before, 2 * BEAT), now
            try:
                found = self._look(passed)
            except RuntimeError as error:  # of the store, which lives in the launcher
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                found = Failure(-1, "BackendError", f"the launcher (torchrun) or process 0 does not answer: {reason}")
            if found is not None:
                self._fail(found)
                return

    def _look(self, passed: float) -> Failure | None:
        if os.getppid() != self._parent:
            return Failure(-1, "BackendError", "the launcher (torchrun) has died")
        self._beat()
        if self._stop.signalled:
            self._store.set("stop", "1")
        if self._store.check(["stop"]):
            self._stop.ask()
        if self._store.check(["failed"]):
            said = Failure(**json.loads(self._store.get("failed")))
            return said if said.rank != self._rank else None
        for rank in self._others:
            if rank not in self._heard and self._store.check([f"beat/{rank}"]):
                self._meet(rank)
        here = list(self._heard)
        signs = self._store.multi_get([f"beat/{rank}" for rank in here]) if here else []
        for rank, sign in zip(here, signs, strict=True):
            if (lost := self._hear(rank, sign, passed)) is not None:
                return lost
        return None

    def _hear(self, rank: int, sign: bytes, passed: float) -> Failure | None:
        last, silent = self._heard[rank]
        silent = silent + passed if sign == last else 0.0
        self._heard[rank] = (sign, silent)
        pid, start = self._pids.get(rank, (0, None))
        if start is not None and process_start(pid) != start:
            return self._lost(rank, f"has died (pid {pid})")
        if silent > self._patience:
            if pid:  # torchrun would ask it first, and wait
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            why = f"pid {pid}: stopped?" if pid else "stopped, or its machine is gone?"
            return self._lost(rank, f"has given no sign of life for {silent:.0f} s ({why})")
        return None

    def _lost(self, rank: int, what: str) -> Failure:
        return Failure(
            rank, "BackendError", f"process {rank} of {self._size} {what}. The others were ended; go on with --resume."
        )

    def _fail(self, found: Failure) -> None:
        if found.rank == -1 and self._stop():  # who ends the launcher after a signal wants it at once
            found = Failure(-1, "Interrupted", AT_ONCE)
        self._failure = found
        if self._rank == 0 and found.rank > 0:
            self.publish_failure(found)
        self._known.set()
        if not self._ended.wait(0 if found.rank == -1 else LAST_WORDS):
            self._exit(found.error())

    def publish_failure(self, found: Failure) -> None:
        """Tells the others what the first process has found out."""
        try:
            self._store.compare_set("failed", "", json.dumps(asdict(found)))
        except RuntimeError:
            return

    def _exit(self, error: DirectRLHFError) -> None:
        """The main thread hangs in something that does not end: the process ends here."""
        try:
            if self.speaks:
                self.on_failure(error)
                print(f"direct-rlhf: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(error.exit_code)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", str(self._beats))

    def _meet(self, rank: int) -> None:
        self._heard[rank] = (b"", 0.0)
        who = json.loads(self._store.get(f"who/{rank}"))
        if who["host"] == socket.gethostname():
            self._pids[rank] = (int(who["pid"]), who["start"])
