"""The run directory: everything a run leaves behind, and the rules for coming back to it."""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, Self

import yaml
from pydantic import ValidationError

from direct_rlhf.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DirectRLHFError,
    DivergenceError,
    OutOfMemoryError,
)
from direct_rlhf.recipe.schema import Recipe
from direct_rlhf.run.adapters import Adapters, check_extras
from direct_rlhf.run.atomic import (
    append_jsonl,
    finite,
    full_disk_explained,
    read_json,
    read_jsonl,
    safe_name,
    sync_file,
    sync_folder,
    write_atomic,
    write_json,
    write_jsonl,
)
from direct_rlhf.run.checkpoints import MARKER, CheckpointStore
from direct_rlhf.run.lock import lock, refuse_if_locked
from direct_rlhf.run.manifest import make_manifest, start_facts
from direct_rlhf.run.world import World, launch_id

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
ALERTS = "alerts.jsonl"
STATUS = "status.json"
RESERVED_KEYS = frozenset({"stage", "step", "time", "nonfinite"})
# and arms, which may be added
SAFE_TO_CHANGE = ("description", "threads", "logging.", "evaluation.", "parallel.", "rollout.vllm.")


class Loaded(Protocol):
    """What ``recipe.load.load_recipe`` returns, as far as it matters here."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def sha256(self) -> str: ...
    @property
    def yaml(self) -> str: ...


class RunDirectory:
    """One run. ``open`` makes or resumes one to write to; the constructor looks at one that is there."""

    def __init__(self, path: Path, world: World | None = None) -> None:
        if not (path / MANIFEST).is_file():
            raise ConfigError(f"{path}: is no run directory (it has no {MANIFEST}). Give the folder that a run made.")
        self.path = path
        self.world = world or World()
        self._adapters: Adapters | None = None
        self._notes: dict[str, dict[str, Any]] = {}

    @classmethod
    def open(cls, root: Path, loaded: Loaded, *, resume: bool, overwrite: bool) -> Self:
        """Makes ``root/NAME``, or comes back to it as one of the two flags says.

        ``resume`` keeps everything and needs an unchanged recipe (safe keys and added arms may change); where there is
        no run yet it makes one. ``overwrite`` replaces the old run once the new one is set up.
        Errors: ConfigError for a run that exists while neither flag is set, another's folder, a folder that cannot be
        written, a missing adapter; CheckpointError, with the differing keys, for a changed recipe.
        """
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite: choose one")
        check_extras(loaded.recipe.logging.adapters)
        path = root / safe_name(loaded.recipe.name, "name")
        with full_disk_explained(path):
            return cls._open(path, loaded, resume=resume, overwrite=overwrite)

    @classmethod
    def _open(cls, path: Path, loaded: Loaded, *, resume: bool, overwrite: bool) -> Self:
        _check_writable(path.parent)
        _bring_back(path)
        if not path.exists():
            _move_in(_set_up(path, loaded), path)
            return cls(path)
        if not (path / MANIFEST).is_file():
            raise ConfigError(
                f"{path}: exists and is no run directory (it has no {MANIFEST}), so it is left alone. "
                "Choose another name=..., or move the folder away."
            )
        refuse_if_locked(path)
        if overwrite:
            _replace(_set_up(path, loaded), path)
        elif resume:
            _check_writable(path)
            _keep_recipe(path, loaded)
        else:
            raise ConfigError(
                f"{path}: this run exists. Use --resume to go on with it, --overwrite to delete it and start again, "
                "or another name=..."
            )
        return cls(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[Path]:
        """Makes this process the only writer, starts an attempt and the log adapters; gives ``logs/attempt_NNN``.

        Errors: ConfigError, naming the process, when another one is writing.
        """
        recipe = self.recipe
        with full_disk_explained(self.path), lock(self.path):
            folder = self._new_attempt()
            self.world.main(lambda: folder.name)
            self._adapters = Adapters(self.path, recipe, run_id=self.manifest["id"])
            try:
                with _log_to(folder / "log.txt"):
                    yield folder
            finally:
                self._adapters.close()
                self._adapters = None

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(read_json(self.path / MANIFEST))

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe that the run was last started with."""
        return _stored_recipe(self.path)

    def check_sources(self, sources: Mapping[str, str]) -> None:
        """Records fingerprints (source -> SHA-256); DataError if a source has changed since it was recorded."""
        manifest = self.manifest
        known = manifest["sources"]
        changed = sorted(name for name, digest in sources.items() if known.get(name, digest) != digest)
        if changed:
            raise DataError(
                f"{self.path}: changed since the run started: {', '.join(changed)}. Put the old content back, or start "
                "again with --overwrite."
            )
        if not sources.items() <= known.items():
            write_json(self.path / MANIFEST, {**manifest, "sources": {**known, **sources}})

    def stage_record(self, name: str) -> dict[str, Any] | None:
        """What ``finish_stage`` wrote: stage, fingerprint, seconds, finished, facts. None if it has not."""
        path = self._stage_path(name)
        try:
            return dict(read_json(path)) if path.exists() else None
        except DataError as error:
            log.warning("%s; the stage counts as not done", error)
            return None

    def stage_done(self, name: str, fingerprint: str) -> bool:
        """Whether the stage has finished with exactly these inputs."""
        record = self.stage_record(name)
        return record is not None and record.get("fingerprint") == fingerprint

    def finish_stage(self, name: str, fingerprint: str, seconds: float, facts: Mapping[str, Any]) -> None:
        """Marks the stage as done, with ``facts`` and what was noted. Call it after all its files are written.

        Facts that are not finite become null.
        """
        known = {**self._notes.pop(name, {}), **facts}
        record = {"stage": name, "fingerprint": fingerprint, "seconds": seconds, "finished": _now(), "facts": known}
        write_json(self._stage_path(name), record, null_nonfinite=True)

    def note(self, name: str, facts: Mapping[str, Any]) -> None:
        """Keeps facts for the record that ``finish_stage`` will write."""
        self._notes.setdefault(name, {}).update(facts)

    def metrics(self, stage: str) -> "MetricsWriter":
        return MetricsWriter(self.path, safe_name(stage, "stage"), self._adapters)

    def sample(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows (prompt, answer, score, ...) to samples.jsonl."""
        for row in rows:
            append_jsonl(self.path / SAMPLES, _record(stage, step, row), sync=False)

    def alert(self, stage: str, step: int, alert: Mapping[str, Any]) -> None:
        """Adds a line (name, cause, remedy, ...) to alerts.jsonl."""
        append_jsonl(self.path / ALERTS, _record(stage, step, alert))

    def checkpoints(self, stage: str, keep: int) -> CheckpointStore:
        """The stage's checkpoints. Metrics and samples reach the disk before a checkpoint counts as complete."""
        folder = self.path / "checkpoints" / safe_name(stage, "stage")
        return CheckpointStore(folder, keep, before_marker=self._sync_lines, world=self.world)

    def status(self, state: str, exit_code: int | None, reason: str = "") -> None:
        """Writes status.json. Call it when an attempt starts (``running``, None) and when it ends, however it ends."""
        status = {
            "state": state,
            "exit_code": exit_code,
            "reason": reason,
            "resumable": exit_code != 0,
            "last_checkpoint": self._last_checkpoint(),
            "time": _now(),
        }
        write_json(self.path / STATUS, status)

    def _stage_path(self, name: str) -> Path:
        return self.path / "stages" / f"{safe_name(name, 'stage')}.json"

    def _sync_lines(self) -> None:
        for name in (METRICS, SAMPLES):
            if (self.path / name).exists():
                sync_file(self.path / name)

    def _last_checkpoint(self) -> str | None:
        markers = self.path.glob(f"checkpoints/*/step_*/{MARKER}")
        newest = max(markers, key=lambda marker: marker.stat().st_mtime_ns, default=None)
        return newest.parent.relative_to(self.path).as_posix() if newest else None

    def _new_attempt(self) -> Path:
        logs = self.path / "logs"
        logs.mkdir(exist_ok=True)
        used = [int(folder.name[8:]) for folder in logs.glob("attempt_*") if folder.name[8:].isdigit()]
        folder = logs / f"attempt_{max(used, default=0) + 1:03d}"
        folder.mkdir()
        facts = {**start_facts(), "recipe_sha256": self.manifest["recipe_sha256"]}
        if "TORCHELASTIC_RUN_ID" in os.environ:
            facts |= {"processes": self.world.size, "launch": launch_id()}
        write_json(folder / "attempt.json", facts)
        return folder

    def launched_by(self, launch: str) -> bool:
        """Whether the newest attempt was made by the same start of torchrun, which has since started it again."""
        attempts = sorted(self.path.glob("logs/attempt_*/attempt.json"))
        return bool(attempts) and read_json(attempts[-1]).get("launch") == launch

    def not_worth_another_try(self) -> DirectRLHFError | None:
        """The last attempt's error, where the same attempt would end with it again; None where it might not."""
        path = self.path / STATUS
        said = read_json(path) if path.is_file() else {}
        kinds = {kind.exit_code: kind for kind in (ConfigError, DataError, OutOfMemoryError, DivergenceError)}
        kind = kinds.get(said.get("exit_code", 0))
        return None if kind is None else kind(str(said["reason"]))


class Follower(RunDirectory):
    """The run as the processes beside the first one see it: they read, and of checkpoints they write their share."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[Path]:
        folder = self.path / "logs" / self.world.main(lambda: "")  # the first process's attempt
        folder.mkdir(parents=True, exist_ok=True)
        with _log_to(folder / f"process_{self.world.rank}.txt", shown=False):
            yield folder

    def check_sources(self, sources: Mapping[str, str]) -> None:
        return

    def finish_stage(self, name: str, fingerprint: str, seconds: float, facts: Mapping[str, Any]) -> None:
        return

    def note(self, name: str, facts: Mapping[str, Any]) -> None:
        return

    def metrics(self, stage: str) -> "MetricsWriter":
        return _Silent(self.path, safe_name(stage, "stage"), None)

    def sample(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        return

    def alert(self, stage: str, step: int, alert: Mapping[str, Any]) -> None:
        return

    def status(self, state: str, exit_code: int | None, reason: str = "") -> None:
        return


class MetricsWriter:
    """Writes one stage's lines of metrics.jsonl, and feeds the log adapters."""

    def __init__(self, path: Path, stage: str, adapters: Adapters | None) -> None:
        self._path = path
        self._stage = stage
        self._adapters = adapters

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds {"stage", "step", "time", ...values}; what is not finite becomes null and is named in "nonfinite"."""
        record = _record(self._stage, step, values)
        append_jsonl(self._path / METRICS, record, sync=False)
        if self._adapters is not None:
            self._adapters.log(self._stage, step, {key: record[key] for key in values})

    def rewind(self, step: int) -> None:
        """Drops this stage's metrics, samples and alerts after ``step`` (-1: all), as a resume from there must."""
        for name in (METRICS, SAMPLES, ALERTS):
            path = self._path / name
            rows = read_jsonl(path) if path.exists() else []
            kept = [row for row in rows if row["stage"] != self._stage or row["step"] <= step]
            if len(kept) < len(rows):
                write_jsonl(path, kept)

    def close(self) -> None:
        """Makes the lines last."""
        if (self._path / METRICS).exists():
            sync_file(self._path / METRICS)


class _Silent(MetricsWriter):
    def log(self, step: int, values: Mapping[str, Any]) -> None:
        return

    def rewind(self, step: int) -> None:
        return

    def close(self) -> None:
        return


@contextlib.contextmanager
def _log_to(path: Path, *, shown: bool = True) -> Iterator[None]:
    """Copies what the package logs into ``path``; where it is ``shown``, warnings still reach the terminal."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file]
    if shown and logging.lastResort is not None and not logging.getLogger().handlers:
        handlers.append(logging.lastResort)  # Python uses it by itself only while nobody else listens
    logger = logging.getLogger("direct_rlhf")
    level = logger.level
    logger.setLevel(logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
        logger.setLevel(level)
        with contextlib.suppress(OSError):  # a last line that does not fit on the disk is not worth the run
            file.close()


def _record(stage: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    if taken := RESERVED_KEYS & values.keys():
        raise ValueError(f"{', '.join(sorted(taken))}: written by the run directory itself; use another name")
    cleaned, nonfinite = finite(values)
    record = {"stage": stage, "step": step, "time": round(time.time(), 3), **cleaned}
    return {**record, "nonfinite": nonfinite} if nonfinite else record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _check_writable(folder: Path) -> None:
    """Makes ``folder`` and writes a probe, so that a bad place is found before any model is loaded."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}). Choose another output folder.") from error


def _set_up(path: Path, loaded: Loaded) -> Path:
    """A complete new run directory under a hidden name beside ``path``."""
    fresh = path.with_name(f".{path.name}.new.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    write_atomic(fresh / RECIPE, loaded.yaml)
    write_json(fresh / MANIFEST, make_manifest(loaded.recipe.seed, loaded.sha256))
    return fresh


def _move_in(fresh: Path, path: Path) -> None:
    try:
        os.rename(fresh, path)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if not path.exists():
            raise
        raise ConfigError(f"{path}: another process has just made this run. Use --resume once it has ended.") from error
    sync_folder(path.parent)


def _replace(fresh: Path, path: Path) -> None:
    old = _set_aside(path)
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    _move_in(fresh, path)
    try:
        shutil.rmtree(old)
    except OSError as error:
        log.warning("%s: the old run could not be deleted (%s); delete it yourself", old, error)


def _bring_back(path: Path) -> None:
    """A crash between the two renames of ``_replace`` leaves the old run set aside: it is the run again."""
    if not path.exists() and (_set_aside(path) / MANIFEST).is_file():
        os.rename(_set_aside(path), path)


def _set_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _stored_recipe(path: Path) -> Recipe:
    try:
        text = (path / RECIPE).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path / RECIPE}: cannot be read ({error.strerror}). Has the run been moved or deleted? Start it again."
        ) from error
    try:
        return Recipe.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise CheckpointError(
            f"{path / RECIPE}: cannot be read by this release of direct-rlhf. Use the release named in {MANIFEST}, or "
            f"start again with --overwrite. ({error})"
        ) from error


def _keep_recipe(path: Path, loaded: Loaded) -> None:
    """Refuses changes that would make the run something else; records those that do not."""
    old, new = _flat(_stored_recipe(path)), _flat(loaded.recipe)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    grown = set(old["arms"]) <= set(new["arms"])
    unsafe = [key for key in changed if not (key.startswith(SAFE_TO_CHANGE) or (key == "arms" and grown))]
    if unsafe:
        lines = "\n".join(f"  {key}: {old.get(key)!r} is now {new.get(key)!r}" for key in unsafe)
        raise CheckpointError(
            f"{path}: the recipe has changed since the run started:\n{lines}\n"
            "Put the values back, choose another name=..., or start again with --overwrite. (May change: description, "
            "threads, logging, evaluation, parallel, rollout.vllm, and arms may be added.)"
        )
    if changed:
        write_atomic(path / RECIPE, loaded.yaml)
        write_json(path / MANIFEST, {**read_json(path / MANIFEST), "recipe_sha256": loaded.sha256})


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value; lists are values."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, part in value.items():
                walk(f"{prefix}.{key}" if prefix else key, part)
        else:
            flat[prefix] = value

    walk("", recipe.model_dump(mode="json"))
    return flat
