"""Rows of any JSON, JSONL, CSV, TSV or Parquet file, plain or gzip, and of folders of them.

What a JSON file is, is read from its content: a list, lines, or one object around a list. A row that cannot be parsed
comes as a ``BrokenRowError`` in its place; a file that cannot be read or is truncated is an error.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fintune.data.files import SUFFIXES, WORKBOOKS, suffix_of
from fintune.errors import DataError

AGAIN = "copy or download it again"
_GZIP_MAGIC = b"\x1f\x8b"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


class BrokenRowError(Exception):
    """One row that cannot be used.

    Args:
        reason: Short, to count by.
        why: What exactly is wrong.
        field: Which field, as ``messages[1].role``; the whole row where empty.
        hint: What to do.
    """

    def __init__(self, reason: str, why: str, *, field: str = "", hint: str | None = None) -> None:
        super().__init__(why)
        self.reason, self.why, self.field, self.hint = reason, why, field, hint


@dataclass(frozen=True)
class Row:
    """One row as it stands there.

    Attributes:
        place: The file, or the split of a dataset.
        number: 1-based: line of a JSONL file, element of a list, row of a table as a spreadsheet numbers it (its header
            is row 1 where no blank line is above), row of a Parquet file or dataset.
        value: The parsed row, or what is wrong with it.
    """

    place: str
    number: int
    value: object


def _never(_: Mapping[str, object]) -> bool:
    return False


def read_rows(path: Path, *, split: str = "", is_row: Callable[[Mapping[str, object]], bool] = _never) -> Iterator[Row]:
    """All rows of a file or saved dataset, one after the other.

    Args:
        path: From :func:`fintune.data.files.find`.
        split: Of a saved dataset that has several.
        is_row: Whether an object that a JSON file holds alone is a row, and none around a list of rows.

    Raises:
        DataError: It cannot be read, is truncated, empty or not what its name says.
    """
    if path.is_dir():
        yield from _saved_dataset(path, split)
        return
    suffix = suffix_of(path)
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
        raise DataError("truncated or damaged gzip file", path=path, hint=AGAIN) from None
    except FileNotFoundError:
        raise DataError("no such file", path=path, hint="check its name") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", path=path) from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as raw:
        zipped = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        if zipped:
            with gzip.open(raw) as file:
                yield file  # type: ignore[misc]
        else:
            yield raw


def _not_utf8(path: Path) -> DataError:
    """Where a text file is something else: decoders name a byte of the piece that they were given."""
    what = "not UTF-8 text"
    with _opened(path) as file:
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
    with _opened(path) as file:
        start = next((line.lstrip(b"\xef\xbb\xbf \t\r\n") for line in file if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    if not start:
        raise DataError("the file is empty", path=path, hint="give a file with rows, or leave it out")
    if start.startswith(_UTF_16):
        raise _not_utf8(path)
    if start.startswith(b"["):
        yield from _objects(path, _whole(path), is_row)
    elif start.startswith(b"{"):
        first, second = _object(start), _second_line(path)
        # An object that ends in the first line is the whole file only where nothing follows.
        wraps = first is not None and not second and not is_row(first) and _only_list(first) is not None
        if wraps or (first is None and _object(second) is None):
            yield from _objects(path, _whole(path), is_row)
        else:
            yield from _lines(path)
    else:
        raise DataError("neither JSON nor JSON lines", path=path, hint=f"known are {' '.join(SUFFIXES)}, also .gz")


def _whole(path: Path) -> object:
    with _opened(path) as file:
        data = file.read()
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except json.JSONDecodeError as error:
        if error.pos >= len(data.decode("utf-8-sig").rstrip()) or error.msg.startswith("Unterminated string"):
            raise DataError(f"truncated JSON: it ends in line {error.lineno}", path=path, hint=AGAIN) from None
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
    """``[...]`` of ``{"version": 1, "data": [{...}, ...]}``."""
    lists = [each for each in value.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
    return lists[0] if len(lists) == 1 else None


def _second_line(path: Path) -> bytes:
    with _opened(path) as file:
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
    # A row is one line, so the parser's own line and column in it would only mislead.
    return f"{error.msg}, character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def _lines(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
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
                raise DataError(f"truncated in row {broken.number}", path=path, hint=AGAIN)
            yield broken


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _opened(path) as file:
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
    reader = csv.reader(_again(head, text), delimiter=_delimiter(path, head), strict=True)
    try:
        names = [name.strip() for name in next(reader)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f"two columns are named {twice!r}", path=path, row=1 + skipped, hint="rename one of them")
        for number, cells in enumerate(reader, 2 + skipped):
            if cells:
                yield Row(str(path), number, _named(names, cells))
    except csv.Error as error:
        hint = "look for a quotation mark that is not closed"
        raise DataError(f"not CSV from line {reader.line_num + skipped} on ({error})", path=path, hint=hint) from None


def _again(head: str, rest: Iterable[str]) -> Iterator[str]:
    yield head
    yield from rest


def _delimiter(path: Path, head: str) -> str:
    return "\t" if suffix_of(path) == ".tsv" else max(",;\t|", key=head.count)


def _named(names: list[str], cells: list[str]) -> object:
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
        raise DataError(f"not a whole Parquet file ({str(error).splitlines()[0]})", path=path, hint=AGAIN) from None


def _saved_dataset(folder: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the saved dataset cannot be read ({error})", path=folder, hint=AGAIN) from None
    place = str(folder)
    if isinstance(found, datasets.DatasetDict):
        name = split or ("train" if "train" in found else next(iter(found)))
        if name not in found:
            raise DataError(f"has no split {name!r}", path=folder, hint=f"set split to one of {', '.join(found)}")
        place, found = f"{folder}, split {name}", found[name]
    yield from (Row(place, number, row) for number, row in enumerate(found, 1))
