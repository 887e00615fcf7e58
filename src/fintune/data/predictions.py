"""Files of predicted programs, in every form that the scorer takes.

The official list, ``[{"id": ..., "predicted": ["subtract(", "5829", ...]}, ...]``; ``{"id": ..., "program":
"subtract(5829, 5735), ..."}``; and the records that this package writes, whose ``program`` is read. As one JSON list or
one object a line, plain or gzip, told by the content. A text is cut into tokens as the official script cuts gold ones.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fintune.data.files import read_text
from fintune.errors import DataError
from fintune.finqa.program import tokenize

_HINT = 'expected {"id": ..., "predicted": [tokens]} or {"id": ..., "program": "text"}, as a JSON list or a line each'


@dataclass(frozen=True)
class PredictedProgram:
    """One row of a file: 1-based row, id, official tokens, and the time of the completion where the row tells it."""

    row: int
    id: str
    tokens: tuple[str, ...]
    seconds: float | None = None


@dataclass
class PredictionFile:
    """What a file of predictions gave.

    Attributes:
        path: The file; None for rows that come from memory.
        predictions: Usable rows in file order; an id may recur.
        unusable: Number of rows that are none, by reason; a file that breaks off counts once.
        problems: One error for each of those, with row and id.
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
    """Read a file of predictions; what breaks off is read up to there.

    Raises:
        DataError: The file is missing, unreadable or empty, or no row of it can be used.
    """
    found = PredictionFile(path)
    text, damage = read_text(path, hint=_HINT)
    # Damage ends the text, and what ends early is reported once, as that.
    for row, value in _rows(found, text, damage):
        _take(found, row, value)
    _require_rows(found)
    return found


def collect_predictions(rows: Iterable[object]) -> PredictionFile:
    """Collect predictions from rows in memory, in the forms that a file may have.

    Raises:
        DataError: No row can be used.
    """
    found = PredictionFile()
    for row, value in enumerate(rows, start=1):
        _take(found, row, value)
    _require_rows(found)
    return found


def _require_rows(found: PredictionFile) -> None:
    if not found.predictions:
        if not found.problems:
            raise DataError("holds no predictions", path=found.path, hint=_HINT)
        raise DataError(f"no row can be scored; the first problem: {found.problems[0].message}", hint=_HINT)


def _rows(found: PredictionFile, text: str, damage: str | None) -> Iterator[tuple[int, object]]:
    start = text.lstrip()[0]
    if start == "[":
        yield from _list(found, text, damage)
    elif start == "{":
        yield from _lines(found, text, damage)
    else:
        raise DataError("neither a JSON list nor JSON lines", path=found.path, hint=_HINT)


def _list(found: PredictionFile, text: str, damage: str | None) -> Iterator[tuple[int, object]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield from _broken_list(found, text, damage or f"not JSON ({error})")
    else:
        yield from enumerate(rows, 1)


def _broken_list(found: PredictionFile, text: str, why: str) -> Iterator[tuple[int, object]]:
    # Element by element: all before the place where the list breaks can still be scored.
    decoder = json.JSONDecoder()
    position, row = text.index("[") + 1, 0
    while True:
        position = _skip(text, position, " \t\r\n")
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            break
        row += 1
        yield row, value
        position = _skip(text, position, " \t\r\n")
        if not text.startswith(",", position):
            break
        position += 1
    ends = not text[position:].strip() or not text.rstrip().endswith("]")
    if ends and why.startswith("not JSON"):
        why = "truncated JSON"
    found.report(why.split(" (", maxsplit=1)[0], f"{why}: the list breaks off here", row + 1)


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _lines(found: PredictionFile, text: str, damage: str | None) -> Iterator[tuple[int, object]]:
    lines = [(row, line) for row, line in enumerate(text.split("\n"), 1) if line.strip()]
    last = lines[-1][0]
    for row, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if row == last and damage:
                break
            breaks_off = row == last and not text.endswith("\n")
            why = "truncated line" if breaks_off else f"not JSON ({error})"
            found.report(why.split(" (", maxsplit=1)[0], why, row)
            continue
        yield row, value
    if damage:
        found.report(damage.split(" (")[0], f"{damage}: it breaks off here", last)


def _take(found: PredictionFile, row: int, value: object) -> None:
    if not isinstance(value, dict):
        found.report("not an object", "not a JSON object", row)
        return
    record_id = value.get("id")
    if not isinstance(record_id, str) or not record_id:
        found.report("no id", "no id", row)
        return
    key = next((key for key in ("predicted", "program") if value.get(key) is not None), None)
    if key is None:
        found.report("no program", "no program: neither 'predicted' nor 'program' is there", row, record_id)
        return
    program, told = value[key], value.get("seconds")
    seconds = float(told) if isinstance(told, int | float) and 0 <= told <= sys.float_info.max else None
    if isinstance(program, str):
        found.predictions.append(PredictedProgram(row, record_id, tuple(tokenize(program)), seconds))
    elif isinstance(program, list) and all(isinstance(piece, str) for piece in program):
        found.predictions.append(PredictedProgram(row, record_id, tuple(program), seconds))
    else:
        found.report("bad program", f"{key!r} is neither a text nor a list of texts", row, record_id)
