"""Rows of files as they come: JSONL, a JSON array, gzip of both, Parquet, folders of these, hub data sets.

A row that cannot be read is yielded with its problem; a damaged container (gzip, Parquet, array) stops with its offset.
"""

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from direct_rlhf.errors import DataError
from direct_rlhf.recipe.references import HubReference, resolve_reference
from direct_rlhf.recipe.schema import DataSection, DataSource

MAX_ROW_BYTES = 4 * 1024 * 1024
"""A longer line is no row of dialogue; it is skipped without being held in memory."""
_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class RawRow:
    """One row; exactly one of ``value`` and ``problem`` is there."""

    source: str  # FILE:LINE (arrays: the line where the row starts; Parquet and hub sets: the row's number from 1)
    value: Mapping[str, Any] | None = None
    problem: tuple[str, str] | None = None  # reason, detail


def locate(section: DataSection, path: str, folder: Path | None) -> Path | HubReference:
    """Where a source is. Relative paths start from ``data.path`` where it is set, else from the recipe's folder."""
    base = folder
    if section.path is not None:
        found = resolve_reference(section.path, folder)
        if not isinstance(found, Path) or not found.is_dir():
            raise DataError(
                f"data.path = {section.path}: must be a folder. Name the file under data.preferences instead."
            )
        base = found
    return resolve_reference(path, base)


def read_rows(place: Path | HubReference, name: str) -> Iterator[RawRow]:
    """All rows of a source; ``name`` is what the recipe calls it. Errors: DataError for a damaged or missing source."""
    if isinstance(place, HubReference):
        yield from _hub(place, name)
        return
    for path, label in data_files(place, name):
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"PAR1" or path.suffix == ".parquet":
            yield from _parquet(path, label)
        else:
            yield from _text_file(path, label, gz=magic[:2] == b"\x1f\x8b" or path.suffix == ".gz")


def data_files(place: Path, name: str) -> list[tuple[Path, str]]:
    """The file, or a folder's data files in the order of their names, each with what to call it in messages."""
    if place.is_file():
        return [(place, name)]
    found = sorted(
        (os.fsencode(path.relative_to(place).as_posix()), path)
        for path in place.rglob("*")
        if path.is_file() and path.name.removesuffix(".gz").endswith(_SUFFIXES) and not path.name.startswith(".")
    )
    if not found:
        raise DataError(f"{name}: no data file in {place} (looked for *.jsonl, *.json, also .gz, and *.parquet).")
    # file names are UTF-8 here whatever the locale says
    return [(path, f"{name.rstrip('/')}/{inside.decode(errors='surrogateescape')}") for inside, path in found]


def fingerprint(section: DataSection, folder: Path | None) -> str:
    """SHA-256 over the bytes of every source, in the order of the recipe; of a hub set, over its rows."""
    return _sha256(part for source in _every_source(section) for part in _identity(section, source, folder))


def fingerprints(section: DataSection, folder: Path | None) -> dict[str, str]:
    """The same for each source alone, by its name in the recipe, so that the one that has changed can be named."""
    return {source.path: _sha256(_identity(section, source, folder)) for source in _every_source(section)}


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _every_source(section: DataSection) -> tuple[DataSource, ...]:
    return (*section.preferences, *section.prompts, *section.text)


def _identity(section: DataSection, source: DataSource, folder: Path | None) -> Iterator[bytes]:
    place = locate(section, source.path, folder)
    if isinstance(place, HubReference):
        for row in _hub(place, source.path):
            yield json.dumps(row.value, sort_keys=True, default=str).encode()
        return
    for path, label in data_files(place, source.path):
        yield label.encode(errors="surrogateescape") + b"\0"
        with path.open("rb") as file:
            yield hashlib.file_digest(file, "sha256").digest()


def _text_file(path: Path, label: str, *, gz: bool) -> Iterator[RawRow]:
    with path.open("rb") as raw:
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if gz else raw
        with _gzip_errors(path, stream, raw):
            head = stream.read(4096)
            stream.seek(0)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{path}: saved as UTF-16. Save it as UTF-8.")
        is_array = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        if is_array and not path.name.removesuffix(".gz").endswith(".jsonl"):
            with _gzip_errors(path, stream, raw):
                text = stream.read()
            yield from _array(path, label, text)
        else:
            yield from _lines(path, label, stream, raw)


def _lines(path: Path, label: str, stream: IO[bytes], raw: IO[bytes]) -> Iterator[RawRow]:
    number = 0
    while True:
        with _gzip_errors(path, stream, raw):
            line = stream.readline(MAX_ROW_BYTES + 1)
            too_long = len(line) > MAX_ROW_BYTES
            rest = line
            while rest and too_long and not rest.endswith(b"\n"):
                rest = stream.readline(MAX_ROW_BYTES)
        if not line:
            return
        number += 1
        source = f"{label}:{number}"
        if too_long:
            yield RawRow(source, problem=("line_too_long", f"more than {MAX_ROW_BYTES:,} bytes"))
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield _parse(source, line)


def _parse(source: str, line: bytes) -> RawRow:
    if b"\0" in line:
        return RawRow(source, problem=("nul", f"NUL byte at column {line.index(0) + 1}"))
    try:
        value = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return RawRow(source, problem=("bad_encoding", f"not UTF-8 at column {error.start + 1}"))
    except json.JSONDecodeError as error:
        return RawRow(source, problem=("broken_json", f"{error.msg.removesuffix(' at')} at column {error.colno}"))
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits too
        return RawRow(source, problem=("broken_json", str(error)))
    return _row(source, value)


def _row(source: str, value: object) -> RawRow:
    if isinstance(value, dict):
        return RawRow(source, value)
    return RawRow(source, problem=("wrong_type", f"a row must be a JSON object, this one is a {type(value).__name__}"))


def _array(path: Path, label: str, data: bytes) -> Iterator[RawRow]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
    decoder = json.JSONDecoder()
    at, line = text.index("[") + 1, 1

    def skip(position: int, characters: str) -> int:
        while position < len(text) and text[position] in characters:
            position += 1
        return position

    counted = 0
    while True:
        at = skip(at, " \t\r\n,")
        line += text.count("\n", counted, at)
        counted = at
        if text[at : at + 1] == "]":
            if rest := text[at + 1 :].strip():
                raise DataError(
                    f"{path}: the JSON array ends at line {line}, and {len(rest):,} characters follow. Write one "
                    "array, or one row a line as JSONL."
                )
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: broken JSON array at line {line} (character {at}): {error}. Repair it, or write one "
                "row a line as JSONL, where a broken row is set aside alone."
            ) from error
        yield _row(f"{label}:{line}", value)


@contextmanager
def _gzip_errors(path: Path, stream: IO[bytes], raw: IO[bytes]) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: damaged gzip at or before byte {raw.tell():,} of {path.stat().st_size:,} (after "
            f"{stream.tell():,} bytes of text): {error}. Fetch or compress the file again."
        ) from error


def _parquet(path: Path, label: str) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    size, stream = path.stat().st_size, _Watched(path)
    try:
        file = parquet.ParquetFile(stream, page_checksum_verification=True)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        if sum(rows) != file.metadata.num_rows:
            raise OSError(f"it counts {file.metadata.num_rows:,} rows, its row groups {sum(rows):,}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a damaged column name
        raise DataError(
            f"{path}: no readable Parquet footer at its end (byte {size:,}): {_first_line(error)}. The file "
            "is cut or damaged; fetch it again."
        ) from error
    number = promised = 0
    with file:
        for group, count in enumerate(rows):
            stream.forget()
            promised += count
            try:
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    for value in _batch(batch):
                        number += 1
                        source = f"{label}:{number}"
                        yield (
                            RawRow(source, problem=("bad_encoding", str(value)))
                            if isinstance(value, UnicodeDecodeError)
                            else _row(source, value)
                        )
                if number != promised:
                    raise OSError(f"the file promises {promised:,} rows up to here")
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(
                    f"{path}: damaged Parquet row group {group} (between bytes {stream.first:,} and {stream.last:,} of "
                    f"{size:,}, after row {number:,}): {_first_line(error)}. Fetch the file again."
                ) from error


class _Watched(io.BufferedReader):
    """A file that knows which part of it has been read since ``forget``.

    pyarrow can name offsets too, but with a damaged footer it ends the process while doing so.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.forget()

    def forget(self) -> None:
        self.first, self.last = 0, 0

    def read(self, size: int | None = -1, /) -> bytes:
        start = self.tell()
        content = super().read(size)
        self.first = min(self.first, start) if self.last else start
        self.last = max(self.last, start + len(content))
        return content


def _batch(batch: Any) -> list[Any]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        values: list[Any] = []
        for at in range(batch.num_rows):
            try:
                values += batch.slice(at, 1).to_pylist()
            except UnicodeDecodeError as error:
                values.append(error)
        return values


def _hub(ref: HubReference, name: str) -> Iterator[RawRow]:
    from datasets import load_dataset

    try:
        rows = load_dataset(ref.name, data_dir=ref.folder, split=ref.split or "train", revision=ref.revision)
    except (OSError, ValueError, RuntimeError) as error:  # every hub, split and script error is one of these
        raise DataError(
            f"{name}: this data set cannot be loaded from the Hugging Face hub ({_first_line(error)}). Check the "
            "name, the split and the connection, or download the file and give its path. Data "
            "sets that need code of their own are not run."
        ) from error
    for number, value in enumerate(rows, start=1):
        yield _row(f"{name}:{number}", value)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
