"""Numbers written as 1.250,5 told from those written as 1,250.5, and written with a decimal point.

One number decides where it can be read in one way only: ``1.250,5`` and ``1.250.000`` for the comma, ``1,250.5`` and
``1,250,000`` for the point, ``12,5`` and ``12.5`` for their own column. ``1,250`` and ``1.250`` could be either; they
go by their column, then by the table: one without any sign writes 1,250 for 1250, as in English, unless it is separated
by semicolons. What stays open is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from fintune.errors import DataError

Mark: TypeAlias = Literal["point", "comma"]
"""What stands before the decimals."""
Strength: TypeAlias = Literal["sure", "likely"]

_TOKEN = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*(?!\w|[.,]\d)(?:\s?%)?|(?<![\w.,])\d+(?:[.,]\d+)+(?!\d)")
_SURE_COMMA = re.compile(r"\d{1,3}(?:\.\d{3})+,\d+|[1-9]\d{0,2}(?:\.\d{3}){2,}")
_SURE_POINT = re.compile(r"\d{1,3}(?:,\d{3})+\.\d+|[1-9]\d{0,2}(?:,\d{3}){2,}|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?")
_EITHER = re.compile(r"[1-9]\d{0,2}[.,]\d{3}")
_LIKELY = re.compile(r"\d+[.,]\d+")
_MONTH = re.compile(r"(?:0?[1-9]|1[0-2])\.(?:19|20)\d\d")
_SPACED = re.compile(r"(\D*)(?<![^\W\d_])(\d{1,3}(?:[ '\u2019]\d{3})+)((?:[.,]\d+)?)(\D*)")
_HINT = "say what stands before its decimals: --decimal comma or --decimal point"


@dataclass(frozen=True)
class _Seen:
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
    """A table and the text around it, their numbers with a decimal point where they had a comma.

    Args:
        table: Rows of cells, the header first; first cells are names and stay.
        texts: Text of the page.
        path: For messages.
        semicolons: Whether the cells were separated by semicolons, as where the comma is taken.
        comma_separated: Whether the cells were separated by commas.
        mark: What stands before the decimals, where it is known.

    Raises:
        DataError: A number could be read in two ways, and nothing says which.
    """
    table = [[row[0], *map(_closed_up, row[1:])] if row else [] for row in table]
    seen = [each for row, cells in enumerate(table) for each in _of_row(row, cells)]
    columns = sorted({each.column for each in seen})
    if mark is not None:
        marks: dict[int, Mark] = dict.fromkeys(columns, mark)
    else:
        of_all = _of_table(seen, semicolons, comma_separated)
        marks = {each: _of_column(each, seen, of_all, table, path) for each in columns}
    rows = [[_pointed(cell) if marks.get(k) == "comma" else _joined(cell) for k, cell in enumerate(r)] for r in table]
    for row, before in zip(rows, table, strict=True):
        row[:1] = before[:1]
    in_table = set(marks.values())
    return rows, [_text(each, mark or ("comma" if in_table == {"comma"} else None)) for each in texts]


def _of_row(row: int, cells: Sequence[str]) -> list[_Seen]:
    found = []
    for column, cell in enumerate(cells[1:], start=1):
        if row == 0 and any(map(str.isalpha, cell)):
            continue  # the name of a column
        for token in _TOKEN.finditer(cell):
            text = token[0].rstrip("% \u00a0")
            is_percent = "%" in cell
            mark, strength = _told(text, is_percent=is_percent)
            if mark is not None or _EITHER.fullmatch(text):
                found.append(_Seen(row, column, text, mark, strength, is_percent))
    return found


def _told(text: str, *, is_percent: bool = False) -> tuple[Mark | None, Strength | None]:
    """What a number says about itself."""
    if _SURE_COMMA.fullmatch(text):
        return "comma", "sure"
    if _SURE_POINT.fullmatch(text):
        return "point", "sure"
    if _EITHER.fullmatch(text):
        # 1.250 % is a rate; twelve times a hundred percent is hardly written with a group of thousands.
        return ("point", "likely") if is_percent and "." in text else (None, None)
    if _LIKELY.fullmatch(text) and not _MONTH.fullmatch(text):
        return ("comma" if "," in text else "point"), "likely"
    return None, None


def _of_table(seen: Sequence[_Seen], semicolons: bool, comma_separated: bool) -> dict[str, Mark | None]:
    """How numbers with a point, and those with a comma, are read where their column does not say it."""
    sure = {each.mark for each in seen if each.strength == "sure"}
    if semicolons:
        sure |= {each.mark for each in seen if each.mark == "comma"}
    likely = {each.mark for each in seen if each.strength == "likely"}
    if len(sure) == 1:
        mark = sure.pop()
        return {".": mark, ",": mark}
    if sure or likely >= {"comma", "point"} or likely == {"comma"}:
        return {".": None, ",": None}
    if likely == {"point"}:
        return {".": "point", ",": "point"}
    signs = {sign for each in seen for sign in ".," if sign in each.text}
    if len(signs) == 2 or any(each.is_percent for each in seen):  # 1,250 % is hardly twelve times a hundred percent
        return {".": None, ",": None}
    return {".": "point" if comma_separated else None, ",": None if semicolons else "point"}


def _of_column(
    column: int, seen: Sequence[_Seen], of_all: dict[str, Mark | None], table: Sequence[Sequence[str]], path: Path
) -> Mark:
    here = [each for each in seen if each.column == column]
    own = [each for each in here if each.mark is not None]
    if own:
        other = next((each for each in own if each.mark != own[0].mark), None)
        if other is not None:
            first = own[0]
            problem = f"{_place(other, table)}: {other.text} contradicts {first.text} in row {first.row + 1}"
            raise DataError(problem, path=path, hint=_HINT)
        assert own[0].mark is not None, "they were chosen by it"
        return own[0].mark
    for each in here:
        mark = of_all["." if "." in each.text else ","]
        if mark is None:
            whole, decimals = re.split("[.,]", each.text)
            problem = f"{_place(each, table)}: {each.text} can be {whole}{decimals} or {whole}.{decimals}"
            raise DataError(problem, path=path, hint=_HINT)
    found = of_all["." if "." in here[0].text else ","]
    assert found is not None, "looked at above"
    return found


def _place(seen: _Seen, table: Sequence[Sequence[str]]) -> str:
    name = table[0][seen.column] if seen.row and seen.column < len(table[0]) else ""
    row = f"row {seen.row + 1}" + (f" ({table[seen.row][0]})" if table[seen.row][0] else "")
    return f"{row}, column {seen.column + 1}" + (f" ({name})" if name else "")


def _closed_up(cell: str) -> str:
    """1 250,5 and 1'250.5 as 1250,5 and 1250.5, where the cell holds nothing else."""
    found = _SPACED.fullmatch(cell)
    return cell if found is None else found[1] + re.sub(r"\D", "", found[2]) + found[3] + found[4]


def _pointed(text: str) -> str:
    return _TOKEN.sub(lambda found: _with_point(found[0]), text)


def _with_point(token: str) -> str:
    number = token.rstrip("% \u00a0")
    if not (
        _SURE_COMMA.fullmatch(number) or _EITHER.fullmatch(number) or ("," in number and _LIKELY.fullmatch(number))
    ):
        return token
    return number.replace(".", "").replace(",", ".") + token[len(number) :]


def _joined(text: str) -> str:
    """Groups of English and of Indian numbers put together."""
    return _TOKEN.sub(lambda found: found[0].replace(",", "") if _told(found[0])[0] == "point" else found[0], text)


def _text(text: str, mark: Mark | None) -> str:
    tokens = [found[0].rstrip("% \u00a0") for found in _TOKEN.finditer(text)]
    sure = {_told(token)[0] for token in tokens if _told(token)[1] == "sure"}
    if mark == "comma" or (mark is None and sure == {"comma"}):
        return _pointed(text)
    return _TOKEN.sub(lambda found: _with_point(found[0]) if _SURE_COMMA.fullmatch(found[0]) else found[0], text)
