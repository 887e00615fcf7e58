"""FinQA files: the official JSON list (github.com/czyssrs/FinQA) or one record a line, plain or gzip.

What a file is, is read from its content: a ``.json`` that holds gzip or lines is taken as such. Whatever cannot be used
is dropped under a short reason and told in one line; a file that cannot be read at all is an error.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from fintune.data.json_files import read_whole_text
from fintune.data.source_report import UnusedRow
from fintune.errors import DataError
from fintune.records import FinQARecord

_HINT = "FinQA records look like those of github.com/czyssrs/FinQA, dataset/dev.json"
_TABLES = {".csv", ".tsv"}
_TABLE_HINT = (
    "a page is asked about by fintune ask MODEL QUESTION --page FILE, rows are trained on by data.source=chat "
    "data.sources=FILE"
)
_NOT_STRICT = "set data.strict: false"
WITHOUT_STRICT = "leave out --strict"
"""How a command's user has records dropped that cannot be used."""


@dataclass(frozen=True)
class ReadResult:
    """What a file gave.

    Attributes:
        records: Usable records in file order; ids are unique.
        dropped: Number of records left out, by reason.
        unused: They, with row, id and why.
    """

    records: list[FinQARecord]
    dropped: Counter[str] = field(default_factory=Counter)
    unused: list[UnusedRow] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """One line for each record left out: file, row, id, field, why."""
        return [row.told() for row in self.unused]


class _BrokenError(Exception):
    """One record that cannot be used: a reason to count by, and what exactly is wrong."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason, self.why = reason, why


def read_finqa(path: Path, *, strict: bool = False, instead: str = _NOT_STRICT, needs_gold: bool = True) -> ReadResult:
    """Read a FinQA file.

    Args:
        path: JSON list or JSON lines, plain or gzip.
        strict: Stop at the first record that cannot be used, instead of dropping and counting it.
        instead: How the user would have it dropped, for the hint of that error.
        needs_gold: Whether a record without a program and its result is none that can be used; else both are "".

    Raises:
        DataError: The file is missing, unreadable, truncated, no list or empty; no record of it can be used; or, with
            ``strict``, one cannot.
    """
    records: list[FinQARecord] = []
    dropped: Counter[str] = Counter()
    unused: list[UnusedRow] = []
    rows: dict[str, int] = {}
    for row, raw in _rows(path, read_whole_text(path, hint=_HINT)):
        record_id = _id(raw)
        try:
            record = _record(raw, needs_gold=needs_gold)
            if record.id in rows:
                raise _BrokenError("duplicate id", f"the same id as row {rows[record.id]}")
        except _BrokenError as broken:
            one = UnusedRow(file=str(path), row=row, id=record_id or "", reason=broken.why)
            if strict:
                error = one.error()
                error.hint = f"mend or remove the record, or {instead} to drop and count such records"
                raise error from None
            dropped[broken.reason] += 1
            unused.append(one)
            continue
        rows[record.id] = row
        records.append(record)
    if not records:
        counts = ", ".join(f"{reason}: {number}" for reason, number in dropped.most_common())
        raise DataError(f"no record can be used ({counts}); the first: {unused[0].told()}", path=path, hint=_HINT)
    return ReadResult(records, dropped, unused)


def read_objects(path: Path) -> dict[str, dict[str, object]]:
    """What `read_finqa` makes its records of, by id, as it stands in the file.

    They hold what a record leaves out: keys that this package has no use for.
    """
    objects: dict[str, dict[str, object]] = {}
    for _, raw in _rows(path, read_whole_text(path, hint=_HINT)):
        try:
            record = _record(raw)
        except _BrokenError:
            continue
        if isinstance(raw, dict):
            objects.setdefault(record.id, raw)
    return objects


def _rows(path: Path, text: str) -> Iterator[tuple[int, object]]:
    """1-based row and its parsed value; a line that is no JSON gives a ``_BrokenError`` in its place."""
    start = text.lstrip()[0]
    if start == "[":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, text, error) from None
        if not rows:
            raise DataError("the list is empty", path=path, hint=_HINT)
        yield from enumerate(rows, 1)
    elif start == "{":
        yield from _lines(path, text)
    elif Path(path.name.removesuffix(".gz")).suffix.lower() in _TABLES:
        raise DataError("a table, where FinQA records (JSON) are read", path=path, hint=_TABLE_HINT)
    else:
        raise DataError("neither a JSON list nor JSON lines", path=path, hint=_HINT)


def _lines(path: Path, text: str) -> Iterator[tuple[int, object]]:
    # Not splitlines: a record's text may hold U+2028 and its like, which do not end a line of JSON.
    lines = [(row, line) for row, line in enumerate(text.split("\n"), 1) if line.strip()]
    for row, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if line is lines[0][1]:
                # A first line that is no record: an object over many lines, or no JSON at all.
                raise _not_list(path, text, error) from None
            if line is lines[-1][1] and not text.endswith("\n"):
                raise DataError(f"truncated in row {row}", path=path, hint="copy or download it again") from None
            yield row, _BrokenError("not JSON", f"not JSON ({error})")
            continue
        yield row, value


def _not_json(path: Path, text: str, error: Exception) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            why = f"truncated JSON: it ends in line {error.lineno}, inside a value"
            return DataError(why, path=path, hint="copy or download it again")
        return DataError(f"not JSON (line {error.lineno}, column {error.colno}: {error.msg})", path=path)
    return DataError(f"not JSON ({error})", path=path)


def _not_list(path: Path, text: str, error: Exception) -> DataError:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as whole:
        return _not_json(path, text, whole)
    return DataError("holds one JSON object, not a list of records", path=path, hint=_HINT)


def _id(raw: object) -> str | None:
    value = raw.get("id") if isinstance(raw, dict) else None
    return value if isinstance(value, str) and value else None


def _record(raw: object, *, needs_gold: bool = True) -> FinQARecord:
    if isinstance(raw, _BrokenError):
        raise raw
    if not isinstance(raw, dict):
        raise _BrokenError("not an object", f"not a JSON object but {_kind(raw)}")
    if _id(raw) is None:
        raise _BrokenError("no id", "no id")
    qa = raw.get("qa")
    if not isinstance(qa, dict):
        raise _BrokenError("no question", f"qa is {_kind(qa)}, not an object")
    has_gold = needs_gold or all(qa.get(key) not in (None, "") for key in ("program", "exe_ans"))
    if not has_gold:
        qa = {**qa, "program": "", "exe_ans": ""}
    for key in ("question", "program") if has_gold else ("question",):
        value = qa.get(key)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise _BrokenError(f"no {key}", f"qa.{key} is missing or empty")
    if isinstance(qa.get("answer"), (int, float)):
        # Free text that no score reads: a number in it is no reason to lose a question.
        qa = {**qa, "answer": str(qa["answer"])}
    try:
        record = FinQARecord.model_validate({**raw, "qa": qa})
    except ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in {"float", "str"}]
        name = where[1] if where[0] == "qa" and len(where) > 1 else where[0]
        raise _BrokenError(f"bad {name}", f"{'.'.join(where)}: {_plain(first['msg'])}") from None
    answer = record.qa.exe_ans
    if has_gold and answer not in {"yes", "no"} and (isinstance(answer, str) or not math.isfinite(answer)):
        raise _BrokenError("bad exe_ans", f"qa.exe_ans is {answer!r}, which is neither a number nor 'yes' or 'no'")
    return record


def _plain(message: str) -> str:
    return f"{message[0].lower()}{message[1:]}".replace("a valid tuple", "a list").replace("dictionary", "object")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
