"""One writer for one run directory."""

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from direct_rlhf.errors import ConfigError

log = logging.getLogger(__name__)

LOCK = ".lock"  # empty when free; else who writes: host, pid, and the start of that process


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds ``folder`` while the block runs. ConfigError, naming the holder, if another process has it.

    A record left by a dead process of this host (or by another process that has its pid by now) is taken over.
    """
    with _guarded(folder / LOCK) as descriptor:
        holder = _read(descriptor)
        _refuse(folder, holder)
        if holder:
            log.warning("%s: process %s has died while writing; its lock is taken over", folder, holder["pid"])
        _write(descriptor, _myself())
    try:
        yield
    finally:
        # What a failed release leaves names a process that is soon dead
        with contextlib.suppress(OSError), _guarded(folder / LOCK, create=False) as descriptor:
            if _is_alike(_read(descriptor), _myself()):
                _write(descriptor, None)


def refuse_if_locked(folder: Path) -> None:
    """ConfigError if a living process is writing to ``folder``."""
    with contextlib.suppress(FileNotFoundError), _guarded(folder / LOCK, create=False) as descriptor:
        _refuse(folder, _read(descriptor))


def _refuse(folder: Path, holder: dict[str, Any] | None) -> None:
    if holder is None:
        return
    here = holder["host"] == socket.gethostname()
    if here and process_start(holder["pid"]) in (None, holder["start"]) and _is_alive(holder["pid"]):
        raise ConfigError(
            f"{folder}: process {holder['pid']} on this machine has been writing to this run since {holder['since']}. "
            "Wait until it ends, or stop it."
        )
    if not here:
        raise ConfigError(
            f"{folder}: process {holder['pid']} on {holder['host']} has been writing to this run since "
            f"{holder['since']}. If it is dead, delete {folder / LOCK}."
        )


@contextlib.contextmanager
def _guarded(path: Path, *, create: bool = True) -> Iterator[int]:
    """Keeps two processes from reading and changing the record at the same time."""
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no flock; the record still counts there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> dict[str, Any] | None:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # empty, or cut off by a crash of its writer
        return None
    return holder if isinstance(holder, dict) and {"host", "pid", "start", "since"} <= holder.keys() else None


def _write(descriptor: int, holder: dict[str, Any] | None) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode() if holder else b"", 0)


def _myself() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid()), "since": since}


def _is_alike(one: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    return one is not None and all(one[key] == other[key] for key in ("host", "pid", "start"))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, another user's
        return True
    return True


def process_start(pid: int) -> str | None:
    """Boot and clock tick at which a process started, so that a reused pid is told apart; None where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot} {fields[19]}"  # field 22 of proc(5), counted after the name
