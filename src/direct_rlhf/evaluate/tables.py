"""CSV files of the field's test sets: UTF-8 with or without a mark in front, plain or gzipped."""

import csv
import gzip
import io
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from direct_rlhf.errors import DataError


def read_csv(path: Path, columns: Collection[str] = ()) -> Iterator[tuple[str, Mapping[str, str]]]:
    """(FILE:LINE, row by column) of a CSV with a header; the line is that of the row's end.

    Errors: DataError where it cannot be read, lacks one of ``columns``, or a row has other fields than the header.
    """
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        if absent := [name for name in columns if name not in header]:
            raise DataError(
                f"{path}: has no column {', '.join(absent)}; its header is: {', '.join(header)[:200] or 'empty'}."
            )
        for row in reader:
            source = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{source}: has other fields than the header ({', '.join(header)[:200]}). Correct it.")
            yield source, row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.reader.line_num}: not CSV ({error}). Correct the line.") from error


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip ({error}). Fetch the file again.") from error
