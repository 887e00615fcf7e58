"""Read predicted programs, in every form that the scorer takes.

The forms are the official list ``[{"id": ..., "predicted": ["subtract(", "5829", ...]}, ...]``, rows ``{"id": ...,
"program": "subtract(5829, 5735), ..."}``, and this package's own predictions, of which ``program`` is read. A file has
a JSON list or one object a line, plain or gzip, which is detected from its content. A program as text is split into
tokens as the official script splits gold programs.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fintune.data.files import read_text
from fintune.errors import DataError
from fintune.finqa.program import tokenize
from fintune.util.files import parse_json

_HINT = 'expected {"id": ..., "predicted": [tokens]} or {"id": ..., "program": "text"}, as a JSON list or a line each'
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class PredictedProgram:
    """One row: its number from 1, its id, official tokens, and the seconds of the completion if the row has them."""

    row: int
    id: str
    tokens: tuple[str, ...]
    seconds: float | None = None


@dataclass
class PredictionFile:
    """The predictions of a file.

    Attributes:
        path: The file; None for rows in memory.
        predictions: Usable rows in file order. Several may have one id.
        unusable: Number of unusable rows by reason. A file that breaks off counts as one row.
        problems: One error for each unusable row, with row and id.
    """

    path: Path | None = None
    predictions: list[PredictedProgram] = field(default_factory=list)
    unusable: Counter[str] = field(default_factory=Counter)
    problems: list[DataError] = field(default_factory=list)

    def report(self, reason: str, message: str, row: int | None, record_id: str | None = None) -> None:
        """Count a row that cannot be used."""
        self.unusable[reason] += 1
        self.problems.append(DataError(message, path=self.path, row=row, record_id=record_id))


def read_predictions(path: Path) -> PredictionFile:
    """Read a file of predictions. A file that breaks off is read up to there.

    Raises:
        DataError: The file is missing, unreadable or empty, or none of its rows can be used.
    """
    file = PredictionFile(path)
    text, damage = read_text(path, hint=_HINT)
    start = text.lstrip()[0]
    if start not in "[{":
        raise DataError("neither a JSON list nor JSON lines", path=path, hint=_HINT)
    return _collect(file, _list_rows(file, text, damage) if start == "[" else _line_rows(file, text, damage))


def collect_predictions(rows: Iterable[object]) -> PredictionFile:
    """Collect predictions from rows in memory, in the forms that a file may have.

    Raises:
        DataError: No row can be used.
    """
    return _collect(PredictionFile(), enumerate(rows, start=1))


def _collect(file: PredictionFile, rows: Iterable[tuple[int, object]]) -> PredictionFile:
    for row, value in rows:
        _add_row(file, row, value)
    if not file.predictions and file.problems:
        raise DataError(f"no row can be scored; the first problem: {file.problems[0].message}", hint=_HINT)
    if not file.predictions:
        raise DataError("there are no predictions", path=file.path, hint=_HINT)
    return file


def _list_rows(file: PredictionFile, text: str, damage: str | None) -> Iterator[tuple[int, object]]:
    try:
        yield from enumerate(parse_json(text), 1)
    except ValueError as error:
        yield from _broken_list_rows(file, text, damage or f"not JSON ({error})")


def _broken_list_rows(file: PredictionFile, text: str, why: str) -> Iterator[tuple[int, object]]:
    # Element by element, because all rows before the break can be scored.
    decoder = json.JSONDecoder()
    position, row = text.index("[") + 1, 0
    while True:
        position = _skip_space(text, position)
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            break
        row += 1
        yield row, value
        position = _skip_space(text, position)
        if not text.startswith(",", position):
            break
        position += 1
    has_ended = not text[position:].strip() or not text.rstrip().endswith("]")
    if has_ended and why.startswith("not JSON"):
        why = "truncated JSON"
    file.report(why.split(" (", maxsplit=1)[0], f"{why}: the list breaks off here", row + 1)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _line_rows(file: PredictionFile, text: str, damage: str | None) -> Iterator[tuple[int, object]]:
    lines = [(row, line) for row, line in enumerate(text.split("\n"), 1) if line.strip()]
    last = lines[-1][0]
    for row, line in lines:
        try:
            value = parse_json(line)
        except ValueError as error:
            if row == last and damage:
                break  # reported below, once
            is_cut = row == last and not text.endswith("\n")
            why = "truncated line" if is_cut else f"not JSON ({error})"
            file.report(why.split(" (", maxsplit=1)[0], why, row)
            continue
        yield row, value
    if damage:
        file.report(damage.split(" (")[0], f"{damage}: it breaks off here", last)


def _add_row(file: PredictionFile, row: int, value: object) -> None:
    if not isinstance(value, dict):
        file.report("not an object", "not a JSON object", row)
        return
    record_id = value.get("id")
    if not isinstance(record_id, str) or not record_id:
        file.report("no id", "no id", row)
        return
    key = next((key for key in ("predicted", "program") if value.get(key) is not None), None)
    if key is None:
        file.report("no program", "no program: it has neither 'predicted' nor 'program'", row, record_id)
        return
    program, duration = value[key], value.get("seconds")
    seconds = float(duration) if isinstance(duration, int | float) and 0 <= duration <= sys.float_info.max else None
    if isinstance(program, str):
        file.predictions.append(PredictedProgram(row, record_id, tuple(tokenize(program)), seconds))
    elif isinstance(program, list) and all(isinstance(token, str) for token in program):
        file.predictions.append(PredictedProgram(row, record_id, tuple(program), seconds))
    else:
        file.report("bad program", f"{key!r} is neither a text nor a list of texts", row, record_id)
