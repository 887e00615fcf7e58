"""Detect numbers with a decimal comma (1.250,5) in a table, and write them with a decimal point (1250.5).

A number decides for its column if it can be read in one way only: ``1.250,5`` and ``1.250.000`` have a comma,
``1,250.5`` and ``1,250,000`` a point. ``12,5`` and ``12.5`` decide for their own column. ``1,250`` and ``1.250`` can be
read in two ways. They follow their column, then their table. In a table without any sign, 1,250 is 1250 as in English,
unless semicolons separate the cells. What is still open raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from fintune.errors import DataError

Mark: TypeAlias = Literal["point", "comma"]
"""The decimal separator."""
Strength: TypeAlias = Literal["sure", "likely"]

_TOKEN = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*(?!\w|[.,]\d)(?:\s?%)?|(?<![\w.,])\d+(?:[.,]\d+)+(?!\d)")
_SURE_COMMA = re.compile(r"\d{1,3}(?:\.\d{3})+,\d+|[1-9]\d{0,2}(?:\.\d{3}){2,}")
_SURE_POINT = re.compile(r"\d{1,3}(?:,\d{3})+\.\d+|[1-9]\d{0,2}(?:,\d{3}){2,}|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?")
_EITHER = re.compile(r"[1-9]\d{0,2}[.,]\d{3}")
_LIKELY = re.compile(r"\d+[.,]\d+")
_MONTH = re.compile(r"(?:0?[1-9]|1[0-2])\.(?:19|20)\d\d")
_SPACED = re.compile(r"(\D*)(?<![^\W\d_])(\d{1,3}(?:[ '\u2019]\d{3})+)((?:[.,]\d+)?)(\D*)")
_HINT = "name the decimal separator: --decimal comma or --decimal point"


@dataclass(frozen=True)
class _Number:
    """A number of a table."""

    row: int
    column: int
    text: str
    mark: Mark | None
    strength: Strength | None
    is_percent: bool


def with_points(
    table: Sequence[Sequence[str]],
    texts: Sequence[str],
    *,
    path: Path,
    semicolons: bool = False,
    comma_separated: bool = False,
    mark: Mark | None = None,
) -> tuple[list[list[str]], list[str]]:
    """Return a table and the text around it with decimal points.

    Args:
        table: Rows of cells, the header first. First cells are names and do not change.
        texts: Texts of the page.
        path: The file, for messages.
        semicolons: Whether semicolons separated the cells.
        comma_separated: Whether commas separated the cells.
        mark: The decimal separator, if it is known.

    Raises:
        DataError: A number can be read in two ways, and nothing decides which.
    """
    table = [[row[0], *map(_close_groups, row[1:])] if row else [] for row in table]
    numbers = [number for row, cells in enumerate(table) for number in _numbers_in_row(row, cells)]
    columns = sorted({number.column for number in numbers})
    if mark is not None:
        marks: dict[int, Mark] = dict.fromkeys(columns, mark)
    else:
        defaults = _table_marks(numbers, semicolons, comma_separated)
        marks = {column: _column_mark(column, numbers, defaults, table, path) for column in columns}
    rows = [
        [_replace_commas(cell) if marks.get(k) == "comma" else _join_groups(cell) for k, cell in enumerate(r)]
        for r in table
    ]
    for row, before in zip(rows, table, strict=True):
        row[:1] = before[:1]
    in_table = set(marks.values())
    return rows, [_point_text(text, mark or ("comma" if in_table == {"comma"} else None)) for text in texts]


def _numbers_in_row(row: int, cells: Sequence[str]) -> list[_Number]:
    numbers = []
    for column, cell in enumerate(cells[1:], start=1):
        if row == 0 and any(map(str.isalpha, cell)):
            continue  # the name of a column
        for token in _TOKEN.finditer(cell):
            text = token[0].rstrip("% \u00a0")
            is_percent = "%" in cell
            mark, strength = _own_mark(text, is_percent=is_percent)
            if mark is not None or _EITHER.fullmatch(text):
                numbers.append(_Number(row, column, text, mark, strength, is_percent))
    return numbers


def _own_mark(text: str, *, is_percent: bool = False) -> tuple[Mark | None, Strength | None]:
    """Return the decimal separator that a number itself shows, and how sure it is."""
    if _SURE_COMMA.fullmatch(text):
        return "comma", "sure"
    if _SURE_POINT.fullmatch(text):
        return "point", "sure"
    if _EITHER.fullmatch(text):
        # 1.250 % is a rate: nobody writes 1250 % with a group of thousands.
        return ("point", "likely") if is_percent and "." in text else (None, None)
    if _LIKELY.fullmatch(text) and not _MONTH.fullmatch(text):
        return ("comma" if "," in text else "point"), "likely"
    return None, None


def _table_marks(numbers: Sequence[_Number], semicolons: bool, comma_separated: bool) -> dict[str, Mark | None]:
    """Return how numbers with a point, and those with a comma, are read if their column does not decide it."""
    sure = {number.mark for number in numbers if number.strength == "sure"}
    if semicolons:
        sure |= {number.mark for number in numbers if number.mark == "comma"}
    likely = {number.mark for number in numbers if number.strength == "likely"}
    if len(sure) == 1:
        mark = sure.pop()
        return {".": mark, ",": mark}
    if sure or likely >= {"comma", "point"} or likely == {"comma"}:
        return {".": None, ",": None}
    if likely == {"point"}:
        return {".": "point", ",": "point"}
    signs = {sign for number in numbers for sign in ".," if sign in number.text}
    if len(signs) == 2 or any(number.is_percent for number in numbers):  # nobody writes 1,250 % for 1250 %
        return {".": None, ",": None}
    return {".": "point" if comma_separated else None, ",": None if semicolons else "point"}


def _column_mark(
    column: int,
    numbers: Sequence[_Number],
    defaults: dict[str, Mark | None],
    table: Sequence[Sequence[str]],
    path: Path,
) -> Mark:
    in_column = [number for number in numbers if number.column == column]
    first = next((number for number in in_column if number.mark is not None), None)
    if first is not None and first.mark is not None:
        other = next((number for number in in_column if number.mark not in (None, first.mark)), None)
        if other is not None:
            problem = f"{_location(other, table)}: {other.text} contradicts {first.text} in row {first.row + 1}"
            raise DataError(problem, path=path, hint=_HINT)
        return first.mark
    marks = [defaults["." if "." in number.text else ","] for number in in_column]
    for number, mark in zip(in_column, marks, strict=True):
        if mark is None:
            whole, decimals = re.split("[.,]", number.text)
            problem = f"{_location(number, table)}: {number.text} can be {whole}{decimals} or {whole}.{decimals}"
            raise DataError(problem, path=path, hint=_HINT)
    assert marks[0] is not None, "checked above"
    return marks[0]


def _location(number: _Number, table: Sequence[Sequence[str]]) -> str:
    name = table[0][number.column] if number.row and number.column < len(table[0]) else ""
    row = f"row {number.row + 1}" + (f" ({table[number.row][0]})" if table[number.row][0] else "")
    return f"{row}, column {number.column + 1}" + (f" ({name})" if name else "")


def _close_groups(cell: str) -> str:
    """Write 1 250,5 and 1'250.5 as 1250,5 and 1250.5, if the cell has nothing else."""
    match = _SPACED.fullmatch(cell)
    return cell if match is None else match[1] + re.sub(r"\D", "", match[2]) + match[3] + match[4]


def _replace_commas(text: str) -> str:
    return _TOKEN.sub(lambda match: _with_point(match[0]), text)


def _with_point(token: str) -> str:
    number = token.rstrip("% \u00a0")
    if not (
        _SURE_COMMA.fullmatch(number) or _EITHER.fullmatch(number) or ("," in number and _LIKELY.fullmatch(number))
    ):
        return token
    return number.replace(".", "").replace(",", ".") + token[len(number) :]


def _join_groups(text: str) -> str:
    """Remove the commas of English and Indian groups of digits."""
    return _TOKEN.sub(lambda match: match[0].replace(",", "") if _own_mark(match[0])[0] == "point" else match[0], text)


def _point_text(text: str, mark: Mark | None) -> str:
    tokens = [match[0].rstrip("% \u00a0") for match in _TOKEN.finditer(text)]
    sure = {_own_mark(token)[0] for token in tokens if _own_mark(token)[1] == "sure"}
    if mark == "comma" or (mark is None and sure == {"comma"}):
        return _replace_commas(text)
    return _TOKEN.sub(lambda match: _with_point(match[0]) if _SURE_COMMA.fullmatch(match[0]) else match[0], text)
