"""Find the names of a table's rows and columns, and join the cells of every number.

The rows before the first row of figures are the header. A column's name is all header texts above it, from top to
bottom. A sign, a unit or a bracket in a cell of its own belongs to the number under the same header. What cannot be
decided raises an error with row and column, or is a note.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fintune.data.page_table import (
    CORNER,
    END,
    OPENS,
    UNITS,
    VALUES,
    YEAR,
    Grid,
    GridCell,
    NamedTable,
    NumberedRow,
    compressed,
    kind_of,
    listed,
    opens,
    split_lines,
    without_footers,
)


def read_grid(grid: Grid, path: Path) -> NamedTable:
    """Find the names of rows and columns, and join the cells of every number.

    Raises:
        DataError: A cell holds several numbers, or a number is under several names.
    """
    notes: list[str] = []
    grid, footers = without_footers(grid)
    rows = compressed(split_lines(grid, path), path)
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


def _column_keys(names: Sequence[str]) -> list[tuple[str, int]]:
    """Return a key for each column: its name and, since columns can be without a name, how many before have it."""
    seen: Counter[str] = Counter()
    keys = []
    for name in names:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def _is_body(row: Sequence[GridCell], first: int) -> bool:
    """Whether a row has a figure beside its name. Years and periods alone are no figures."""
    kinds = [kind_of(cell.text) for cell in row]
    if row[0].start > first and kinds.count("text") > kinds.count("figure"):
        return False
    num_years = sum(bool(re.fullmatch(YEAR, cell.text)) for cell in row)
    signs = [cell.text if kind == "sign" else "" for cell, kind in zip(row, kinds, strict=True)] + [""]
    for k, cell in enumerate(row):
        if cell.start > first:
            # A sign of currency makes a figure even of a year, a sign of percent of a range.
            is_range = "%" in signs[k + 1] and not re.fullmatch(YEAR, cell.text)
            is_value = kinds[k] == "soft" and (is_range or bool(OPENS.search(signs[k - 1])))
            # Beside other years, 20181 is a year with a footnote mark.
            is_figure = kinds[k] == "figure" and not (num_years > 1 and re.fullmatch(rf"{YEAR}\d", cell.text))
            if is_figure or is_value or (kinds[k] == "nothing" and row[0].start <= first):
                return True
    return False


def _parts(rows: Sequence[NumberedRow]) -> list[list[NumberedRow]]:
    """Cut a table before every header that is not its first; a header that is repeated unchanged is left out."""
    first = min((row[0].start for _, row in rows), default=0)
    is_body = [_is_body(row, first) for _, row in rows]
    parts: list[list[NumberedRow]] = [[]]
    header: set[tuple[str, ...]] = set()
    seen_body = False
    for k, (_, row) in enumerate(rows):
        texts = tuple(cell.text for cell in row if cell.start > first)
        is_names = not is_body[k] and bool(texts) and (row[0].start > first or bool(CORNER.search(row[0].text)))
        if is_names and not seen_body:
            header.add(texts)
        elif is_names and texts in header:
            continue
        elif is_names and len(texts) > 1 and all(re.search(rf"\b{YEAR}\b", text) for text in texts):
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


def _read_part(rows: Sequence[NumberedRow], path: Path, notes: list[str]) -> list[NamedTable]:
    layout = _Layout(rows, path, notes)
    second = layout.second_table()
    if second is None:
        return [layout.table()]
    notes.append("two tables are side by side: the rows of the second follow those of the first")
    halves = (lambda cell: cell.start < second), (lambda cell: cell.start >= second)
    split = [[(number, tuple(filter(half, row))) for number, row in rows] for half in halves]
    return [table for half in split for table in _read_part([row for row in half if row[1]], path, notes)]


_MAX_HEADER = 12
"""Rows that are looked at for the end of the header, if years and periods could be names or values."""


@dataclass
class _Column:
    """Neighbouring columns of the grid under the same header cells, and their cells in every row."""

    start: int
    end: int
    header: tuple[GridCell, ...]
    cells: dict[int, list[GridCell]] = field(default_factory=dict)

    def count(self, *kinds: str) -> int:
        return sum(any(kind_of(cell.text) in kinds for cell in cells) for cells in self.cells.values())


def _letters(number: int) -> str:
    """Return A, B, ... Z, AA, AB: a digit in a name could be taken for a number of the page."""
    return (_letters((number - 1) // 26) if number > 26 else "") + chr(ord("A") + (number - 1) % 26)


class _Layout:
    """The header and the columns of a table with one header."""

    def __init__(self, rows: Sequence[NumberedRow], path: Path, notes: list[str]) -> None:
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
        for k in beyond[1:_MAX_HEADER]:
            is_named = rows[k][0].start == first and rows[k][0].end <= rows[k][-1].start
            is_value = any(kind_of(cell.text) == "soft" for cell in rows[k][1:])
            if is_named and is_value and not CORNER.search(rows[k][0].text) and self._has_names(rows[:k], rows[k:]):
                return k
        return end

    def _has_names(self, header: Sequence[tuple[GridCell, ...]], body: Sequence[tuple[GridCell, ...]]) -> bool:
        """Whether the values of every row are under different names."""
        above: dict[int, list[str]] = {}
        for name in itertools.chain.from_iterable(header):
            for column in range(name.start, name.end):
                above.setdefault(column, []).append(name.text)
        for row in body:
            values = [cell for cell in row if cell.start > self._first and kind_of(cell.text) in VALUES]
            names = [tuple(above.get(value.start, above.get(value.end - 1, ()))) for value in values]
            if not all(names) or len(set(names)) < len(names):
                return False
        return True

    def _cells_above(self) -> list[tuple[GridCell, ...]]:
        """Return the header cells above each column of the grid, and take titles and units out of the header."""
        above: list[list[GridCell]] = [[] for _ in range(self._width + 1)]
        first = self._first
        rows = [row for _, row in (*self._header, *self._body)]
        body = [cell for _, row in self._body for cell in row]
        starts = {cell.start for cell in body if cell.start > first and kind_of(cell.text) in VALUES}
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
                is_title = row[0].start <= first and starts <= set(cells[-1][1])
                is_unit = bool(UNITS.fullmatch(row[0].text)) and (is_beside or is_title or not has_spans)
                if is_unit or (is_beside and not is_last and CORNER.search(row[0].text)):
                    self.corner.append(row[0].text)
                    continue
                if is_title or (is_beside and not is_last):
                    self.titles.append(row[0].text)
                    continue
            for cell, columns in cells:
                for column in columns:
                    if cell not in above[column]:
                        above[column].append(cell)
        return list(map(tuple, above))

    def _spread(self, k: int, columns: Sequence[int]) -> list[tuple[GridCell, Sequence[int]]]:
        """Return the columns that each cell of header row ``k`` covers, in a table that does not say so.

        A name covers several columns if columns beside it are else the same, or if it is a period. A single name then
        covers all columns; several cover those before the next name, or equal parts, unless a lower name would be twice
        under one of them.
        """
        number, row = self._header[k]
        names = [cell for cell in row if cell.start > self._first]
        alone: list[tuple[GridCell, Sequence[int]]] = [(cell, (cell.start,)) for cell in row]
        known = set(columns)
        over = [cell for cell in names if cell.start in known or len(names) == 1]
        if not over or known <= {cell.start for cell in over}:
            return alone
        lower, whole = dict.fromkeys(columns, ""), dict.fromkeys(columns, "")
        for n, (_, other) in enumerate(self._header):
            for texts in (whole, lower) if n > k else (whole,):
                texts |= {cell.start: f"{texts[cell.start]} {cell.text}" for cell in other if cell.start in known}
        ways: list[list[Sequence[int]]] = []
        is_same = len(set(whole.values())) < len(columns)
        if is_same or all(CORNER.search(cell.text) for cell in over):
            starts = [*(cell.start for cell in names), END.start]
            ends = [starts[bisect.bisect(starts, cell.start)] for cell in over]
            if len(over) == 1 and len(names) == 1:
                return [*alone, (over[0], columns)]
            if over[0].start <= columns[0]:
                ways.append([[c for c in columns if n.start <= c < end] for n, end in zip(over, ends, strict=True)])
            size = len(columns) // len(over)
            if size * len(over) == len(columns):
                ways.append([columns[n * size : (n + 1) * size] for n in range(len(over))])
        for blocks in ways:
            is_over = all(cell.start in block for cell, block in zip(over, blocks, strict=True))
            if is_over and all(len({lower[c] for c in block}) == len(block) for block in blocks):
                return [*alone, *zip(over, blocks, strict=True)]
        if over[0].start <= columns[0] or over[0].start == columns[len(columns) // 2]:
            shown = ", ".join(cell.text for cell in over)
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
            and (kind_of(cell.text) in ("figure", "nothing") or opens(cell.text))
        ]
        return min([*named, *nameless, self._width])

    def _find_columns(self) -> list[_Column]:
        columns: list[_Column] = []
        home: list[int] = []
        between: list[str] = []
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
                    ends = [c for c in best if cell.start == columns[c].start] or [
                        c for c in best if cell.end == columns[c].end
                    ]
                    if len(best) > 1 and not ends and depth and kind_of(cell.text) == "figure":
                        between.append(f"row {self._body[k][0]} ({self._name(k)}): {cell.text}")
                    columns[(ends or best)[0]].cells.setdefault(k, []).append(cell)
        if between:
            more = f" (and {len(between) - 1} more)" if len(between) > 1 else ""
            self._notes.append(f"{between[0]} is under several names, and was read under the first{more}")
        columns = [column for column in columns if column.cells or column.header]
        columns = self._without_gaps(columns)
        for left, right in itertools.pairwise(columns):
            self._move_signs(left, right)
        uses = Counter(cell for column in columns for cell in column.header)
        named = [column for column in columns if column.cells or uses[column.header[-1]] == 1]
        return [part for column in named for part in self._split(column)]

    def _without_gaps(self, columns: list[_Column]) -> list[_Column]:
        """Give cells under no name, or under a part of the names beside them, to the column that they belong to."""

        def named_beside(at: int) -> list[_Column]:
            beside = [columns[k] for k in (at - 1, at + 1) if 0 <= k < len(columns)]
            return [other for other in beside if set(columns[at].header) < set(other.header)]

        # A name without figures beside figures without a name; from the end, because signs are before figures.
        for at in reversed(range(len(columns))):
            empty = [other for other in named_beside(at) if not other.count(*VALUES, "text")]
            if len(empty) == 1 and columns[at].count("figure", "soft", "nothing"):
                for k, cells in columns[at].cells.items():
                    empty[0].cells[k] = sorted([*empty[0].cells.get(k, ()), *cells], key=lambda cell: cell.start)
                columns[at].cells = {}
        kept: list[_Column] = []
        for at, column in enumerate(columns):
            left = kept[-1] if kept else None
            right = columns[at + 1] if at + 1 < len(columns) else None
            is_unit = left and left.header and not column.count(*VALUES) and set(column.cells) <= set(left.cells)
            if named_beside(at) and (is_unit or not column.count("figure", "soft", "nothing", "text")):
                self._give_signs(column, left, right)
            else:
                kept.append(column)
        return kept

    def _give_signs(self, column: _Column, left: _Column | None, right: _Column | None) -> None:
        """Give cells without a number to the number beside them; a footnote mark is left out."""
        for k, cells in column.cells.items():
            for cell in cells:
                other = right if opens(cell.text) or not (left and k in left.cells) else left
                if other is not None:
                    mine = other.cells.setdefault(k, [])
                    mine[:] = sorted([*mine, cell], key=lambda cell: cell.start)

    def _move_signs(self, left: _Column, right: _Column) -> None:
        """Move a sign that belongs to the number of the neighbouring column: ``(5.2`` and ``)``, ``$`` and ``7``."""
        for k in left.cells.keys() & right.cells.keys():
            before, after = left.cells[k], right.cells[k]
            text = "".join(cell.text for cell in before)
            has_value = any(kind_of(cell.text) in VALUES for cell in after[1:])
            is_open = len(re.findall(r"[(\[]", text)) > len(re.findall(r"[)\]]", text))
            closes = is_open and after[0].text.startswith((")", "]"))
            is_percent = after[0].text.startswith("%") and has_value and after[0].start == before[-1].end
            if kind_of(after[0].text) == "sign" and (closes or is_percent):
                before.append(after.pop(0))
            elif len(before) > 1 and opens(before[-1].text) and kind_of(after[0].text) in VALUES:
                after.insert(0, before.pop())

    def _split(self, column: _Column) -> list[_Column]:
        """Split a column in which a row has several values under one name."""
        starts: dict[int, list[list[int]]] = {}
        for cells in column.cells.values():
            at = [n for n, cell in enumerate(cells) if kind_of(cell.text) in ("figure", "soft", "nothing")]
            # The signs between two values belong to the second.
            starts.setdefault(len(at), []).append([cells[n + 1].start for n in at[:-1]])
        if max(starts, default=0) < 2:
            return [column]
        bounds = [column.start, *map(min, zip(*starts[max(starts)], strict=True))]
        parts = [
            _Column(start, end, column.header) for start, end in zip(bounds, [*bounds[1:], column.end], strict=True)
        ]
        for k, cells in column.cells.items():
            for cell in cells:
                parts[bisect.bisect(bounds, cell.start) - 1].cells.setdefault(k, []).append(cell)
        return parts

    def second_table(self) -> int | None:
        """Return the column at which a second table begins, with names of rows and the same names of columns."""
        labels = [self._label(column) for column in self._columns]
        middle = len(labels) // 2
        if not middle or labels[:middle] != labels[middle + 1 :]:
            return None
        column = self._columns[middle]
        return column.start if column.count("text") > 1 and not column.count(*VALUES) else None

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
                labels[k] = f"{label} ({_letters(number[label])})"
        if len(labels) == 1 and not labels[0] and self.titles:
            labels = [self.titles.pop()]
        nameless = [str(k) for k, label in enumerate(labels, start=2) if not label]
        if nameless:
            self._notes.append(f"no name is above column {', '.join(nameless)}")
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
