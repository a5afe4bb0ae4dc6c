"""The fault kit: crashes at named points, a file system that fails at its k-th call, the command line as a process,
and the comparison of two runs.

Run as a program, this file is `python -m direct_rlhf` with faults: see ``run_cli``.
"""

import argparse
import contextlib
import errno
import ipaddress
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

import psutil
import safetensors.torch

from direct_rlhf.run import points

Fault = Literal["crash", "short", "full", "filling"]
CRASH_CODE = 137  # as if SIGKILL had ended the process


class Crash(BaseException):
    """The process is gone: nothing may catch this, and nothing reaches the disk after it."""


@contextlib.contextmanager
def crash_at(name: str, hit: int = 1) -> Iterator[None]:
    """Crashes when the named point is reached for the ``hit``-th time; fails the test if it is not."""
    with _hook(_crash_when(name, hit)), contextlib.suppress(Crash):
        yield
        raise AssertionError(f"the point {name} was not reached" + (f" {hit} times" if hit > 1 else ""))


def _crash_when(name: str, hit: int, crash: Callable[[], Any] | None = None) -> Callable[[str], None]:
    left = hit

    def reached(point: str) -> None:
        nonlocal left
        left -= point == name
        if point == name and left == 0:
            if crash is not None:
                crash()
            raise Crash(name)

    return reached


@contextlib.contextmanager
def _hook(reached: Callable[[str], None]) -> Iterator[None]:
    token = points.hook.set(reached)
    try:
        yield
    finally:
        points.hook.reset(token)


@dataclass(frozen=True)
class CrashPoint:
    """One place to crash: the ``hit``-th time (from 1) that a run reaches the point ``name``."""

    name: str
    hit: int

    def __str__(self) -> str:
        """Can name a folder."""
        return f"{self.name}-{self.hit}"


def every_crash_point(run: Callable[[str], object], *, hits: Literal["first", "all"] = "first") -> Iterator[CrashPoint]:
    """Calls ``run("whole")`` once to list the points it reaches, then ``run(str(point))`` once per point, with a crash.

    Yields each point after its crash, so that the loop's body can look at what is left and go on from there. The
    argument is a label under which each pass makes its own folder. ``hits``: of a point that is reached several times
    take the first time only, or each. The points come in the order in which they are reached.

        for point in every_crash_point(lambda label: train(tmp_path / label)):
            train(tmp_path / str(point), resume=True)
            assert_runs_equal(tmp_path / "whole", tmp_path / str(point))
    """
    reached: list[CrashPoint] = []
    seen: dict[str, int] = {}

    def note(name: str) -> None:
        seen[name] = seen.get(name, 0) + 1
        if seen[name] == 1 or hits == "all":
            reached.append(CrashPoint(name, seen[name]))

    with _hook(note):
        run("whole")
    if not reached:
        raise AssertionError("the run reached no named point, so there is nothing to crash at")
    for place in reached:
        with crash_at(place.name, place.hit):
            run(str(place))
        yield place


class FaultyFS:
    """Counts the calls that change the disk, and fails call number ``at`` (from 0; None: none of them).

    crash: raises Crash instead of the call. short: writes half, then crashes. full: OSError(ENOSPC), once. filling:
    the same, after half has been written.
    After a crash every further call crashes too, so that no clean-up reaches the disk. ``crash`` may be replaced, for
    instance by ``os._exit`` in a child process.
    """

    NAMES = ("open", "write", "pwrite", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "ftruncate")

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
            if self.fault in ("short", "filling"):
                self._half(name, call, args)
            if self.fault in ("full", "filling"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int  # below 0: killed by that signal
    out: str
    err: str
    children: tuple[str, ...]  # command lines of what was still running ``GRACE`` seconds later (then it is killed)
    seconds: float


GRACE = 3.0  # a helper of the standard library ends by itself when its pipe closes; that takes a moment
_MARK = "DIRECT_RLHF_TEST_RUN"  # inherited by every descendant, also by one that has lost its parent

SignalAt = tuple[str | Path | Callable[[], bool], signal.Signals, int]


def run_cli(
    args: Sequence[str],
    *,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
    signal_at: SignalAt | None = None,
    crash: tuple[str, int] | None = None,
    offline: bool = False,
) -> Ended:
    """`python -m direct_rlhf ARGS` in a process of its own.

    ``env``: added to ours; None takes a variable away.
    ``signal_at``: (when, signal, times). When: a text that stdout or stderr has printed, a file that exists, or a
    function that says so. Of several signals each waits until the one before was answered on stderr ("SIGTERM: ...").
    ``crash``: (name, hit) of a point at which the process ends at once, with CRASH_CODE and nothing cleaned up.
    ``offline``: a connection to anything but this machine, or a look-up of its name, is an error and a line "NETWORK: ..."
    on stderr.
    Errors: AssertionError, with the output, when ``timeout`` seconds have passed, or when the moment for the signal
    never came.
    """
    if crash is None and not offline:
        command = [sys.executable, "-m", "direct_rlhf", *args]
    else:
        at = [] if crash is None else ["--crash", crash[0], str(crash[1])]
        command = [sys.executable, str(Path(__file__)), *at, *(["--offline"] if offline else []), "--", *args]
    mark = uuid.uuid4().hex
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {}), _MARK: mark}
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={key: value for key, value in variables.items() if value is not None},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = _Output(process.stdout), _Output(process.stderr)
    missed = False
    try:
        if signal_at is not None:
            missed = not _send(process, signal_at, out, err, start + timeout)
        process.wait(max(0.0, start + timeout - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"{args}: still running after {timeout} s\n{out.text()}\n{err.text()}") from None
    finally:
        seconds = time.monotonic() - start
        children = _left_behind(mark)
        out.close()
        err.close()
    if missed:
        raise AssertionError(
            f"{args}: ended ({process.returncode}) before the moment for the signal\n{out.text()}\n{err.text()}"
        )
    return Ended(process.returncode, out.text(), err.text(), children, seconds)


class _Output:
    """What a pipe has given so far; a thread empties it, so that the process never waits for us."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe
        self._parts: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        self._parts.extend(self._pipe)

    def text(self) -> str:
        return "".join(self._parts)

    def close(self) -> None:
        self._thread.join()  # ends with the last process that holds the pipe
        self._pipe.close()


def _send(process: "subprocess.Popen[str]", at: SignalAt, out: _Output, err: _Output, deadline: float) -> bool:
    when, number, times = at

    def is_time() -> bool:
        if isinstance(when, str):
            return when in out.text() or when in err.text()
        return when.exists() if isinstance(when, Path) else when()

    def wait_for(moment: Callable[[], bool]) -> bool:
        while not moment():
            if process.poll() is not None:
                return moment()
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(process.args, 0)
            time.sleep(0.01)
        return True

    if not wait_for(is_time) or process.poll() is not None:
        return False
    for sent in range(times):
        process.send_signal(number)
        if sent + 1 < times and not wait_for(lambda sent=sent: err.text().count(f"{number.name}: ") > sent):  # type: ignore[misc]
            break  # the process had enough of the first
    return True


def _left_behind(mark: str) -> tuple[str, ...]:
    """Command lines of the processes that carry ``mark`` and do not end by themselves; they are killed."""
    deadline = time.monotonic() + GRACE
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    lines = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(" ".join(process.cmdline()))
            process.kill()
    return tuple(lines)


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


TIMES = frozenset({"time"})  # fields of a line that say when, and may differ between equal runs
LINES = ("metrics.jsonl", "samples.jsonl")


def assert_runs_equal(a: Path, b: Path) -> None:
    """Two run directories hold the same lines of metrics and samples (times aside) and the same models, bit for bit.

    Models are all safetensors files under models/ and reward_model/. AssertionError names the first difference: stage,
    step, key and both values, or file, tensor and element.
    """
    for name in LINES:
        _same_lines(_rows(a / name), _rows(b / name), name)
    _same_models(a, b)


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def _same_lines(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], name: str) -> None:
    for number, (one, other) in enumerate(zip(a, b, strict=False), start=1):
        if (one["stage"], one["step"]) != (other["stage"], other["step"]):
            raise AssertionError(f"{name}:{number}: {_place(one)} against {_place(other)}")
        for key in [*one, *(key for key in other if key not in one)]:
            if key not in one or key not in other or _exact(one[key]) != _exact(other[key]):
                values = [repr(row[key]) if key in row else "absent" for row in (one, other)]
                raise AssertionError(f"{name}:{number}: {_place(one)}: {key}: {values[0]} against {values[1]}")
    if len(a) != len(b):
        first = max(a, b, key=len)[min(len(a), len(b))]
        raise AssertionError(f"{name}: {len(a)} lines against {len(b)}; the first that one lacks: {_place(first)}")


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['stage']} step {row['step']}"


def _exact(value: Any) -> str:
    return json.dumps(value, sort_keys=True)  # tells 1 from 1.0 and True, and -0.0 from 0.0


def _same_models(a: Path, b: Path) -> None:
    files = [
        sorted(
            file.relative_to(root)
            for place in ("models", "reward_model")
            for file in (root / place).rglob("*.safetensors")
        )
        for root in (a, b)
    ]
    if files[0] != files[1]:
        raise AssertionError(f"models: {[*map(str, files[0])]} against {[*map(str, files[1])]}")
    for file in files[0]:
        one, other = (safetensors.torch.load_file(root / file) for root in (a, b))
        if one.keys() != other.keys():
            raise AssertionError(f"{file}: tensors in one of them only: {sorted(one.keys() ^ other.keys())}")
        for name in one:
            if (difference := _tensor_difference(one[name], other[name])) is not None:
                raise AssertionError(f"{file}: {name}: {difference}")


def _tensor_difference(one: Any, other: Any) -> str | None:
    """None if equal in every bit, also where a number is NaN or a zero has a sign."""
    import torch

    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"{one.dtype} {list(one.shape)} against {other.dtype} {list(other.shape)}"
    flat = [tensor.contiguous().flatten() for tensor in (one, other)]
    if not flat[0].numel():
        return None
    size = one.element_size()
    bits = [tensor.view(torch.uint8).reshape(-1, size) for tensor in flat]
    differs = (bits[0] != bits[1]).any(dim=1).nonzero()
    if not len(differs):
        return None
    at = int(differs[0])
    return (
        f"element {at}: {flat[0][at].item()!r} against {flat[1][at].item()!r} ({len(differs)} of {len(flat[0])} differ)"
    )


def is_local(host: str) -> bool:
    """Whether a host name or address is this machine, without asking anybody."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")


def _forbid_network() -> None:
    """Raises where a socket is to leave this machine, and says so on stderr, since a library may swallow the error."""
    real = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex")}
    look_up = socket.getaddrinfo

    def refuse(what: object) -> None:
        os.write(2, f"NETWORK: {what}\n".encode())
        raise AssertionError(f"a test tried to connect to {what}")

    def guarded(name: str) -> Callable[[socket.socket, Any], Any]:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and not is_local(address[0]):
                refuse(address)
            return real[name](self, address)

        return call

    def guarded_look_up(host: Any, *rest: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and not is_local(name):
            refuse(name)
        return look_up(host, *rest, **options)

    for name in real:
        setattr(socket.socket, name, guarded(name))
    socket.getaddrinfo = guarded_look_up


def main() -> None:
    """`python -m direct_rlhf` with the faults that ``run_cli`` asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--crash", nargs=2, metavar=("POINT", "HIT"))
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("args", nargs="*")
    asked = parser.parse_args()
    sys.path[0] = str(Path.cwd())  # as `python -m` has it
    if asked.offline:
        _forbid_network()
    if asked.crash:
        name, hit = asked.crash
        points.hook.set(_crash_when(name, int(hit), crash=lambda: os._exit(CRASH_CODE)))
    sys.argv[1:] = asked.args
    runpy.run_module("direct_rlhf", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
