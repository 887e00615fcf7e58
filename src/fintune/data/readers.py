"""Readers: the rows of a JSON, JSONL, CSV, TSV or Parquet file, plain or gzip, or of a saved dataset.

The form of a JSON file is detected from its content: a list, lines, or one object around a list. A row that cannot be
parsed is yielded as a ``BrokenRowError``. A file that cannot be read or is truncated raises an error.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fintune.data.files import COPY_AGAIN, KNOWN_SUFFIXES, WORKBOOKS, data_suffix
from fintune.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


class BrokenRowError(Exception):
    """One row cannot be used.

    Args:
        reason: A short reason, by which such rows are counted.
        why: What exactly is wrong.
        field: The field, as ``messages[1].role``; empty for the whole row.
        hint: What to do about it.
    """

    def __init__(self, reason: str, why: str, *, field: str = "", hint: str | None = None) -> None:
        super().__init__(why)
        self.reason, self.why, self.field, self.hint = reason, why, field, hint


@dataclass(frozen=True)
class Row:
    """One row of a file as it was parsed.

    Attributes:
        file: The file, or the split of a dataset.
        number: Counted from 1: line of a JSONL file, element of a list, row of a Parquet file or dataset, or row of
            a table as a spreadsheet numbers it (the header is row 1 unless blank lines come before it).
        value: The parsed row, or a ``BrokenRowError``.
    """

    file: str
    number: int
    value: object


def _never(_: Mapping[str, object]) -> bool:
    return False


def read_rows(path: Path, *, split: str = "", is_row: Callable[[Mapping[str, object]], bool] = _never) -> Iterator[Row]:
    """Yield all rows of a file or saved dataset.

    Args:
        path: A path from :func:`fintune.data.files.find_files`.
        split: Split of a saved dataset that has several; ``train`` or the first if empty.
        is_row: Decides whether the only object of a JSON file is itself a row. If not, it is an object around the rows.

    Raises:
        DataError: The file cannot be read, is truncated or empty, or is not what its name says.
    """
    if path.is_dir():
        yield from _saved_dataset(path, split)
        return
    suffix = data_suffix(path)
    if suffix in WORKBOOKS and path.is_file():
        what = "an Excel workbook" if suffix.startswith(".xls") else "a workbook"
        raise DataError(f"{what} is not read", path=path, hint="save the sheet as CSV UTF-8")
    try:
        if suffix in {".csv", ".tsv"}:
            yield from _csv(path)
        elif suffix == ".parquet":
            yield from _parquet(path)
        else:
            yield from _json(path, is_row)
    except _DAMAGED:
        raise DataError("truncated or damaged gzip file", path=path, hint=COPY_AGAIN) from None
    except FileNotFoundError:
        raise DataError("no such file", path=path, hint="check its name") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", path=path) from None


@contextmanager
def _open_unzipped(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as raw:
        zipped = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        if zipped:
            with gzip.open(raw) as file:
                yield file  # type: ignore[misc]
        else:
            yield raw


def _not_utf8(path: Path) -> DataError:
    """Find the line of a file that is not UTF-8, because decoders only name a byte within their own buffer."""
    what = "not UTF-8 text"
    with _open_unzipped(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(_UTF_16):
                what = "not UTF-8 text but UTF-16"
                break
            try:
                line.decode()
            except UnicodeDecodeError as error:
                what = f"not UTF-8 text (line {number}, byte {error.start + 1} of it)"
                break
    return DataError(what, path=path, hint="save it as UTF-8")


def _json(path: Path, is_row: Callable[[Mapping[str, object]], bool]) -> Iterator[Row]:
    with _open_unzipped(path) as file:
        start = next((line.lstrip(b"\xef\xbb\xbf \t\r\n") for line in file if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    if not start:
        raise DataError("the file is empty", path=path, hint="give a file with rows, or leave it out")
    if start.startswith(_UTF_16):
        raise _not_utf8(path)
    if start.startswith(b"["):
        yield from _objects(path, _whole(path), is_row)
    elif start.startswith(b"{"):
        first, second = _object(start), _second_line(path)
        # An object that ends in the first line is the whole file only if nothing follows.
        wraps = first is not None and not second and not is_row(first) and _only_list(first) is not None
        if wraps or (first is None and _object(second) is None):
            yield from _objects(path, _whole(path), is_row)
        else:
            yield from _lines(path)
    else:
        raise DataError("neither JSON nor JSON lines", path=path, hint=KNOWN_SUFFIXES)


def _whole(path: Path) -> object:
    with _open_unzipped(path) as file:
        data = file.read()
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except json.JSONDecodeError as error:
        if error.pos >= len(data.decode("utf-8-sig").rstrip()) or error.msg.startswith("Unterminated string"):
            raise DataError(f"truncated JSON: it ends in line {error.lineno}", path=path, hint=COPY_AGAIN) from None
        raise DataError(f"not JSON (line {error.lineno}, column {error.colno}: {error.msg})", path=path) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", path=path) from None


def _objects(path: Path, value: object, is_row: Callable[[Mapping[str, object]], bool]) -> Iterator[Row]:
    rows = value if isinstance(value, list) else None
    if isinstance(value, dict):
        rows = [value] if is_row(value) else _only_list(value)
    if rows is None:
        raise DataError("holds one JSON object, not rows", path=path, hint="write a list, or one object a line")
    if not rows:
        raise DataError("the list is empty", path=path, hint="give a file with rows, or leave it out")
    yield from (Row(str(path), number, row) for number, row in enumerate(rows, 1))


def _only_list(value: dict[str, object]) -> list[object] | None:
    """Return the list of ``{"version": 1, "data": [{...}, ...]}``, if it is the only list of objects."""
    lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    return lists[0] if len(lists) == 1 else None


def _second_line(path: Path) -> bytes:
    with _open_unzipped(path) as file:
        lines = (line for line in file if line.strip())
        next(lines, b"")
        return next(lines, b"")


def _object(line: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _problem(error: ValueError | RecursionError) -> str:
    # A row is one line, so the parser's line number would mislead.
    return f"{error.msg}, character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def _lines(path: Path) -> Iterator[Row]:
    with _open_unzipped(path) as file:
        broken: Row | None = None
        ended = True
        for number, line in enumerate(file, 1):
            if broken is not None:
                yield broken
                broken = None
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            ended = line.endswith(b"\n")
            try:
                yield Row(str(path), number, json.loads(text.decode("utf-8")))
            except UnicodeDecodeError as error:
                why = f"not UTF-8 text (byte {error.start} of the line)"
                broken = Row(str(path), number, BrokenRowError("not UTF-8", why, hint="save the file as UTF-8"))
            except (ValueError, RecursionError) as error:
                hint = "each line must hold one whole JSON object"
                broken = Row(str(path), number, BrokenRowError("not JSON", f"not JSON ({_problem(error)})", hint=hint))
        if broken is not None:
            if not ended:
                raise DataError(f"truncated in row {broken.number}", path=path, hint=COPY_AGAIN)
            yield broken


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open_unzipped(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        try:
            yield from _table(path, text)
        except UnicodeDecodeError:
            raise _not_utf8(path) from None


def _table(path: Path, text: io.TextIOWrapper) -> Iterator[Row]:
    skipped, head = 0, text.readline()
    while head and not head.strip():
        skipped, head = skipped + 1, text.readline()
    if not head:
        raise DataError("the file is empty", path=path, hint="give a file with rows, or leave it out")
    reader = csv.reader(itertools.chain([head], text), delimiter=_delimiter(path, head), strict=True)
    try:
        names = [name.strip() for name in next(reader)]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise DataError(
                f"two columns are named {repeated!r}", path=path, row=1 + skipped, hint="rename one of them"
            )
        for number, cells in enumerate(reader, 2 + skipped):
            if cells:
                yield Row(str(path), number, _by_name(names, cells))
    except csv.Error as error:
        hint = "look for a quotation mark that is not closed"
        raise DataError(f"not CSV from line {reader.line_num + skipped} on ({error})", path=path, hint=hint) from None


def _delimiter(path: Path, head: str) -> str:
    return "\t" if data_suffix(path) == ".tsv" else max(",;\t|", key=head.count)


def _by_name(names: list[str], cells: list[str]) -> object:
    if len(cells) != len(names):
        why = f"{len(cells)} cells where the header has {len(names)}"
        return BrokenRowError("wrong number of cells", why, hint="quote cells that hold the separator or a line break")
    return dict(zip(names, cells, strict=True))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, row)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"not a whole Parquet file ({str(error).splitlines()[0]})", path=path, hint=COPY_AGAIN
        ) from None


def _saved_dataset(folder: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the saved dataset cannot be read ({error})", path=folder, hint=COPY_AGAIN) from None
    file = str(folder)
    if isinstance(data, datasets.DatasetDict):
        name = split or ("train" if "train" in data else next(iter(data)))
        if name not in data:
            raise DataError(f"has no split {name!r}", path=folder, hint=f"set split to one of {', '.join(data)}")
        file, data = f"{folder}, split {name}", data[name]
    yield from (Row(file, number, row) for number, row in enumerate(data, 1))
