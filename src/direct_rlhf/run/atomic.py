"""Files that are either whole or absent: atomic writes, JSON, and JSON lines.

Everything goes through ``os`` calls (open, write, fsync, replace), so that the tests can fail each of them in turn.
"""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from direct_rlhf.errors import ConfigError, DataError, DirectRLHFError

log = logging.getLogger(__name__)

_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def safe_name(name: str, what: str = "name") -> str:
    """``name`` if it can be one part of a path on every system and stays inside its folder; else ConfigError."""
    allowed = name.isascii() and name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    if not allowed or name[0] in ".-" or len(name) > 100 or name.split(".")[0].lower() in _RESERVED:
        raise ConfigError(
            f"{what} = {name[:120]!r}: must be 1 to 100 letters, digits, '.', '_' or '-', start with a letter, a digit "
            "or '_', and be no reserved word. Choose another name."
        )
    return name


def free_bytes(path: Path) -> int:
    """Bytes free for this user where ``path`` is or would be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def is_disk_full(error: BaseException) -> bool:
    """Also where safetensors says it, as text in a class of its own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"os error {errno.ENOSPC}" in str(error)


@contextlib.contextmanager
def full_disk_explained(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns a full disk into a DirectRLHFError with needed (where known) and free bytes; other errors pass.

    For writes that leave the state before them intact.
    """
    try:
        yield
    except DirectRLHFError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        free = free_bytes(path.parent)
        room = f"{free} bytes free" if needed is None else f"{needed} bytes needed, {free} free"
        raise DirectRLHFError(
            f"{path}: the disk is full: {room}. What was there before is intact. Make room, then start again "
            "(a run: with --resume)."
        ) from error


def sync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces ``path`` as a whole: temporary file in the same folder, write, fsync, rename, fsync of the folder.

    Whatever happens on the way, ``path`` holds all of the old content or all of the new. Missing parents are made.
    Errors: DirectRLHFError with needed and free bytes when the disk is full; other OSErrors pass.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with full_disk_explained(path, len(content)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_file(temporary, content)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError:
            with contextlib.suppress(OSError):  # the leftover is hidden and harmless; the first error matters
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """``with replacing(folder) as temporary``: what is written there takes the place of ``folder`` by a rename.

    An exception leaves ``folder`` as it was and removes the temporary one. A process that dies between the two renames
    leaves the old folder beside it, hidden; the next call puts it back.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{word}") for word in ("writing", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):  # all is in place; only a power cut could still take it back
        sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def dumps(obj: Any, *, indent: int | None = None, sort_keys: bool = True) -> bytes:
    """JSON as UTF-8; text that UTF-8 cannot hold (lone surrogates) is escaped. ValueError for NaN and infinities."""
    text = json.dumps(obj, indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(obj, indent=indent, sort_keys=sort_keys, allow_nan=False).encode()


def write_json(path: Path, obj: Any, *, null_nonfinite: bool = False) -> None:
    """Writes ``obj`` atomically with sorted keys.

    Errors: ValueError for NaN or infinity, unless the caller says that they become null.
    """
    write_atomic(path, dumps(finite(obj)[0] if null_nonfinite else obj, indent=2) + b"\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. DataError, with the path, if it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError alike
        raise DataError(f"{path}: not valid JSON ({error})") from error


def finite(obj: Any, name: str = "") -> tuple[Any, list[str]]:
    """``obj`` with numbers that are not finite as None, and the dotted names where they stood.

    NumPy and torch scalars become plain numbers (anything that has ``item()``).
    """
    if hasattr(obj, "item") and callable(obj.item):
        obj = obj.item()
    if isinstance(obj, float) and not math.isfinite(obj):
        return None, [name]
    lost: list[str] = []
    if isinstance(obj, Mapping):
        items = {str(key): finite(value, f"{name}.{key}" if name else str(key)) for key, value in obj.items()}
        for _, names in items.values():
            lost += names
        return {key: value for key, (value, _) in items.items()}, lost
    if isinstance(obj, (list, tuple)):
        parts = [finite(value, f"{name}[{i}]") for i, value in enumerate(obj)]
        for _, names in parts:
            lost += names
        return [value for value, _ in parts], lost
    return obj, lost


def append_jsonl(path: Path, obj: Any, *, sync: bool = True) -> None:
    """Adds one line in one write. A last line that a crash cut off is removed first, with a warning.

    ``sync`` waits until the disk has it, for what must not be paid or computed twice.
    """
    line = dumps(obj, sort_keys=False) + b"\n"
    with full_disk_explained(path, len(line)):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _mend_tail(descriptor, path)
            _write_all(descriptor, line)
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes all rows as one atomic file."""
    write_atomic(path, b"".join(dumps(row, sort_keys=False) + b"\n" for row in rows))


def read_jsonl(path: Path) -> list[Any]:
    """All rows. A cut last line, which a crash can leave, is left out with a warning.

    Errors: DataError with FILE:LINE for any other line that is no JSON.
    """
    rows: list[Any] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):  # a newline follows, so no crash of ours cut it
                raise DataError(f"{path}:{number}: not valid JSON ({error}). Remove the line or the file.") from error
            log.warning("%s:%d: the last line is cut off (%d bytes); it is left out", path, number, len(line))
    return rows


def _write_file(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:  # write() may take less than it is given
        view = view[os.write(descriptor, view) :]


def _mend_tail(descriptor: int, path: Path) -> None:
    """Leaves the file empty or ending in a newline."""
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode) or info.st_size == 0 or os.pread(descriptor, 1, info.st_size - 1) == b"\n":
        return
    content = os.pread(descriptor, info.st_size, 0)
    whole = content.rfind(b"\n") + 1
    try:
        json.loads(content[whole:])
        _write_all(descriptor, b"\n")  # only the newline was lost
    except ValueError:
        log.warning("%s: the last line was cut off (%d bytes) and is removed", path, len(content) - whole)
        os.ftruncate(descriptor, whole)
