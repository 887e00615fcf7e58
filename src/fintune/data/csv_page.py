"""A table from a CSV or TSV file, with the lines of text that stand above it in a spreadsheet."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fintune.errors import DataError

_SIGNS = ";\t|,"
_TOLD = re.compile(r'"?sep=([;,|\t:])"?[;,|\t]*\r?\n', re.IGNORECASE)
_QUOTED = re.compile(r'"[^"]*"')
_HEAD_SHOWN = 80
"""Letters of a header in a message."""
_NAME = re.compile(r"[^\W\d_]|\b(?:19|20)\d\d\b")


class CsvPage(NamedTuple):
    """What a file holds.

    Attributes:
        rows: Rows of cells, the header first; [] where there is no table.
        above: Lines of one cell before the header.
        sign: What separates the cells.
    """

    rows: list[list[str]]
    above: list[str]
    sign: str


def csv_page(path: Path, content: str) -> CsvPage:
    """Read a table.

    Args:
        path: For messages; ``.tsv`` says that tabs separate.
        content: The file's text. A first line ``sep=;``, as Excel writes it, says what separates.

    Raises:
        DataError: Quotes do not close, or a row is longer than the header.
    """
    told = _TOLD.match(content)
    content = content[told.end() :] if told else content
    is_tsv = path.name.lower().removesuffix(".gz").endswith(".tsv")
    sign = told[1] if told else "\t" if is_tsv else _separator(content)
    lines = csv.reader(io.StringIO(content, newline=""), delimiter=sign, strict=True, skipinitialspace=sign != "\t")
    try:
        numbered = [(number, row) for number, row in enumerate(lines, 1) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"no CSV table ({error})", path=path) from None
    rows = [[" ".join(cell.split()) for cell in row] for _, row in numbered]
    start = _num_above(rows)
    above, table = [row[0] for row in rows[:start]], rows[start:]
    for (number, _), row in zip(numbered[start:], table, strict=True):
        # A comma in a number would have shifted the cells behind it.
        if sign == "," and 1 < len(table[0]) < len(row) and any(row[len(table[0]) :]):
            problem = f"has {len(row)} cells where the header has {len(table[0])}"
            head = f"row {numbered[start][0]} was taken for the header: {' | '.join(table[0])[:_HEAD_SHOWN]}"
            raise DataError(problem, path=path, row=number, hint=f'put a cell with a comma in quotes: "1,250" ({head})')
    return CsvPage(table if len(table) > 1 else [], above, sign)


def _separator(content: str) -> str:
    """The sign of which most lines hold the same number; text above the table holds others."""
    lines = [line for line in _QUOTED.sub("", content).splitlines() if line.strip()]

    def evenness(sign: str) -> tuple[int, int, bool]:
        counts = Counter(line.count(sign) for line in lines if sign in line)
        # "1,234" in a cell makes the comma the least sure sign.
        return max(counts.values(), default=0), counts.total(), sign != ","

    return max(_SIGNS, key=evenness)


def _num_above(rows: list[list[str]]) -> int:
    """How many lines of one cell stand before the header; a header may have a name in its first cell alone, too."""
    start = next((k for k, row in enumerate(rows) if any(row[1:])), len(rows))
    is_padded = any(len(row) > 1 for row in rows[:start])
    if is_padded and start < len(rows) and not all(map(_NAME.search, filter(None, rows[start][1:]))):
        return next(k for k, row in enumerate(rows) if len(row) > 1)
    return start
