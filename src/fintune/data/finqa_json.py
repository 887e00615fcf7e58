"""FinQA files: the official JSON list (github.com/czyssrs/FinQA) or one record a line, plain or gzip.

The form of a file is detected from its content, not from its name. A record that cannot be used is dropped, counted by
a short reason and reported in one line. A file that cannot be read raises an error.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from fintune.data.files import COPY_AGAIN, read_whole_text
from fintune.data.tokenize import DroppedRow
from fintune.errors import DataError
from fintune.records import FinQARecord
from fintune.util.files import parse_json

_HINT = "FinQA records look like those of github.com/czyssrs/FinQA, dataset/dev.json"
_TABLES = {".csv", ".tsv"}
_TABLE_HINT = (
    "a page is asked about by fintune ask MODEL QUESTION --page FILE, rows are trained on by data.source=chat "
    "data.sources=FILE"
)
_NOT_STRICT = "set data.strict: false"
WITHOUT_STRICT = "leave out --strict"
"""How the user of a command can have unusable records dropped."""


@dataclass(frozen=True)
class FinqaFile:
    """The records of a FinQA file.

    Attributes:
        records: Usable records in file order. Their ids are unique.
        dropped: Number of records that cannot be used, by reason.
        broken: Those records, with row, id and reason.
    """

    records: list[FinQARecord]
    dropped: Counter[str] = field(default_factory=Counter)
    broken: list[DroppedRow] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """One line for each record that cannot be used: file, row, id, field, reason."""
        return [str(row) for row in self.broken]


class _BrokenError(Exception):
    """One record cannot be used: a reason to count by, and what exactly is wrong."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason, self.why = reason, why


def read_finqa(path: Path, *, strict: bool = False, instead: str = _NOT_STRICT, needs_gold: bool = True) -> FinqaFile:
    """Read a FinQA file.

    Args:
        path: JSON list or JSON lines, plain or gzip.
        strict: Whether to stop at the first record that cannot be used, instead of dropping and counting it.
        instead: How the user can have such records dropped, for the hint of that error.
        needs_gold: Whether a record needs a program and its result. If not, missing ones are empty.

    Raises:
        DataError: The file is missing, unreadable, truncated, no list or empty; no record of it can be used; or, with
            ``strict``, one of them cannot.
    """
    records: list[FinQARecord] = []
    dropped: Counter[str] = Counter()
    broken_rows: list[DroppedRow] = []
    rows: dict[str, int] = {}
    for row, raw in _rows(path, read_whole_text(path, hint=_HINT)):
        record_id = _id(raw)
        try:
            record = _record(raw, needs_gold=needs_gold)
            if record.id in rows:
                raise _BrokenError("duplicate id", f"the same id as row {rows[record.id]}")
        except _BrokenError as broken:
            broken_row = DroppedRow(
                file=str(path), row=row, id=record_id or "", reason=broken.why, category=broken.reason
            )
            if strict:
                hint = f"repair or remove the record, or {instead} to drop and count such records"
                raise broken_row.error(hint) from None
            dropped[broken.reason] += 1
            broken_rows.append(broken_row)
            continue
        rows[record.id] = row
        records.append(record)
    if not records:
        counts = ", ".join(f"{reason}: {number}" for reason, number in dropped.most_common())
        raise DataError(f"no record can be used ({counts}); the first: {broken_rows[0]}", path=path, hint=_HINT)
    return FinqaFile(records, dropped, broken_rows)


def read_objects(path: Path) -> dict[str, dict[str, object]]:
    """Return the JSON objects of the usable records by id, with the keys that :func:`read_finqa` ignores."""
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
    """Yield rows, counted from 1, and their parsed values. A line that is no JSON yields a ``_BrokenError``."""
    start = text.lstrip()[0]
    if start == "[":
        try:
            rows = parse_json(text)
        except ValueError as error:
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
    # Not splitlines: a record's text may have U+2028 and similar characters, which do not end a line of JSON.
    lines = [(row, line) for row, line in enumerate(text.split("\n"), 1) if line.strip()]
    for row, line in lines:
        try:
            value = parse_json(line)
        except ValueError as error:
            if line is lines[0][1]:
                # The first line is no record: the file is an object over many lines, or no JSON at all.
                raise _not_list(path, text, error) from None
            if line is lines[-1][1] and not text.endswith("\n"):
                raise DataError(f"truncated in row {row}", path=path, hint=COPY_AGAIN) from None
            yield row, _BrokenError("not JSON", f"not JSON ({error})")
            continue
        yield row, value


def _not_json(path: Path, text: str, error: Exception) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            why = f"truncated JSON: it ends in line {error.lineno}, inside a value"
            return DataError(why, path=path, hint=COPY_AGAIN)
        return DataError(f"not JSON (line {error.lineno}, column {error.colno}: {error.msg})", path=path)
    return DataError(f"not JSON ({error})", path=path)


def _not_list(path: Path, text: str, error: Exception) -> DataError:
    try:
        parse_json(text)
    except ValueError as whole:
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
        # No score reads this free text, so a number in it is no reason to drop the question.
        qa = {**qa, "answer": str(qa["answer"])}
    try:
        record = FinQARecord.model_validate({**raw, "qa": qa})
    except ValidationError as error:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"] if part not in {"float", "str"}]
        name = location[1] if location[0] == "qa" and len(location) > 1 else location[0]
        raise _BrokenError(f"bad {name}", f"{'.'.join(location)}: {_plain(first['msg'])}") from None
    answer = record.qa.exe_ans
    if has_gold and answer not in {"yes", "no"} and (isinstance(answer, str) or not math.isfinite(answer)):
        raise _BrokenError("bad exe_ans", f"qa.exe_ans is {answer!r}, which is neither a number nor 'yes' or 'no'")
    return record


def _plain(message: str) -> str:
    return f"{message[0].lower()}{message[1:]}".replace("a valid tuple", "a list").replace("dictionary", "object")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
