"""The numbers of a table as FinQA writes them: 1250.5, a loss -5.2 ( 5.2 ), one scale.

A number decides for its column if it can be read in one way only: ``1.250,5`` and ``1.250.000`` have a decimal comma,
``1,250.5`` and ``1,250,000`` a point. ``12,5`` and ``12.5`` decide for their own column. ``1,250`` and ``1.250`` can be
read in two ways. They follow their column, then their table. In a table without any sign, 1,250 is 1250 as in English,
unless semicolons separate the cells. What is still open raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Literal, TypeAlias

from fintune.data.page_table import LONGEST_VALUE, MARKS, NamedTable, kind_of, listed
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
_NOTE_COLUMN = re.compile(r"notes?\b.{0,12}", re.IGNORECASE)
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
    page: NamedTable,
    texts: Sequence[str],
    *,
    path: Path,
    semicolons: bool = False,
    comma_separated: bool = False,
    mark: Mark | None = None,
) -> tuple[list[list[str]], list[str]]:
    """Return a table and the text around it with decimal points.

    Args:
        page: The table. First cells are names and do not change.
        texts: Texts of the page.
        path: The file, for messages.
        semicolons: Whether semicolons separated the cells.
        comma_separated: Whether commas separated the cells.
        mark: The decimal separator, if it is known.

    Raises:
        DataError: A number can be read in two ways, and nothing decides which.
    """
    table = [[row[0], *map(_close_groups, row[1:])] for row in page.rows]
    lists = {k for k, name in enumerate(table[0]) if _NOTE_COLUMN.fullmatch(name)}
    numbers = [number for row, cells in enumerate(table) for number in _numbers_in_row(row, cells)]
    numbers = [number for number in numbers if number.column not in lists]
    columns = sorted({number.column for number in numbers})
    if mark is not None:
        marks: dict[int, Mark] = dict.fromkeys(columns, mark)
    else:
        defaults = _table_marks(numbers, semicolons, comma_separated)
        marks = {column: _column_mark(column, numbers, defaults, page, path) for column in columns}

    def rewrite(column: int, cell: str) -> str:
        if column in lists:
            return cell
        return _replace_commas(cell) if marks.get(column) == "comma" else _join_groups(cell)

    rows = [[rewrite(column, cell) for column, cell in enumerate(row)] for row in table]
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
    # Nobody writes 1,250 % for 1250 %, unless in a column of changes beside many other numbers.
    num_plain = sum(not number.is_percent for number in numbers)
    if len(signs) == 2 or (num_plain < 3 and any(number.is_percent for number in numbers)):
        return {".": None, ",": None}
    return {".": "point" if comma_separated else None, ",": None if semicolons else "point"}


def _column_mark(
    column: int,
    numbers: Sequence[_Number],
    defaults: dict[str, Mark | None],
    page: NamedTable,
    path: Path,
) -> Mark:
    in_column = [number for number in numbers if number.column == column]
    first = next((number for number in in_column if number.mark is not None), None)
    if first is not None and first.mark is not None:
        other = next((number for number in in_column if number.mark not in (None, first.mark)), None)
        if other is not None:
            problem = f"{other.text} contradicts {first.text} in row {page.numbers[first.row]}"
            problem = f"{location(page, other.row, other.column)}: {problem}"
            raise DataError(problem, path=path, hint=_HINT)
        return first.mark
    marks = [defaults["." if "." in number.text else ","] for number in in_column]
    for number, mark in zip(in_column, marks, strict=True):
        if mark is None:
            whole, decimals = re.split("[.,]", number.text)
            problem = f"{number.text} can be {whole}{decimals} or {whole}.{decimals}"
            problem = f"{location(page, number.row, number.column)}: {problem}"
            raise DataError(problem, path=path, hint=_HINT)
    assert marks[0] is not None, "checked above"
    return marks[0]


def location(page: NamedTable, row: int, column: int) -> str:
    """Return a cell's row and column in words, counted from 1, with their names."""
    name, above = page.rows[row][0], page.rows[0][column] if row else ""
    words = f"row {page.numbers[row]}" + (f" ({name})" if name else "")
    return f"{words}, column {column + 1}" + (f" ({above})" if above else "")


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


_CURRENCY = r"(?:[A-Z]{0,3}[$€£¥₹₩]|[A-Z]{2,3}(?=[\s(])|Rs\.?)?"
_DIGITS = r"(?:\d[\d,]*\.?\d*|\.\d+)"
_UNIT = r"(?:%|‰|[^\W\d_]{1,12}\.?)?"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:,\d{3})*(?!\d))")
_BRACKETED = re.compile(
    rf"({_CURRENCY})\s*\(\s*({_CURRENCY})\s*-?\s*({_DIGITS})(\s*{_UNIT})\s*\)?\s*\)?(\s*{_UNIT})\s*\$?\s*\)?"
)
_TRAILING_MINUS = re.compile(rf"({_CURRENCY})\s*({_DIGITS})\s*({_UNIT})\s*-")
# Dashes and triangles that mean a minus before a number, but not between two numbers.
_DASH = re.compile(
    r"(?<![\w.%)\]])(?<![\w.%)\]]\s)[\u2010-\u2015\u2212\ufe58\ufe63△▲▼](?=\s?[A-Z]{0,3}[$€£¥₹₩]?\s?\.?\d)"
)
_MINUS = re.compile(r"([A-Z]{0,3}[$€£¥₹₩])?(\s*)-\s*([A-Z]{0,3}[$€£¥₹₩]?)\s*(?=\.?\d)")
_UNREAD = re.compile(r"\b(?:[DC][Rr]|[SH])\.?$|^<.*>$|^\[.*\]$|^(?:minus|neg)|^[^(]*\)", re.IGNORECASE)
_SCALED = re.compile(r"(\D*?)(\d+(?:\.\d+)?|\.\d+)(\s*)(K|k|MM|M|m|mn|B|bn|T|million|billion|Mio\.?|Mrd\.?)")
_POWERS = {"k": 3, "m": 6, "mm": 6, "mn": 6, "million": 6, "mio": 6, "b": 9, "bn": 9, "billion": 9, "mrd": 9, "t": 12}


def signed_table(page: NamedTable, path: Path) -> NamedTable:
    """Write every loss with a minus and all numbers in one scale; leave out footnote marks after numbers.

    Raises:
        DataError: Triangles up and down are in one table, so that one up can be a loss or a gain.
    """
    rows = [list(row) for row in page.rows]
    notes = list(page.notes)
    marks: list[str] = []
    unread: list[str] = []
    up = next(((r, c) for r, row in enumerate(rows) for c, cell in enumerate(row) if c and "▲" in cell), None)
    if up and any("▼" in cell for row in rows for cell in row[1:]):
        problem = f"{location(page, *up)}: ▲ can be a gain or a loss, because there is a ▼, too"
        raise DataError(problem, path=path, hint="write the losses with a minus")
    for r, row in enumerate(rows[1:], start=1):
        for c, cell in enumerate(row[1:], start=1):
            if len(cell) > LONGEST_VALUE or not any(map(str.isdigit, cell)):
                continue
            bare = MARKS.sub("", cell).strip()
            if bare and bare != cell and kind_of(bare) in ("figure", "soft"):
                marks.append(cell[len(bare) :].strip())
            else:
                bare = cell
            row[c] = signed_number(bare)
            if _UNREAD.search(row[c]) and kind_of(row[c]) == "figure":
                unread.append(f"{location(page, r, c)}: {cell}")
    if marks:
        notes.append(f"footnote marks were left out: {listed(marks)}")
    if unread:
        more = f" (and {len(unread) - 1} more cells)" if len(unread) > 1 else ""
        notes.append(f"{unread[0]} has a sign that was not read{more}")
    _unify_scales(rows, page, notes)
    return replace(page, rows=rows, notes=notes)


def signed_number(cell: str) -> str:
    """Return a cell's number with a minus if it is a loss: in brackets, after a dash or triangle, before a dash."""
    text = _THOUSANDS.sub("", _DASH.sub("-", cell.replace("\u2212", "-")).strip())
    text = re.sub(r"(?<=\d)(\s?)[\u2010-\u2015]$", r"\1-", text)
    if loss := _BRACKETED.fullmatch(text):
        before, inside, number, unit, after = loss.groups()
        currency, unit = before or inside, unit.rstrip() or f" {after.strip()}"
        if unit.strip() in ("", "%"):
            unit = unit.strip()
            return f"{currency}-{number}{unit} ( {currency}{number}{unit} )"
        return f"{currency}-{number}{unit}"
    if loss := _TRAILING_MINUS.fullmatch(text):
        return f"{loss[1]}-{loss[2]}{loss[3]}"
    return (
        _MINUS.sub(lambda match: f"{match[1] or ''}{match[2]}-{match[3]}", text, count=1)
        if _MINUS.match(text)
        else text
    )


def _unify_scales(rows: list[list[str]], page: NamedTable, notes: list[str]) -> None:
    """Write $1.2B as $1200M in a table that has $980M."""
    found = {
        (r, c): match
        for r, row in enumerate(rows[1:], start=1)
        for c, cell in enumerate(row[1:], start=1)
        if (match := _SCALED.fullmatch(cell))
    }
    if {"M", "MM"} <= {match[4] for match in found.values()}:
        notes.append("M can be thousands or millions, because there is MM, too: the numbers were left as they are")
        return
    powers = {place: _POWERS[match[4].lower().rstrip(".")] for place, match in found.items()}
    if len(set(powers.values())) < 2:
        return
    place = min(powers, key=powers.__getitem__)
    least, name = powers[place], found[place][4]
    for (r, c), match in found.items():
        number = Decimal(match[2]).scaleb(powers[r, c] - least)
        rows[r][c] = f"{match[1]}{number:f}{match[3]}{name}"
    notes.append(f"numbers of several scales were written in {name}, as in {location(page, *place)}")
