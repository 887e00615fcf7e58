"""Readers: the rows of a JSON, JSONL, CSV, TSV, Parquet or Arrow file, plain or gzip, or of a saved dataset.

The form of a JSON file is detected from its content: a list, lines, objects one after the other, one object around a
list, or one object with a list by column. A row that cannot be
parsed is yielded as a ``BrokenRowError``. A file that cannot be read or is truncated raises an error.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fintune.data.files import COPY_AGAIN, KNOWN_SUFFIXES, WORKBOOKS, data_suffix
from fintune.errors import DataError
from fintune.util.files import parse_json
from fintune.util.text import first_line

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

_GZIP_MAGIC = b"\x1f\x8b"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_TURN_KEYS = {"role", "from"}
_BAD_CELLS = (ArithmeticError, AttributeError, TypeError, ValueError)
"""What pyarrow and datasets raise for cells that no Python value stands for, and for metadata of other types."""
_BLANKS = re.compile(r"\s*")
_NO_JSON = object()
_QUOTE = "quote cells that hold the separator or a line break"
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


def read_rows(
    path: Path,
    *,
    split: str = "",
    is_row: Callable[[Mapping[str, object]], bool] = _never,
    has_header: bool = True,
) -> Iterator[Row]:
    """Yield all rows of a file or saved dataset. Numbers of classes become the names that the file gives them.

    Args:
        path: A path from :func:`fintune.data.files.find_files`.
        split: Split of a saved dataset that has several; ``train`` or the first if empty.
        has_header: Whether the first row of a table names its columns. If not, they are ``column1``, ``column2`` ...
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
            yield from _csv(path, has_header)
        elif suffix in {".parquet", ".arrow"}:
            yield from _arrow(path, suffix)
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
    if not start.startswith((b"[", b"{")):
        raise DataError("neither JSON nor JSON lines", path=path, hint=KNOWN_SUFFIXES)
    first, second = _value(start), _second_line(path)
    if isinstance(first, dict):
        # An object that ends in the first line is the whole file only if nothing follows.
        is_whole = not second and _rows_of(first, is_row) is not None
    else:
        # A list with one object a line begins with "[" alone or with "[{...},".
        is_open = first is _NO_JSON and start.rstrip().endswith((b"[", b","))
        is_whole = is_open or (not (isinstance(first, list) and second) and not isinstance(_value(second), dict))
    yield from _objects(path, _whole(path), is_row) if is_whole else _lines(path)


def _whole(path: Path) -> list[object]:
    """Return the values of a JSON file, which usually is one."""
    with _open_unzipped(path) as file:
        data = file.read()
    values: list[object] = []
    try:
        text = data.decode("utf-8-sig").rstrip()
        with suppress(json.JSONDecodeError):
            return [parse_json(text)]
        position, decoder = 0, json.JSONDecoder()
        while position < len(text):
            value, position = decoder.raw_decode(text, _BLANKS.match(text, position).end())  # type: ignore[union-attr]
            values.append(value)
        return values
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except json.JSONDecodeError as error:
        if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
            raise DataError(f"truncated JSON: it ends in line {error.lineno}", path=path, hint=COPY_AGAIN) from None
        raise DataError(f"not JSON (line {error.lineno}, column {error.colno}: {error.msg})", path=path) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", path=path) from None


def _objects(path: Path, values: list[object], is_row: Callable[[Mapping[str, object]], bool]) -> Iterator[Row]:
    value = values[0]
    rows: Sequence[object] | None = values if len(values) > 1 else None
    if rows is None and isinstance(value, list):
        rows = (
            [value] if value and all(isinstance(turn, dict) and _TURN_KEYS & turn.keys() for turn in value) else value
        )
    elif rows is None and isinstance(value, dict):
        rows = _rows_of(value, is_row) or ([value] if is_row(value) else None)
    if rows is None:
        raise DataError("holds one JSON object, not rows", path=path, hint="write a list, or one object a line")
    if not rows:
        raise DataError("the list is empty", path=path, hint="give a file with rows, or leave it out")
    yield from (Row(str(path), number, row) for number, row in enumerate(rows, 1))


def _rows_of(value: dict[str, Any], is_row: Callable[[Mapping[str, object]], bool]) -> Sequence[object] | None:
    """Return the rows of an object around them: by column as pandas writes them, or the only list of objects."""
    columns = list(value.values())
    if columns and all(isinstance(cells, dict) and cells and all(key.isdigit() for key in cells) for cells in columns):
        keys = dict.fromkeys(itertools.chain.from_iterable(columns))
        return [{name: cells.get(key) for name, cells in value.items()} for key in keys]
    if columns and all(isinstance(cells, list) and len(cells) == len(columns[0]) > 0 for cells in columns):
        is_flat = len(columns) > 1 and not any(isinstance(cell, (dict, list)) for cells in columns for cell in cells)
        if is_flat or all(isinstance(cell, list) for cells in columns for cell in cells):
            return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    names, cells = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(cells, list) and all(isinstance(row, list) for row in cells):
        return [_by_name(list(map(str, names)), row, "give each row one cell for each name") for row in cells]
    if is_row(value):
        return None
    lists = [item for item in columns if isinstance(item, list) and item and isinstance(item[0], dict)]
    return lists[0] if len(lists) == 1 else None


def _second_line(path: Path) -> bytes:
    with _open_unzipped(path) as file:
        lines = (line for line in file if line.strip())
        next(lines, b"")
        return next(lines, b"")


def _value(line: bytes) -> object:
    try:
        return parse_json(line)
    except ValueError:
        return _NO_JSON


def _problem(error: ValueError) -> str:
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
                yield Row(str(path), number, parse_json(text.decode("utf-8")))
            except UnicodeDecodeError as error:
                why = f"not UTF-8 text (byte {error.start} of the line)"
                broken = Row(str(path), number, BrokenRowError("not UTF-8", why, hint="save the file as UTF-8"))
            except ValueError as error:
                hint = "each line must hold one whole JSON object"
                broken = Row(str(path), number, BrokenRowError("not JSON", f"not JSON ({_problem(error)})", hint=hint))
        if broken is not None:
            if not ended:
                raise DataError(f"truncated in row {broken.number}", path=path, hint=COPY_AGAIN)
            yield broken


def _csv(path: Path, has_header: bool) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open_unzipped(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        try:
            yield from _table(path, text, has_header)
        except UnicodeDecodeError:
            raise _not_utf8(path) from None


def _table(path: Path, text: io.TextIOWrapper, has_header: bool) -> Iterator[Row]:
    skipped, head = 0, text.readline()
    while head and not head.strip():
        skipped, head = skipped + 1, text.readline()
    if not head:
        raise DataError("the file is empty", path=path, hint="give a file with rows, or leave it out")
    delimiter = _delimiter(path, head)
    reader = csv.reader(itertools.chain([head], text), delimiter=delimiter, strict=True)
    try:
        first = next(reader)
        names = [name.strip() if has_header else f"column{k}" for k, name in enumerate(first, 1)]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise DataError(
                f"two columns are named {repeated!r}", path=path, row=1 + skipped, hint="rename one of them"
            )
        rows = reader if has_header else itertools.chain([first], reader)
        for number, cells in enumerate(rows, 1 + has_header + skipped):
            if cells:
                yield Row(str(path), number, _by_name(names, cells))
    except csv.Error as error:
        hint = "look for a quotation mark that is not closed"
        raise DataError(f"not CSV from line {reader.line_num + skipped} on ({error})", path=path, hint=hint) from None


def _delimiter(path: Path, head: str) -> str:
    return "\t" if data_suffix(path) == ".tsv" else max(",;\t|", key=head.count)


def _by_name(names: list[str], cells: list[Any], hint: str = _QUOTE) -> object:
    if len(cells) != len(names):
        why = f"{len(cells)} cells where the header has {len(names)}"
        return BrokenRowError("wrong number of cells", why, hint=hint)
    return dict(zip(names, cells, strict=True))


def _arrow(path: Path, suffix: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        if suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                yield from _batches(path, file.schema_arrow, file.iter_batches(batch_size=1000))
            return
        with pyarrow.memory_map(str(path)) as mapped:
            try:
                stream = pyarrow.ipc.open_stream(mapped)
                yield from _batches(path, stream.schema, stream)
            except pyarrow.ArrowInvalid:
                table = pyarrow.ipc.open_file(mapped)
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
                yield from _batches(path, table.schema, batches)
    except (pyarrow.ArrowException, *_BAD_CELLS) as error:
        what = "Parquet" if suffix == ".parquet" else "Arrow"
        raise DataError(f"not a whole {what} file ({first_line(error)})", path=path, hint=COPY_AGAIN) from None


def _batches(path: Path, schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[Row]:
    stored = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features") or {}
    classes = {name: feature["names"] for name, feature in features.items() if _is_class_label(feature)}
    number = 0
    for batch in batches:
        batch.validate(full=True)
        for row in batch.to_pylist():
            number += 1
            yield Row(str(path), number, _name_classes(row, classes))


def _is_class_label(feature: object) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and bool(feature.get("names"))


def _name_classes(row: dict[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Write the names of classes in place of their numbers; -1 is an unknown class."""
    for name, names in classes.items():
        number = row.get(name)
        if isinstance(number, int):
            row[name] = names[number] if 0 <= number < len(names) else None
    return row


def _saved_dataset(folder: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
        for part in data.values() if isinstance(data, datasets.DatasetDict) else (data,):
            part.data.table.validate(full=True)  # it is mapped into memory: a damaged offset would end the process
    except (OSError, LookupError, *_BAD_CELLS) as error:
        raise DataError(
            f"the saved dataset cannot be read ({first_line(error)})", path=folder, hint=COPY_AGAIN
        ) from None
    file = str(folder)
    if isinstance(data, datasets.DatasetDict):
        name = split or ("train" if "train" in data else next(iter(data)))
        if name not in data:
            raise DataError(f"has no split {name!r}", path=folder, hint=f"set split to one of {', '.join(data)}")
        file, data = f"{folder}, split {name}", data[name]
    yield from dataset_rows(file, data)


def dataset_rows(file: str, data: Dataset) -> Iterator[Row]:
    """Yield the rows of a dataset of ``datasets``, with the names of classes in place of their numbers.

    Args:
        file: How messages call the dataset.
        data: The dataset.
    """
    import datasets

    classes = {name: kind.names for name, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)}
    for number, row in enumerate(data, 1):
        yield Row(file, number, _name_classes(dict(row), classes))
