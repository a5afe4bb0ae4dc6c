"""Checkpoints that are whole or invisible.

A checkpoint is a folder ``step_NNNNNN`` with one safetensors file a group, ``state.json``, and ``complete.json`` (size
and SHA-256 of every file), written last. The folder is built under a hidden name and then renamed. Saving a step again
makes ``step_NNNNNN.1``, ``.2``, ...: the old copy goes only when the new one is in place.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from direct_rlhf.errors import CheckpointError
from direct_rlhf.run.atomic import dumps, free_bytes, is_disk_full, safe_name, sync_file, sync_folder, write_atomic
from direct_rlhf.run.points import point

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

FORMAT = 1
MARKER = "complete.json"
STATE = "state.json"
_FOLDER = re.compile(r"step_(\d{6,})(?:\.(\d+))?")
_UNFINISHED = ".unfinished_"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose files have been checked against their hashes."""

    path: Path
    step: int
    state: dict[str, Any]

    def part(self, name: str) -> Any:
        """One entry of the state. CheckpointError if it is absent: another release did not write it."""
        if name not in self.state:
            raise CheckpointError(
                f"{self.path}: its state has no {name!r}, so another release of direct-rlhf has written it. Use the "
                "release named in manifest.json, or start again with --overwrite."
            )
        return self.state[name]

    def tensors(self, group: str) -> "dict[str, Tensor]":
        """The tensors of one group, on the CPU. CheckpointError if the checkpoint has no such group."""
        from safetensors.torch import load_file

        file = self.path / f"{safe_name(group, 'group')}.safetensors"
        if not file.exists():
            found = ", ".join(sorted(other.stem for other in self.path.glob("*.safetensors"))) or "none"
            raise CheckpointError(f"{self.path}: holds no tensors called {group!r} (it has: {found})")
        return load_file(file)


class CheckpointStore:
    """The checkpoints of one stage in ``folder``; the newest ``keep`` are kept."""

    def __init__(self, folder: Path, keep: int, *, before_marker: Callable[[], None] = lambda: None) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: must be at least 1")
        self.folder = folder
        self.keep = keep
        self._before_marker = before_marker

    def save(self, step: int, tensors: "Mapping[str, Mapping[str, Tensor]]", state: Mapping[str, Any]) -> Path:
        """Writes everything, makes it visible in one rename, then deletes what is no longer to be kept.

        ``tensors``: group -> name -> tensor, stored bit-exact. ``state``: plain values (see ``pack``) without tensors.
        Later steps of an abandoned future (a resume had to go back) are deleted too.
        Errors: CheckpointError for numbers that are not finite, a type that cannot be stored, or too little disk; what
        was saved before is then still there.
        """
        files = {safe_name(group, "group"): _storable(group, named) for group, named in tensors.items()}
        stray, plain_state = pack(dict(state))
        if stray:
            raise CheckpointError(f"state holds a tensor at {next(iter(stray))}: use pack(), and save its tensors")
        state_bytes = dumps(plain_state, sort_keys=False)
        needed = sum(t.nbytes for named in files.values() for t in named.values()) + len(state_bytes) + (1 << 16)
        if needed > free_bytes(self.folder):
            raise self._no_room(step, needed)
        temporary = self.folder / f"{_UNFINISHED}{step:06d}.{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(temporary, step, files, state_bytes)
            final = self._next_name(step)
            os.rename(temporary, final)
            sync_folder(self.folder)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if is_disk_full(error.__cause__ or error):  # the cause, where our own writer has explained it
                raise self._no_room(step, needed) from error
            raise CheckpointError(f"{self.folder}: step {step} could not be saved ({error})") from error
        point("checkpoint.saved")
        self._retain(final)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest good checkpoint, or None. Each damaged one that is newer is named in a warning.

        Errors: CheckpointError for a checkpoint in a format of another release: going back would lose work silently.
        """
        for path in reversed(self._all()):
            try:
                return self._load(path)
            except _Damaged as error:
                log.warning("%s: damaged and not used: %s", path, error)
        return None

    def _write(self, folder: Path, step: int, files: "Mapping[str, dict[str, Tensor]]", state: bytes) -> None:
        from safetensors.torch import save_file

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_atomic(folder / STATE, state)
        for group, named in files.items():
            file = folder / f"{group}.safetensors"
            save_file(named, file)
            sync_file(file)
        self._before_marker()
        point("checkpoint.before_marker")
        marker = {
            "format": FORMAT,
            "step": step,
            "files": {file.name: _fingerprint(file) for file in sorted(folder.iterdir())},
        }
        write_atomic(folder / MARKER, dumps({**marker, "seal": _seal(marker)}, indent=1))
        point("checkpoint.before_rename")

    def _load(self, path: Path) -> Checkpoint:
        marker = _read_marker(path)
        if marker["step"] != _step(path):
            raise _Damaged(f"{MARKER} is of step {marker['step']}")
        for name, expected in marker["files"].items():
            file = path / name
            if Path(name).name != name or not file.is_file():
                raise _Damaged(f"{name} is missing")
            if file.stat().st_size != expected["size"]:
                raise _Damaged(f"{name} has {file.stat().st_size} bytes instead of {expected['size']}")
            if _fingerprint(file) != expected:
                raise _Damaged(f"{name} differs from its SHA-256")
        return Checkpoint(path, marker["step"], unpack({}, json.loads((path / STATE).read_bytes())))

    def _all(self) -> list[Path]:
        """All visible checkpoint folders, oldest first."""
        found = [(match, path) for path in _listing(self.folder) if (match := _FOLDER.fullmatch(path.name))]
        return [path for _, path in sorted((_order(match), path) for match, path in found)]

    def _next_name(self, step: int) -> Path:
        used = [_FOLDER.fullmatch(path.name) for path in self._all()]
        copies = [copy for match in used if match for at, copy in [_order(match)] if at == step]
        return self.folder / (f"step_{step:06d}.{max(copies) + 1}" if copies else f"step_{step:06d}")

    def _retain(self, newest: Path) -> None:
        """Keeps ``newest`` and the ``keep - 1`` complete ones before it (one a step); deletes the rest, or warns."""
        folders = self._all()
        kept = {_step(newest): newest}
        for path in reversed(folders[: folders.index(newest)]):
            if len(kept) < self.keep and _step(path) not in kept and (path / MARKER).exists():
                kept[_step(path)] = path
        leftovers = [path for path in _listing(self.folder) if path.name.startswith(_UNFINISHED)]
        for path in [*leftovers, *folders]:
            if path in kept.values():
                continue
            try:
                (path / MARKER).unlink(missing_ok=True)  # half deleted is then incomplete, not damaged
                shutil.rmtree(path)
            except OSError as error:
                log.warning("%s: an old checkpoint could not be deleted (%s); the run goes on", path, error)

    def _no_room(self, step: int, needed: int) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: no room to save step {step}: {needed} bytes needed, {free_bytes(self.folder)} free. "
            "Earlier checkpoints are intact. Make room, then use --resume."
        )


class _Damaged(Exception):
    """Why a checkpoint cannot be used."""


def pack(nested: Any) -> "tuple[dict[str, Tensor], Any]":
    """Splits nested dicts, lists, tuples and plain values into named tensors and something JSON can hold.

    ``unpack(*pack(x))`` equals ``x`` exactly: key types, tuples, None, bools, every bit of floats and tensors. Plain
    JSON values stay as they are. Tensors are named after their place (``state/0/exp_avg``).
    Errors: CheckpointError, with the place, for NaN and for other types.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(nested, (), tensors)


def unpack(tensors: "Mapping[str, Tensor]", packed: Any) -> Any:
    """The inverse of ``pack``."""
    if isinstance(packed, list):
        return [unpack(tensors, value) for value in packed]
    if not isinstance(packed, dict):
        return packed
    if "$tensor" in packed:
        return tensors[packed["$tensor"]]
    if "$tuple" in packed:
        return tuple(unpack(tensors, value) for value in packed["$tuple"])
    if "$dict" in packed:
        return {unpack(tensors, key): unpack(tensors, value) for key, value in packed["$dict"]}
    if "$float" in packed:
        return float(packed["$float"])
    return {key: unpack(tensors, value) for key, value in packed.items()}


def _encode(value: Any, place: tuple[str, ...], tensors: "dict[str, Tensor]") -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            raise CheckpointError(f"state: {'/'.join(place)} is NaN and is not saved")
        return {"$float": repr(float(value))} if math.isinf(value) else float(value)
    if isinstance(value, (list, tuple)):
        parts = [_encode(part, (*place, str(i)), tensors) for i, part in enumerate(value)]
        return {"$tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(part, (*place, key), tensors) for key, part in value.items()}
        pairs = value.items()
        return {"$dict": [[_encode(k, place, {}), _encode(part, (*place, str(k)), tensors)] for k, part in pairs]}
    from torch import Tensor  # late: a state without tensors needs no torch

    if isinstance(value, Tensor):
        name = "/".join(place) or "value"
        while name in tensors:  # the keys 0 and "0" share a place
            name += "'"
        tensors[name] = value
        return {"$tensor": name}
    raise CheckpointError(f"state: {'/'.join(place)} is a {type(value).__name__}, which cannot be stored")


def _storable(group: str, named: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Copies on the CPU, contiguous and without shared memory; refuses numbers that are not finite."""
    import torch

    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{group}: {name} has numbers that are not finite; no checkpoint is written")
        flat = tensor.detach().cpu().contiguous()
        storage = flat.untyped_storage().data_ptr()
        result[name] = flat.clone() if storage in seen else flat
        seen.add(storage)
    return result


def _fingerprint(path: Path) -> dict[str, int | str]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _seal(marker: Mapping[str, Any]) -> str:
    """SHA-256 of the marker without its seal; the same rule in every format, so damage is never taken for a format."""
    return hashlib.sha256(dumps({key: marker[key] for key in marker if key != "seal"})).hexdigest()


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        marker = json.loads((path / MARKER).read_bytes())
    except FileNotFoundError:
        raise _Damaged(f"{MARKER} is missing, so it is incomplete") from None
    except ValueError as error:
        raise _Damaged(f"{MARKER} cannot be read ({error})") from error
    if not isinstance(marker, dict) or marker.get("seal") != _seal(marker):
        raise _Damaged(f"{MARKER} differs from its own SHA-256")
    if marker["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {marker['format']}; this release of direct-rlhf reads format {FORMAT}. Use the "
            "release named in manifest.json, or start again with --overwrite."
        )
    return marker


def _listing(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _order(match: re.Match[str]) -> tuple[int, int]:
    return int(match[1]), int(match[2] or 0)


def _step(path: Path) -> int:
    match = _FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1])
