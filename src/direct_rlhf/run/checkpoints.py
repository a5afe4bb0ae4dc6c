"""Checkpoints that are whole or invisible.

A checkpoint is a folder ``step_NNNNNN`` with one safetensors file a group, ``state.json``, and ``complete.json`` (size
and SHA-256 of every file), written last. The folder is built under a hidden name and then renamed. Saving a step again
makes ``step_NNNNNN.1``, ``.2``, ...: the old copy goes only when the new one is in place.

Several processes write one such folder together (`shards.py`): each its parts of the tensors, the first one the rest,
and the marker once all have reported success. Any number of processes reads either kind.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from direct_rlhf.errors import CheckpointError
from direct_rlhf.run import shards
from direct_rlhf.run.atomic import dumps, free_bytes, is_disk_full, safe_name, sync_file, sync_folder, write_atomic
from direct_rlhf.run.packing import pack, unpack
from direct_rlhf.run.points import point
from direct_rlhf.run.world import World

if TYPE_CHECKING:
    from torch import Tensor

    from direct_rlhf.run.shards import Groups

log = logging.getLogger(__name__)

FORMAT, SHARDED = 1, 2  # what one process writes, and what several do
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
    processes: int = 1  # that have written it
    groups: tuple[str, ...] = ()  # of tensors, where several have

    def part(self, name: str) -> Any:
        """One entry of the state. CheckpointError if it is absent: another release did not write it."""
        if name not in self.state:
            raise CheckpointError(
                f"{self.path}: its state has no {name!r}, so another release of direct-rlhf has written it. Use the "
                "release named in manifest.json, or start again with --overwrite."
            )
        return self.state[name]

    def tensors(self, group: str, like: "Mapping[str, Tensor] | None" = None) -> "dict[str, Tensor]":
        """The tensors of one group, whole on the CPU; or, where ``like`` holds a part of the tensor, that part.

        Errors: CheckpointError if the checkpoint has no such group.
        """
        from safetensors import safe_open
        from safetensors.torch import load_file

        if self.processes > 1:
            return self._shards(group, like or {})
        file = self.path / f"{safe_name(group, 'group')}.safetensors"
        if not file.exists():
            found = ", ".join(sorted(other.stem for other in self.path.glob("*.safetensors"))) or "none"
            raise CheckpointError(f"{self.path}: holds no tensors called {group!r} (it has: {found})")
        parts = {name: tensor for name, tensor in (like or {}).items() if shards.is_shard(tensor)}
        if not parts:
            return load_file(file)
        with safe_open(file, framework="pt") as whole:  # one whole tensor in memory at a time
            return {
                name: shards.cut(whole.get_tensor(name), parts[name]) if name in parts else whole.get_tensor(name)
                for name in whole.keys()  # noqa: SIM118 (it is no dict)
            }

    def _shards(self, group: str, like: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        if group not in self.groups:
            raise CheckpointError(
                f"{self.path}: holds no tensors called {group!r} (it has: {', '.join(self.groups) or 'none'})"
            )
        return shards.read(self.path, group, like)


@dataclass(frozen=True)
class _Begun:
    """A save of several processes that is under way."""

    step: int
    temporary: Path
    needed: int  # bytes
    state: bytes
    groups: tuple[str, ...] = ()
    future: shards.Later | None = None  # of one in the background


class CheckpointStore:
    """The checkpoints of one stage in ``folder``; the newest ``keep`` are kept."""

    def __init__(
        self, folder: Path, keep: int, *, before_marker: Callable[[], None] = lambda: None, world: World | None = None
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: must be at least 1")
        self.folder = folder
        self.keep = keep
        self._before_marker = before_marker
        self._world = world or World()
        self._begun: _Begun | None = None

    def save(self, step: int, tensors: "Groups", state: Mapping[str, Any], *, later: bool = False) -> Path | None:
        """Writes everything, makes it visible in one rename, then deletes what is no longer to be kept.

        ``tensors``: group -> name -> tensor, stored bit-exact. ``state``: plain values (see ``pack``) without tensors.
        Later steps of an abandoned future (a resume had to go back) are deleted too.
        ``later``: where several processes write, they do so in the background; `settle` ends it, and so does the next
        save. Returns the checkpoint's folder, or None where that is still to come.
        Errors: CheckpointError for numbers that are not finite, a type that cannot be stored, or too little disk; what
        was saved before is then still there.
        """
        self.settle()
        self._world.together(lambda: _check_finite(tensors))
        stray, plain_state = pack(dict(state))
        if stray:
            raise CheckpointError(f"state holds a tensor at {next(iter(stray))}: use pack(), and save its tensors")
        state_bytes = dumps(plain_state, sort_keys=False)
        size = sum(tensor.numel() * tensor.element_size() for named in tensors.values() for tensor in named.values())
        needed = size + len(state_bytes) + (1 << 16)
        if self._world.size == 1:
            return self._save_alone(step, tensors, state_bytes, needed)
        temporary = Path(self._world.main(lambda: str(self._begin(step, needed))))
        begun = _Begun(
            step, temporary, needed, state_bytes, tuple(sorted(safe_name(name, "group") for name in tensors))
        )
        with self._explained(begun):
            if later:
                future = shards.Later(temporary, tensors, self._world.side_group())
                self._begun = replace(begun, future=future)
                return None
            shards.write(temporary, tensors)
        return self._finish(begun)

    def settle(self, *, wait: bool = True) -> None:
        """Makes a save in the background visible; without ``wait`` only if all processes have written.

        Errors: CheckpointError, in all processes, if one of them could not write; no marker is there then.
        """
        if (begun := self._begun) is None:
            return
        assert begun.future is not None
        if not wait and self._world.any(not begun.future.done()):
            return
        self._begun = None
        with self._explained(begun):
            begun.future.result()
        self._finish(begun)

    def latest(self) -> Checkpoint | None:
        """The newest good checkpoint, or None. Each damaged one that is newer is named in a warning.

        Errors: CheckpointError for a checkpoint in a format of another release: going back would lose work silently.
        """
        self.settle()
        for name in reversed(self._world.main(lambda: [path.name for path in self._all()])):
            path = self.folder / name
            try:
                return self._load(path)
            except _Damaged as error:
                log.warning("%s: damaged and not used: %s", path, error)
        return None

    def _save_alone(self, step: int, tensors: "Groups", state: bytes, needed: int) -> Path:
        from safetensors.torch import save_file

        files = {safe_name(group, "group"): _storable(named) for group, named in tensors.items()}
        begun = _Begun(step, self._begin(step, needed), needed, state)
        with self._explained(begun):
            write_atomic(begun.temporary / STATE, state)
            for group, named in files.items():
                file = begun.temporary / f"{group}.safetensors"
                save_file(named, file)
                sync_file(file)
            self._before_marker()
            point("checkpoint.before_marker")
            prints = {file.name: _fingerprint(file) for file in sorted(begun.temporary.iterdir())}
            final = self._publish(begun, {"format": FORMAT, "step": step, "files": prints})
        point("checkpoint.saved")
        self._retain(final)
        return final

    def _finish(self, begun: _Begun) -> Path:
        """The rest of a save of several processes, once all have written: state, hashes, marker, rename."""
        world = self._world

        def list_files() -> list[str]:
            with self._explained(begun):
                write_atomic(begun.temporary / STATE, begun.state)
                return sorted(file.name for file in begun.temporary.iterdir())

        def publish() -> str:
            with self._explained(begun):
                self._before_marker()
                point("checkpoint.before_marker")
                facts = {"step": begun.step, "processes": world.size, "groups": list(begun.groups)}
                marker = {"format": SHARDED, **facts, "files": prints}
                final = self._publish(begun, marker)
            point("checkpoint.saved")
            self._retain(final)
            return str(final)

        names = world.main(list_files)
        mine = names[world.rank :: world.size]
        with self._explained(begun):
            shares = world.gather({name: _fingerprint(begun.temporary / name) for name in mine})
        prints = {name: found for share in shares for name, found in share.items()}
        return Path(world.main(publish))

    def _begin(self, step: int, needed: int) -> Path:
        """An empty folder for the files of ``step``."""
        if needed > free_bytes(self.folder):
            raise self._no_room(step, needed)
        temporary = self.folder / f"{_UNFINISHED}{step:06d}.{os.getpid()}"
        with self._explained(_Begun(step, temporary, needed, b"")):
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        return temporary

    def _publish(self, begun: _Begun, marker: dict[str, Any]) -> Path:
        write_atomic(begun.temporary / MARKER, dumps({**marker, "seal": _seal(marker)}, indent=1))
        point("checkpoint.before_rename")
        final = self._next_name(begun.step)
        os.rename(begun.temporary, final)
        sync_folder(self.folder)
        return final

    @contextmanager
    def _explained(self, begun: _Begun) -> Iterator[None]:
        """Turns what stops a save into a CheckpointError, and clears up."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            if self._world.is_main:
                shutil.rmtree(begun.temporary, ignore_errors=True)
            if is_disk_full(error.__cause__ or error):  # the cause, where our own writer has explained it
                raise self._no_room(begun.step, begun.needed) from error
            raise CheckpointError(f"{self.folder}: step {begun.step} could not be saved ({error})") from error

    def _load(self, path: Path) -> Checkpoint:
        marker = _read_marker(path)
        if marker["step"] != _step(path):
            raise _Damaged(f"{MARKER} is of step {marker['step']}")
        world = self._world
        mine = sorted(marker["files"].items())[world.rank :: world.size]  # to hash is the slow part
        damage = [text for texts in world.gather(_damages(path, mine)) for text in texts]
        if damage:
            raise _Damaged(damage[0])
        state = unpack({}, json.loads((path / STATE).read_bytes()))
        return Checkpoint(path, marker["step"], state, marker.get("processes", 1), tuple(marker.get("groups", ())))

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


def _check_finite(tensors: "Groups") -> None:
    """CheckpointError that names the first tensor with a number that is not finite."""
    import torch

    for group, named in tensors.items():
        for name, tensor in named.items():
            own = shards.local(tensor.detach())
            if (own.is_floating_point() or own.is_complex()) and not torch.isfinite(own).all():
                raise CheckpointError(f"{group}: {name} has numbers that are not finite; no checkpoint is written")


def _storable(named: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Copies on the CPU, contiguous and without shared memory."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named.items():
        flat = tensor.detach().cpu().contiguous()
        storage = flat.untyped_storage().data_ptr()
        result[name] = flat.clone() if storage in seen else flat
        seen.add(storage)
    return result


def _damages(folder: Path, files: Iterable[tuple[str, dict[str, int | str]]]) -> list[str]:
    """What is wrong with files, as the marker has them."""
    found = []
    for name, expected in files:
        file = folder / name
        if Path(name).name != name or not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != expected["size"]:
            found.append(f"{name} has {file.stat().st_size} bytes instead of {expected['size']}")
        elif _fingerprint(file) != expected:
            found.append(f"{name} differs from its SHA-256")
    return found


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
    if marker["format"] not in (FORMAT, SHARDED):
        raise CheckpointError(
            f"{path}: checkpoint format {marker['format']}; this release of direct-rlhf reads format {FORMAT} and "
            f"{SHARDED}. Use the release named in manifest.json, or start again with --overwrite."
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
