"""The model of a page's table, and what the text of a cell is: a figure, a sign, a mark, a name."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from fintune.errors import DataError

_INVISIBLE = re.compile("[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
_BLANKS = re.compile(r"[^\S\n]+")
_FULL_WIDTH = re.compile("[\uff01-\uff60\uffe0-\uffe6]")
_DASHES = "-\u2010-\u2015\u2212\ufe58\ufe63"
_MONTH = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_CURRENCY = rf"(?:[A-Z]{{0,3}}[$€£¥₹₩]|(?!(?i:{_MONTH})|FY|CY|[QH]\d)[A-Z]{{2,3}}\s|Rs\.?\s?|kr\.?\s?)?"
_UNIT = rf"(?:(?!(?i:{_MONTH}|(?:st|nd|rd|th)\b))[^\W\d_]{{1,10}}\.?)"
_MARK = r"(?:[*\u2020\u2021\u00a7\u00b6#\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+|\((?:[A-Za-z]|\d{1,2})\)|\[\w{1,4}\])"
MARKS = re.compile(rf"(?:[\s,]*{_MARK})+$")
"""Footnote marks at the end of a cell."""
_ONLY_MARKS = re.compile(rf"(?:[\s,)]*{_MARK})+")
_FIGURE = re.compile(
    rf"[~≈<>+]*\s*{_CURRENCY}\s*[{_DASHES}△▲▼+]?\s*{_CURRENCY}\s*[(\[]?\s*{_CURRENCY}\s*[{_DASHES}]?\s*{_CURRENCY}"
    rf"(?:\d[\d.,'\u2019]*(?:\s\d{{3}})*(?:[.,]\d+)?|[.,]\d+)(?:\s*[%‰]|\s*{_UNIT})?"
    rf"(?:\s*[)\]]\s*(?:{_UNIT}|[)%‰]*))?\s*[{_DASHES}]?\s*[$€£¥₹₩]?\s*[)%]*"
)
YEAR = r"(?:19|20)\d\d"
_SOFT = re.compile(
    rf"{YEAR}[A-Za-z]?(?:\s*%|\s+[^\W\d_]+)?|\d+\s*(?:year|yr|month|week|day|quarter)s?|\d{{1,4}}[./-]\d{{1,2}}[./-]\d{{1,4}}"
    rf"|[\d.,]+%?\s*(?:[{_DASHES}/]|to)\s*[\d.,]+%?",
    re.IGNORECASE,
)
"""What may be a name or a value: years, dates, periods and ranges."""
_NOTHING = re.compile(rf"[($€£¥\s]*(?:[{_DASHES}]+|n/?a|n\.a\.|n/?m|n\.m\.|nil|none)[)%\s]*(?:{_MARK})?", re.IGNORECASE)
_EMPTY = re.compile("")
_SIGN = re.compile(r"[\s$€£¥₹₩%‰()\[\]*\u2020\u2021+]+|[A-Z]{1,3}[$€£¥]|[(\s]*[$€£¥]?[-\u2212]?\(?")
OPENS = re.compile(r"[$€£¥₹₩(\[]|^[A-Z]{1,3}$")
CORNER = re.compile(
    rf"\b(?:in|ended|ending|as of|at|fiscal|years?|quarters?|months?|weeks?|period|dates?|unaudited)\b"
    rf"|\b(?:{_MONTH})[a-z]*\b"
    r"|\b(?:thousand|million|billion)s?\b|[$€£¥]",
    re.IGNORECASE,
)
_SCALES = r"thousands?|millions?|billions?|trillions?|crores?|lakhs?|hundreds|mio\.?|mrd\.?|tsd\.?|tausend|mn|bn|m|k"
UNITS = re.compile(
    rf"\(?\b(?:[a-z]+\s){{0,2}}(?:in|\$\s*in)\s+(?:[\w.]*[$€£¥₹]|[a-z.]+\s){{0,12}}(?:{_SCALES})\b"
    r"(?:,?\s(?:except|unless|other than|and)[^.;()\n]*)?[).:]?"
    rf"|\(?(?:(?:US|HK|C|A|S)?[$€£¥₹]|\b(?:USD|EUR|GBP|CHF|JPY|INR|RMB|CNY|T)\s?[$€£¥]?)\s?(?:['\u2019]?000s?|{_SCALES})\b\)?",
    re.IGNORECASE,
)
"""A unit that scales the numbers of a table."""


@dataclass(frozen=True, eq=False)
class GridCell:
    """A cell that is not empty; it covers the columns from ``start`` to before ``end``. Parts are lines."""

    start: int
    end: int
    text: str


END = GridCell(2**31, 2**31, "")
"""A place after all columns."""


@dataclass(frozen=True)
class Grid:
    """A table as it is laid out.

    Attributes:
        rows: The cells of every row that is not empty; a cell over several rows is the same object in each.
        marks: Raised footnote marks that were left out.
        numbers: The row numbers of ``rows`` for messages; if empty, they are counted from 1.
    """

    rows: tuple[tuple[GridCell, ...], ...] = ()
    marks: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class NamedTable:
    """A table with one row of names.

    Attributes:
        rows: Rows of equal length, the names of the columns first. The first cell is the name of the row.
        numbers: The row of the file's table from which each row comes, counted from 1.
        titles: Texts over all columns, above the header.
        footers: Texts over all columns, below the last figures.
        notes: What was decided or left out, one line each.
    """

    rows: list[list[str]]
    numbers: list[int]
    titles: list[str] = field(default_factory=list)
    footers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def clean_text(text: str) -> str:
    """Return a text without invisible characters, with plain blanks, and with full-width digits and signs as ASCII."""
    if text.isascii():
        return " ".join(text.split())
    plain = _FULL_WIDTH.sub(lambda match: unicodedata.normalize("NFKC", match[0]), _INVISIBLE.sub("", text))
    return " ".join(plain.split())


@lru_cache(100_000)
def kind_of(text: str) -> str:
    """Return what a cell holds: "figure", "soft" (a year, a period), "nothing", "mark", "sign", "text", or ""."""
    if len(text) > LONGEST_VALUE:
        return "text"
    for kind, pattern in (("", _EMPTY), ("nothing", _NOTHING), ("mark", _ONLY_MARKS), ("sign", _SIGN)):
        if pattern.fullmatch(text):
            return kind
    bare = MARKS.sub("", text) or text
    if not any(map(str.isdigit, bare)):
        return "text"
    if _SOFT.fullmatch(bare):
        return "soft"
    return "figure" if _FIGURE.fullmatch(bare) else "text"


LONGEST_VALUE = 60
"""Letters of the longest text that can be a value."""
_MAX_PLACES = 5_000_000
"""Rows times columns of a table."""
VALUES = frozenset(("figure", "soft", "nothing", "mark"))


def opens(text: str) -> bool:
    """Whether a sign is before its number."""
    return kind_of(text) == "sign" and bool(OPENS.search(text)) and not re.search(r"[)\]]", text)


def num_figures(grid: Grid) -> int:
    """Count the cells with figures, years and periods outside of names. A table of one row has none."""
    if len(grid.rows) < 2:
        return 0
    first = min((row[0].start for row in grid.rows), default=0)
    return sum(cell.start > first and kind_of(cell.text) in ("figure", "soft") for row in grid.rows for cell in row)


def listed(texts: Iterable[str], most: int = 6) -> str:
    """Return the different texts in one line; many are counted."""
    kinds = list(Counter(texts))
    return ", ".join(kinds[:most]) + (f" and {len(kinds) - most} more" if len(kinds) > most else "")


NumberedRow = tuple[int, tuple[GridCell, ...]]
"""The number of a row for messages, and its cells."""


def without_footers(grid: Grid) -> tuple[Grid, list[str]]:
    """Take the last rows that are one text over all columns: they are no part of the table."""
    width = max((row[-1].start for row in grid.rows if len(row) > 1), default=0)
    num = len(grid.rows)
    while num and len(grid.rows[num - 1]) == 1 and 0 < width < grid.rows[num - 1][0].end:
        num -= 1
    footers = [line for row in grid.rows[num:] for line in row[0].text.split("\n")]
    return replace(grid, rows=grid.rows[:num], numbers=grid.numbers[:num]), footers


def split_lines(grid: Grid, path: Path) -> list[NumberedRow]:
    """Make rows of the lines of a row's cells if all cells have equally many; else the lines are one text."""
    rows: list[NumberedRow] = []
    made: dict[tuple[GridCell, str], GridCell] = {}

    def with_text(cell: GridCell, text: str) -> GridCell:
        return made.setdefault((cell, text), cell if cell.text == text else GridCell(cell.start, cell.end, text))

    first = min((row[0].start for row in grid.rows), default=0)
    for number, row in zip(grid.numbers or range(1, len(grid.rows) + 1), grid.rows, strict=True):
        lines = [cell.text.split("\n") for cell in row]
        values = [[kind_of(line) for line in cell] for cell in lines]
        several = [
            k for k, kinds in enumerate(values) if row[k].start > first and sum(kind == "figure" for kind in kinds) > 1
        ]
        if not several:
            rows.append(
                (number, tuple(with_text(cell, " ".join(parts)) for cell, parts in zip(row, lines, strict=True)))
            )
        elif len({len(cell) for cell in lines}) == 1:
            for part in zip(*lines, strict=True):
                rows.append((number, tuple(with_text(cell, text) for cell, text in zip(row, part, strict=True))))
        else:
            problem = f"row {number} ({' '.join(lines[0])}), column {row[several[0]].start + 1}: "
            problem += f"{' / '.join(lines[several[0]])} are several numbers in one cell"
            raise DataError(problem, path=path, hint="give each number a row or a column of its own")
    return rows


def compressed(rows: Sequence[NumberedRow], path: Path) -> list[NumberedRow]:
    """Number the columns by the places at which a cell begins or ends, so that wide spans cost nothing."""
    bounds = sorted({bound for _, row in rows for cell in row for bound in (cell.start, cell.end)})
    if len(rows) * len(bounds) > _MAX_PLACES:
        problem = f"a table of {len(rows)} rows and {len(bounds) - 1} columns has more than {_MAX_PLACES} places"
        raise DataError(problem, path=path, hint="keep the part that the question is about")
    at = {bound: k for k, bound in enumerate(bounds)}
    new: dict[GridCell, GridCell] = {}
    for _, row in rows:
        for cell in row:
            if cell not in new:
                new[cell] = GridCell(at[cell.start], at[cell.end], cell.text)
    return [(number, tuple(new[cell] for cell in row)) for number, row in rows]
