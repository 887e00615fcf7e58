"""One model of a table: cells with the columns that they span become rows under named columns.

The rows before the first row of figures are the header. A column's name is all header texts above it, from top to
bottom. A sign, a unit or a bracket in a cell of its own belongs to the number under the same header. What cannot be
decided raises an error with row and column, or is a note.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
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
_YEAR = r"(?:19|20)\d\d"
_SOFT = re.compile(
    rf"{_YEAR}[A-Za-z]?(?:\s*%|\s+[^\W\d_]+)?|\d+\s*(?:year|yr|month|week|day|quarter)s?|\d{{1,4}}[./-]\d{{1,2}}[./-]\d{{1,4}}"
    rf"|[\d.,]+%?\s*(?:[{_DASHES}/]|to)\s*[\d.,]+%?",
    re.IGNORECASE,
)
"""What may be a name or a value: years, dates, periods and ranges."""
_NOTHING = re.compile(rf"[($€£¥\s]*(?:[{_DASHES}]+|n/?a|n\.a\.|n/?m|n\.m\.|nil|none)[)%\s]*(?:{_MARK})?", re.IGNORECASE)
_EMPTY = re.compile("")
_SIGN = re.compile(r"[\s$€£¥₹₩%‰()\[\]*\u2020\u2021+]+|[A-Z]{1,3}[$€£¥]|[(\s]*[$€£¥]?[-\u2212]?\(?")
_OPENS = re.compile(r"[$€£¥₹₩(\[]|^[A-Z]{1,3}$")
_CORNER = re.compile(
    rf"\b(?:in|ended|ending|as of|at|fiscal|years?|quarters?|months?|weeks?|period|dates?|unaudited|{_MONTH})\b"
    r"|\b(?:thousand|million|billion)s?\b|[$€£¥]",
    re.IGNORECASE,
)
_SCALES = r"thousands?|millions?|billions?|trillions?|crores?|lakhs?|hundreds|mio\.?|mrd\.?|tsd\.?|tausend|mn|bn|m|k"
UNITS = re.compile(
    rf"\(?\b(?:[a-z]+\s){{0,2}}(?:in|\$\s*in)\s+(?:[\w.]*\s?[$€£¥₹]|[a-z.]+\s(?:of\s)?)*(?:{_SCALES})\b"
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


def kind_of(text: str) -> str:
    """Return what a cell holds: "figure", "soft" (a year, a period), "nothing", "mark", "sign", "text", or ""."""
    for kind, pattern in (("", _EMPTY), ("nothing", _NOTHING), ("mark", _ONLY_MARKS), ("sign", _SIGN)):
        if pattern.fullmatch(text):
            return kind
    bare = MARKS.sub("", text) or text
    if not any(map(str.isdigit, bare)):
        return "text"
    if _SOFT.fullmatch(bare):
        return "soft"
    return "figure" if len(bare) < 60 and _FIGURE.fullmatch(bare) else "text"


_MAX_PLACES = 5_000_000
_VALUES = frozenset(("figure", "soft", "nothing", "mark"))


def _opens(text: str) -> bool:
    """Whether a sign is before its number."""
    return kind_of(text) == "sign" and bool(_OPENS.search(text)) and not re.search(r"[)\]]", text)


def num_figures(grid: Grid) -> int:
    """Count the cells with figures, years and periods outside of names. A table of one row has none."""
    if len(grid.rows) < 2:
        return 0
    first = min((row[0].start for row in grid.rows), default=0)
    return sum(cell.start > first and kind_of(cell.text) in ("figure", "soft") for row in grid.rows for cell in row)


def read_grid(grid: Grid, path: Path) -> NamedTable:
    """Find the names of rows and columns, and join the cells of every number.

    Raises:
        DataError: A cell holds several numbers, or a number is under several names.
    """
    notes: list[str] = []
    grid, footers = _without_footers(grid)
    rows = _compressed(_split_lines(grid, path), path)
    tables = [table for part in _parts(rows) for table in _read_part(part, path, notes)]
    keys = [_column_keys(table.rows[0][1:]) for table in tables]
    united_keys = list(dict.fromkeys(itertools.chain.from_iterable(keys)))
    place = {key: k for k, key in enumerate(united_keys, start=1)}
    if any(table_keys != united_keys for table_keys in keys):
        notes.append("the table has several headers: each number is under the names of its own header")
    corner = next((table.rows[0][0] for table in tables if table.rows[0][0]), "")
    united = [[corner, *(name for name, _ in united_keys)]]
    for table, table_keys in zip(tables, keys, strict=True):
        at = [place[key] for key in table_keys]
        for row in table.rows[1:]:
            united.append([row[0], *[""] * len(united_keys)])
            for column, cell in zip(at, row[1:], strict=True):
                united[-1][column] = cell
    if grid.marks:
        notes.append(f"raised marks were left out: {listed(grid.marks)}")
    numbers = [tables[0].numbers[0], *(number for table in tables for number in table.numbers[1:])]
    return NamedTable(united, numbers, [title for table in tables for title in table.titles], footers, notes)


def _without_footers(grid: Grid) -> tuple[Grid, list[str]]:
    """Take the last rows that are one text over all columns: they are no part of the table."""
    width = max((row[-1].start for row in grid.rows if len(row) > 1), default=0)
    num = len(grid.rows)
    while num and len(grid.rows[num - 1]) == 1 and 0 < width < grid.rows[num - 1][0].end:
        num -= 1
    footers = [line for row in grid.rows[num:] for line in row[0].text.split("\n")]
    return replace(grid, rows=grid.rows[:num], numbers=grid.numbers[:num]), footers


def _column_keys(names: Sequence[str]) -> list[tuple[str, int]]:
    """Return a key for each column: its name and, since columns can be without a name, how many before have it."""
    seen: Counter[str] = Counter()
    keys = []
    for name in names:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def listed(texts: Iterable[str], most: int = 6) -> str:
    """Return the different texts in one line; many are counted."""
    kinds = list(Counter(texts))
    return ", ".join(kinds[:most]) + (f" and {len(kinds) - most} more" if len(kinds) > most else "")


_Row = tuple[int, tuple[GridCell, ...]]
"""The number of a row for messages, and its cells."""


def _split_lines(grid: Grid, path: Path) -> list[_Row]:
    """Make rows of the lines of a row's cells if all cells have equally many; else the lines are one text."""
    rows: list[_Row] = []
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


def _compressed(rows: Sequence[_Row], path: Path) -> list[_Row]:
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


def _is_body(row: Sequence[GridCell], first: int) -> bool:
    """Whether a row has a figure beside its name. Years and periods alone are no figures."""
    kinds = [kind_of(cell.text) for cell in row]
    num_years = sum(bool(re.fullmatch(_YEAR, cell.text)) for cell in row)
    signs = [cell.text if kind == "sign" else "" for cell, kind in zip(row, kinds, strict=True)] + [""]
    for k, cell in enumerate(row):
        if cell.start > first:
            # A sign of currency makes a figure even of a year, a sign of percent of a range.
            is_range = "%" in signs[k + 1] and not re.fullmatch(_YEAR, cell.text)
            is_value = kinds[k] == "soft" and (is_range or bool(_OPENS.search(signs[k - 1])))
            # Beside other years, 20181 is a year with a footnote mark.
            is_figure = kinds[k] == "figure" and not (num_years > 1 and re.fullmatch(rf"{_YEAR}\d", cell.text))
            if is_figure or is_value or (kinds[k] == "nothing" and row[0].start <= first):
                return True
    return False


def _parts(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Cut a table before every header that is not its first; a header that is repeated unchanged is left out."""
    first = min((row[0].start for _, row in rows), default=0)
    is_body = [_is_body(row, first) for _, row in rows]
    parts: list[list[_Row]] = [[]]
    header: set[tuple[str, ...]] = set()
    seen_body = False
    for k, (_, row) in enumerate(rows):
        texts = tuple(cell.text for cell in row if cell.start > first)
        is_names = not is_body[k] and bool(texts) and (row[0].start > first or bool(_CORNER.search(row[0].text)))
        if is_names and not seen_body:
            header.add(texts)
        elif is_names and texts in header:
            continue
        elif is_names and len(texts) > 1 and all(re.search(rf"\b{_YEAR}\b", text) for text in texts):
            # Names over several columns of this header are in the rows above it.
            start = len(parts[-1])
            while start and not is_body[k - 1 - (len(parts[-1]) - start)] and parts[-1][start - 1][1][0].start > first:
                start -= 1
            parts.append(parts[-1][start:])
            del parts[-2][start:]
            header, seen_body = {texts}, False
        seen_body = seen_body or is_body[k]
        parts[-1].append(rows[k])
    return parts


def _read_part(rows: Sequence[_Row], path: Path, notes: list[str]) -> list[NamedTable]:
    layout = _Layout(rows, path, notes)
    second = layout.second_table()
    if second is None:
        return [layout.table()]
    notes.append("two tables are side by side: the rows of the second follow those of the first")
    halves = (lambda cell: cell.start < second), (lambda cell: cell.start >= second)
    split = [[(number, tuple(filter(half, row))) for number, row in rows] for half in halves]
    return [table for half in split for table in _read_part([row for row in half if row[1]], path, notes)]


@dataclass
class _Column:
    """Neighbouring columns of the grid under the same header cells, and their cells in every row."""

    start: int
    end: int
    header: tuple[GridCell, ...]
    cells: dict[int, list[GridCell]] = field(default_factory=dict)

    def count(self, *kinds: str) -> int:
        return sum(any(kind_of(cell.text) in kinds for cell in cells) for cells in self.cells.values())


class _Layout:
    """The header and the columns of a table with one header."""

    def __init__(self, rows: Sequence[_Row], path: Path, notes: list[str]) -> None:
        self._path, self._notes = path, notes
        self._first = min((row[0].start for _, row in rows), default=0)
        num_header = self._num_header([row for _, row in rows])
        self._header, self._body = rows[:num_header], rows[num_header:]
        self._width = max((cell.end for _, row in rows for cell in row), default=0)
        self.titles: list[str] = []
        self.corner: list[str] = []
        self._above = self._cells_above()
        self._end_of_names = self._find_end_of_names()
        self._columns = self._find_columns()

    def _num_header(self, rows: Sequence[tuple[GridCell, ...]]) -> int:
        """Count the rows of the header. A named row without figures is a header if its columns need names."""
        first = self._first
        end = next((k for k, row in enumerate(rows) if _is_body(row, first)), None)
        if end is None:
            end = next((k + 1 for k, row in enumerate(rows) if row[-1].start > first), 0)
        beyond = [k for k, row in enumerate(rows[:end]) if row[-1].start > first]
        if not beyond:
            return min(end, 1)
        end = beyond[-1] + 1
        for k in beyond[1:]:
            is_named = rows[k][0].start == first and rows[k][0].end <= rows[k][-1].start
            if is_named and not _CORNER.search(rows[k][0].text) and self._has_names(rows[:k], rows[k:]):
                return k
        return end

    def _has_names(self, header: Sequence[tuple[GridCell, ...]], body: Sequence[tuple[GridCell, ...]]) -> bool:
        """Whether the values of every row are under different names."""
        for row in body:
            values = [cell for cell in row if cell.start > self._first and kind_of(cell.text) in _VALUES]
            names = [
                tuple(name.text for r in header for name in r if name.start < value.end and value.start < name.end)
                for value in values
            ]
            if not all(names) or len(set(names)) < len(names):
                return False
        return True

    def _cells_above(self) -> list[tuple[GridCell, ...]]:
        """Return the header cells above each column of the grid, and take titles and units out of the header."""
        above: list[list[GridCell]] = [[] for _ in range(self._width + 1)]
        first = self._first
        rows = [row for _, row in (*self._header, *self._body)]
        body = [cell for _, row in self._body for cell in row]
        starts = {cell.start for cell in body if cell.start > first and kind_of(cell.text) in _VALUES}
        starts = starts or {cell.start for row in rows for cell in row if cell.start > first}
        has_spans = any(cell.end - cell.start > 1 for row in rows for cell in row)
        for k, (_, row) in enumerate(self._header):
            is_last = k + 1 == len(self._header)
            cells: list[tuple[GridCell, Sequence[int]]] = [(cell, range(cell.start, cell.end)) for cell in row]
            if not has_spans and not is_last:
                under = [cell.start for _, lower in self._header[k + 1 :] for cell in lower if cell.start > first]
                cells = self._spread(k, sorted(starts.intersection(under)))
            if len(row) == 1 and starts:
                is_beside = row[0].start <= first and row[0].end <= min(starts)
                is_all = starts <= set(cells[-1][1])
                is_unit = bool(UNITS.fullmatch(row[0].text)) and (is_beside or is_all or not has_spans)
                if not is_unit and ((is_beside and is_last) or not (is_beside or is_all)):
                    pass
                elif is_unit or (is_beside and _CORNER.search(row[0].text)):
                    self.corner.append(row[0].text)
                    continue
                elif is_beside or row[0].start <= first:
                    self.titles.append(row[0].text)
                    continue
            for cell, columns in cells:
                for column in columns:
                    if cell not in above[column]:
                        above[column].append(cell)
        return list(map(tuple, above))

    def _spread(self, k: int, columns: Sequence[int]) -> list[tuple[GridCell, Sequence[int]]]:
        """Return the columns that each cell of header row ``k`` covers, in a table that does not say so.

        A single name covers all columns. Several cover those before the next name, or equal parts, unless a lower name
        would then be twice under one of them.
        """
        number, row = self._header[k]
        names = [cell for cell in row if cell.start > self._first and (len(row) == 1 or cell.start in columns)]
        alone: list[tuple[GridCell, Sequence[int]]] = [(cell, (cell.start,)) for cell in row]
        others = [cell.start for cell in row if cell not in names]
        if len(names) == 1 and not any(start > self._first for start in others):
            return [*alone, (names[0], columns)]
        if not names or set(columns) <= {cell.start for cell in names}:
            return alone
        size = len(columns) // len(names)
        ends = [
            min(start for start in (*others, self._width, *(n.start for n in names)) if start > cell.start)
            for cell in names
        ]
        ways = (
            [[columns[n * size : (n + 1) * size] for n in range(len(names))]]
            if size * len(names) == len(columns)
            else []
        )
        if names[0].start <= columns[0]:
            ways.insert(0, [[c for c in columns if n.start <= c < end] for n, end in zip(names, ends, strict=True)])
        lower = {c: [n.text for _, r in self._header[k + 1 :] for n in r if n.start == c] for c in columns}
        for blocks in ways:
            texts = [[" ".join(lower[column]) for column in block] for block in blocks]
            is_over = all(cell.start in block for cell, block in zip(names, blocks, strict=True))
            if is_over and all(len(set(block)) == len(block) for block in texts):
                return [*alone, *zip(names, blocks, strict=True)]
        shown = ", ".join(cell.text for cell in names)
        self._notes.append(f"row {number}: the table does not say which columns {shown} cover")
        return alone

    def _find_end_of_names(self) -> int:
        """Return the first column after the names of the rows."""
        first = min((row[0].start for _, row in self._body), default=self._first)
        corner = self._above[first] if self._width else ()
        self.corner += [cell.text for cell in corner]
        named = [cell.start for _, row in self._header for cell in row if cell.start > first and cell not in corner]
        named = [start for start in named if self._above[start]]
        nameless = [
            cell.start
            for _, row in self._body
            for cell in row
            if cell.start > first
            and self._above[cell.start] in ((), corner)
            and kind_of(cell.text) in ("figure", "nothing")
        ]
        return min([*named, *nameless, self._width])

    def _find_columns(self) -> list[_Column]:
        columns: list[_Column] = []
        home: list[int] = []
        for column in range(self._end_of_names, self._width):
            if not columns or columns[-1].header != self._above[column]:
                columns.append(_Column(column, column, self._above[column]))
            columns[-1].end = column + 1
            home.append(len(columns) - 1)
        for k, (_, row) in enumerate(self._body):
            for cell in row:
                if cell.start >= self._end_of_names:
                    under = range(home[cell.start - self._end_of_names], home[cell.end - 1 - self._end_of_names] + 1)
                    depth = max(len(columns[column].header) for column in under)
                    best = [column for column in under if len(columns[column].header) == depth]
                    columns[best[0]].cells.setdefault(k, []).append(cell)
                    if len(best) > 1 and kind_of(cell.text) == "figure" and depth:
                        self._say(
                            k, columns[best[0]], f"{cell.text} is under several names, and was read under the first"
                        )
        columns = [column for column in columns if column.cells or column.header]
        columns = self._without_gaps(columns)
        for left, right in itertools.pairwise(columns):
            self._move_signs(left, right)
        uses = Counter(cell for column in columns for cell in column.header)
        named = [column for column in columns if column.cells or uses[column.header[-1]] == 1]
        return [part for column in named for part in self._split(column)]

    def _say(self, k: int, column: _Column, problem: str) -> None:
        self._notes.append(f"row {self._body[k][0]} ({self._name(k)}), column {self._label(column)!r}: {problem}")

    def _without_gaps(self, columns: list[_Column]) -> list[_Column]:
        """Give cells under no name, or under a part of the names beside them, to the column that they belong to."""
        kept: list[_Column] = []
        for at, column in enumerate(columns):
            left = kept[-1] if kept else None
            right = columns[at + 1] if at + 1 < len(columns) else None
            beside = [
                other
                for other in (left, right)
                if other
                and set(column.header) < set(other.header)
                and (not column.header or other.header[-1] != column.header[-1])
            ]
            if not beside:
                kept.append(column)
                continue
            if not column.count("figure", "soft", "nothing", "text"):
                self._give_signs(column, left, right)
                continue
            empty = [other for other in beside if not other.count(*_VALUES, "text")]
            if len(empty) == 1 and column.count("figure", "soft", "nothing"):
                for k, cells in column.cells.items():
                    mine = empty[0].cells.setdefault(k, [])
                    mine[:] = sorted([*mine, *cells], key=lambda cell: cell.start)
            elif left and left.header and not column.count(*_VALUES) and set(column.cells) <= set(left.cells):
                self._give_signs(column, left, right)
            else:
                kept.append(column)
                if not column.header:
                    self._notes.append(f"column {len(kept) + 1} has no name")
        return kept

    def _give_signs(self, column: _Column, left: _Column | None, right: _Column | None) -> None:
        """Give cells without a number to the number beside them; a footnote mark is left out."""
        for k, cells in column.cells.items():
            for cell in cells:
                other = right if _opens(cell.text) or not (left and k in left.cells) else left
                if other is not None:
                    mine = other.cells.setdefault(k, [])
                    mine[:] = sorted([*mine, cell], key=lambda cell: cell.start)

    def _move_signs(self, left: _Column, right: _Column) -> None:
        """Move a sign that belongs to the number of the neighbouring column: ``(5.2`` and ``)``, ``$`` and ``7``."""
        for k in left.cells.keys() & right.cells.keys():
            before, after = left.cells[k], right.cells[k]
            text = "".join(cell.text for cell in before)
            has_value = any(kind_of(cell.text) in _VALUES for cell in after[1:])
            is_open = len(re.findall(r"[(\[]", text)) > len(re.findall(r"[)\]]", text))
            closes = is_open and after[0].text.startswith((")", "]"))
            is_percent = after[0].text.startswith("%") and has_value and after[0].start == before[-1].end
            if kind_of(after[0].text) == "sign" and (closes or is_percent):
                before.append(after.pop(0))
            elif len(before) > 1 and _opens(before[-1].text) and kind_of(after[0].text) in _VALUES:
                after.insert(0, before.pop())

    def _split(self, column: _Column) -> list[_Column]:
        """Split a column in which a row has several values under one name."""
        bound = None
        for cells in column.cells.values():
            values = [cell for cell in cells if kind_of(cell.text) in ("figure", "soft", "nothing")]
            if len(values) > 1:
                start = next(cell.start for cell in cells if cell.start >= values[0].end)
                bound = max(bound or start, start)
        if bound is None:
            return [column]
        left, right = (_Column(column.start, bound, column.header), _Column(bound, column.end, column.header))
        for k, cells in column.cells.items():
            for part, mine in (
                (left, [c for c in cells if c.start < bound]),
                (right, [c for c in cells if c.start >= bound]),
            ):
                if mine:
                    part.cells[k] = mine
        if not left.cells or not right.cells:
            return [column]
        return [*self._split(left), *self._split(right)]

    def second_table(self) -> int | None:
        """Return the column at which a second table begins, with names of rows and the same names of columns."""
        labels = [self._label(column) for column in self._columns]
        for k, column in enumerate(self._columns):
            is_names = column.count("text") > 1 and not column.count(*_VALUES)
            if k and is_names and labels[:k] == labels[k + 1 :]:
                return column.start
        return None

    def _label(self, column: _Column) -> str:
        texts = [cell.text for cell in column.header]
        return " ".join(text for k, text in enumerate(texts) if not k or text != texts[k - 1])

    def _name(self, k: int) -> str:
        return " ".join(cell.text for cell in self._body[k][1] if cell.start < self._end_of_names)

    def table(self) -> NamedTable:
        """Return the rows under one row of names."""
        labels = [self._label(column) for column in self._columns]
        same = Counter(labels)
        number: Counter[str] = Counter()
        for k, label in enumerate(labels):
            number[label] += 1
            if label and same[label] > 1:
                labels[k] = f"{label} ({number[label]} of {same[label]})"
        if labels and not any(labels):
            self._notes.append("no row names the columns")
        rows = [[" ".join(self.corner), *labels]]
        numbers = [self._header[-1][0] if self._header else 0]
        for k, (row_number, _) in enumerate(self._body):
            rows.append([self._name(k), *(self._joined(column.cells.get(k, ())) for column in self._columns)])
            numbers.append(row_number)
        return NamedTable(rows, numbers, self.titles)

    def _joined(self, cells: Sequence[GridCell]) -> str:
        texts = [cell.text for cell in cells]
        kinds = list(map(kind_of, texts))
        value = next((k for k, kind in enumerate(kinds) if kind in ("figure", "soft", "nothing")), None)
        if value is not None:
            marks = [text for text, kind in zip(texts[value + 1 :], kinds[value + 1 :], strict=True) if kind == "mark"]
            if marks:
                self._notes.append(f"{' '.join(marks)} after {texts[value]} was left out as a footnote mark")
            texts = [t for k, (t, kind) in enumerate(zip(texts, kinds, strict=True)) if k <= value or kind != "mark"]
        return " ".join(texts)
