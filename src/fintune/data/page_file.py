"""Read one page from a user's file: a FinQA record, a table in CSV, or an HTML or Markdown page.

The page is returned in FinQA's form, on which models of this package were trained: one sentence an entry, a loss in
brackets as ``-5.2 ( 5.2 )``, 5,829 as 5829, a sign of currency or percent in its number's cell, 1.250,5 as 1250.5.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fintune.data.files import read_whole_text
from fintune.data.page_layout import read_grid
from fintune.data.page_markup import Block, html_blocks, is_markdown, markdown_blocks
from fintune.data.page_numbers import Mark, signed_table, with_points
from fintune.data.page_table import UNITS, Grid, GridCell, NamedTable, clean_text
from fintune.errors import DataError
from fintune.finqa.text_similarity import rank_lines
from fintune.records import FinQAQuestion, FinQARecord
from fintune.util.files import parse_json

KINDS = "a FinQA record (.json), a table (.csv, .tsv), or a page with a table (.html, .md)"

_KNOWN = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".md": "markdown", ".markdown": "markdown"}
_KNOWN |= {".html": "html", ".htm": "html", ".xhtml": "html"}
_SHEETS = {".csv", ".tsv", ".txt", ".xlsx", ".xls", ".ods"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")
_ABBREVIATION = re.compile(
    r"\b(?:[A-Z]|Inc|Corp|Co|Ltd|Nos?|vs|Mr|Ms|Mrs|Dr|St|Mt|Ft|Fig|Figs|Sec|Secs|Art|Arts|Ch|Eq|Vol|pp?|approx|est|incl|ca"
    r"|cf|U\.S|U\.K|e\.g|i\.e|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.$"
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:,\d{3})*(?!\d))")
_SEPARATORS = ";\t|,"
_SEPARATOR_LINE = re.compile(r'"?sep=([;,|\t:])"?[;,|\t]*\r?\n', re.IGNORECASE)
_QUOTED = re.compile(r'"[^"]*"')
_NO_VALUE = re.compile(r"nan|unnamed: \d+(?:_level_\d+)?", re.IGNORECASE)
_HEAD_SHOWN = 80
"""Letters of a header in a message."""
_COLUMN_NAME = re.compile(r"[^\W\d_]|\b(?:19|20)\d\d\b")
_TEXT_AROUND = 30
"""Lines of text before a table, and after it, that are read if the page has several tables."""


@dataclass(frozen=True)
class PageReading:
    """How a file was read.

    Attributes:
        record: The page; its question is empty.
        units: Texts that scale the numbers, such as "in millions".
        notes: What was decided or left out, one line each.
        number: The number of the table, counted from 1.
        num_tables: How many tables the file has.
    """

    record: FinQARecord
    units: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    number: int = 1
    num_tables: int = 1


def read_page(
    path: Path,
    question: str | None = None,
    *,
    text: str = "",
    record_id: str | None = None,
    decimal: Mark | None = None,
    table: int | None = None,
) -> PageReading:
    """Read a page and put a question to it.

    Args:
        path: The file. Its name decides its kind, or its content if the name does not.
        question: The question; that of a FinQA record is not read. It chooses one of several tables.
        text: Sentences before the table.
        record_id: Id of the record, if the file has several.
        decimal: Decimal separator of the table's numbers; detected if None. A FinQA record has points.
        table: Number of the table, counted from 1.

    Raises:
        DataError: The file cannot be read, has no table or none of this number, has no number or one that can be read
            in two ways, or has no records though one is asked for.
    """
    if question is not None and not question.strip():
        raise DataError("no question was asked", path=path, hint='put it last, in quotes: "What was ...?"')
    question = question or ""
    content = read_whole_text(path, hint=f"give {KINDS}", encoding_hint=_encoding_hint(path))
    kind = _kind(path, content)
    if kind == "json":
        page = _finqa(path, content, record_id)
        before = [*sentences([text]), *page.pre_text]
        page = page.model_copy(update={"pre_text": tuple(before), "qa": _asked(question)})
        return PageReading(_with_numbers(page, path))
    if record_id is not None:
        raise DataError(f"no FinQA file, so it has no record {record_id}", path=path, hint="leave out --id")
    sign = ""
    if kind == "csv":
        blocks, sign = csv_blocks(path, content)
    else:
        blocks = (html_blocks if kind == "html" else markdown_blocks)(content, path)
    at, notes = choose_table(blocks, question, table, path)
    grid = blocks[at]
    assert isinstance(grid, Grid), "chosen among the tables"
    page_table = read_grid(_without_nan(grid) if kind != "html" else grid, path)
    above, below = _text_around(blocks, at)
    above, below = [*above, *page_table.titles], [*page_table.footers, *below]
    texts = [question, text, *above, *below]
    rows, texts = with_points(
        page_table, texts, path=path, semicolons=sign == ";", comma_separated=sign == ",", mark=decimal
    )
    page_table = signed_table(replace(page_table, rows=rows), path)
    end = 2 + len(above)
    units = _units(page_table, above)
    record = FinQARecord(
        id=path.name,
        pre_text=tuple(sentences(texts[1:end])),
        post_text=tuple(sentences(texts[end:])),
        table=tuple(map(tuple, page_table.rows)),
        qa=_asked(texts[0]),
    )
    tables = [k for k, block in enumerate(blocks) if isinstance(block, Grid)]
    notes += page_table.notes
    return PageReading(_with_numbers(record, path), units, tuple(notes), tables.index(at) + 1, len(tables))


def choose_table(blocks: Sequence[Block], question: str, number: int | None, path: Path) -> tuple[int, list[str]]:
    """Return the index of the table to read, and a note if there are several."""
    tables = [k for k, block in enumerate(blocks) if isinstance(block, Grid)]
    if not tables:
        raise DataError("holds no table", path=path, hint=f"give {KINDS}")
    if number is not None and not 1 <= number <= len(tables):
        raise DataError(f"has {len(tables)} tables, so no table {number}", path=path, hint="give another --table")
    if number is not None or len(tables) == 1:
        return tables[(number or 1) - 1], []
    best = 0
    if question.strip():
        texts = [" ".join([*_text_around(blocks, k, 3)[0], *_words(blocks[k])]) for k in tables]
        best = rank_lines(question, texts, ())[0]
    heading = (_text_around(blocks, tables[best], 1)[0] or [""])[-1]
    note = f"table {best + 1} of {len(tables)} was read" + (f", under {heading[:_HEAD_SHOWN]!r}" if heading else "")
    return tables[best], [f"{note}; --table N reads another"]


def _words(block: Block) -> list[str]:
    return [cell.text for row in block.rows for cell in row] if isinstance(block, Grid) else []


def _text_around(blocks: Sequence[Block], at: int, most: int | None = None) -> tuple[list[str], list[str]]:
    """Return the lines between a table and its neighbours; all lines if there is no other table."""
    others = [k for k, block in enumerate(blocks) if isinstance(block, Grid) and k != at]
    start = max((k + 1 for k in others if k < at), default=0)
    end = min((k for k in others if k > at), default=len(blocks))
    most = most or (_TEXT_AROUND if others else len(blocks))
    above = [line for line in blocks[start:at] if isinstance(line, str)]
    below = [line for line in blocks[at + 1 : end] if isinstance(line, str)]
    return above[-most:], below[:most]


def _units(page: NamedTable, above: Sequence[str]) -> tuple[str, ...]:
    """Return the texts that scale a table's numbers; one above the table is written into its corner, too."""
    places = [page.rows[0][0], *page.rows[0][1:], *page.titles, *above[-2:]]
    found = [(place, match[0].strip(".: ")) for place, text in enumerate(places) for match in UNITS.finditer(text)]
    units = tuple(dict.fromkeys(unit for _, unit in found))
    if units and not any(place < len(page.rows[0]) for place, _ in found):
        page.rows[0][0] = f"{page.rows[0][0]} ( {units[0].strip('().: ')} )".strip()
    return units


def _with_numbers(page: FinQARecord, path: Path) -> FinQARecord:
    cells = (cell for row in page.table[1:] for cell in row[1:])
    if not any(map(str.isdigit, "".join((*cells, *page.pre_text, *page.post_text)))):
        raise DataError("no cell holds a number", path=path, hint="answers are computed from the numbers of a page")
    return page


def sentences(blocks: Sequence[str]) -> list[str]:
    """Split blocks of text into sentences."""
    pieces: list[str] = []
    for line in (line for block in blocks for line in block.splitlines()):
        start = 0
        for end in _SENTENCE_END.finditer(line):
            if not _ABBREVIATION.search(line[max(start, end.start() - 12) : end.start()]):
                pieces.append(line[start : end.start()])
                start = end.end()
        pieces.append(line[start:])
    return [_THOUSANDS.sub("", " ".join(piece.split())) for piece in pieces if piece.strip()]


def _asked(question: str) -> FinQAQuestion:
    return FinQAQuestion(question=" ".join(question.split()), program="", exe_ans="")


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _encoding_hint(path: Path) -> str:
    if _suffix(path) in _SHEETS:
        return "save it as CSV UTF-8"
    return "save it as UTF-8" if _suffix(path) in _KNOWN else f"give {KINDS}, in UTF-8"


def _kind(path: Path, content: str) -> str:
    if _suffix(path) in _KNOWN:
        return _KNOWN[_suffix(path)]
    start = content.lstrip()[:200].lower()
    if start.startswith(("{", "[")):
        return "json"
    if start.startswith("<") or "<table" in content.lower():
        return "html"
    if is_markdown(content):
        return "markdown"
    raise DataError("no kind of page that is known", path=path, hint=f"give {KINDS}")


def _finqa(path: Path, content: str, record_id: str | None) -> FinQARecord:
    try:
        raw = parse_json(content)
    except ValueError:
        try:
            raw = [parse_json(line) for line in content.split("\n") if line.strip()]
        except ValueError as error:
            raise DataError(f"not JSON ({error})", path=path) from None
    rows = raw if isinstance(raw, list) else [raw]
    if len(rows) > 1 and not any(isinstance(row, dict) and ("id" in row or row.get("pre_text")) for row in rows):
        hint = "a FinQA record has id, pre_text, table and post_text"
        raise DataError(f"is no FinQA file: none of its {len(rows)} rows is a record", path=path, hint=hint)
    if record_id is not None:
        names = [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]
        rows = [row for row in rows if isinstance(row, dict) and "id" in row and str(row["id"]) == record_id]
        if not rows:
            raise DataError("no record has this id", path=path, record_id=record_id, hint=_near(record_id, names))
    if len(rows) != 1:
        raise DataError(f"holds {len(rows)} records", path=path, hint="say which one with --id")
    row = rows[0]
    if not isinstance(row, dict) or not row.get("table"):
        raise DataError("holds no table", path=path, hint="a FinQA record has pre_text, table and post_text")
    fields = {key: row.get(key) or () for key in ("pre_text", "post_text", "table")}
    wrong = next(_no_texts(fields), None)
    if wrong is not None:
        raise DataError(f"is no FinQA record: {wrong[0]}", path=path, record_id=record_id, hint=wrong[1])
    try:
        return FinQARecord.model_validate(
            {"id": str(row.get("id") or path.name), **fields, "qa": {"question": "", "program": "", "exe_ans": ""}}
        )
    except ValueError as error:
        raise DataError(f"is no FinQA record ({str(error).splitlines()[1].strip()})", path=path) from None


def _no_texts(fields: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield what is not text in the fields in which FinQA has text, with a hint."""
    for key in ("pre_text", "post_text"):
        lines = fields[key]
        if not isinstance(lines, (list, tuple)) or not all(isinstance(line, str) for line in lines):
            yield f"{key} is no list of texts", f'write it as {{"{key}": ["One sentence.", "Another."]}}'
    table = fields["table"]
    if not isinstance(table, (list, tuple)) or not all(isinstance(row, list) for row in table):
        yield "table is no list of rows", 'write it as {"table": [["", "2019"], ["revenue", "1250"]]}'
        return
    for row, cells in enumerate(table, start=1):
        for column, cell in enumerate(cells, start=1):
            if isinstance(cell, str):
                continue
            text = "" if cell is None else json.dumps(cell)
            kind = "a number" if isinstance(cell, (int, float)) and not isinstance(cell, bool) else "no text"
            problem = f"row {row}, column {column} of its table is {kind} ({json.dumps(cell)[:40]})"
            yield problem, f"write every cell as text: {json.dumps(text[:40])}"


def _near(record_id: str, names: Sequence[str]) -> str | None:
    longer = [name for name in names if name.startswith(record_id)]
    near = longer[:1] or difflib.get_close_matches(record_id, names, n=1)
    return f"did you mean {near[0]}?" if near else None


def _without_nan(grid: Grid) -> Grid:
    """Leave out the cells that pandas and markitdown write for empty ones."""
    rows = (tuple(cell for cell in row if not _NO_VALUE.fullmatch(cell.text)) for row in grid.rows)
    numbered = [
        (number, row) for number, row in zip(grid.numbers or range(1, len(grid.rows) + 1), rows, strict=True) if row
    ]
    return replace(grid, rows=tuple(row for _, row in numbered), numbers=tuple(number for number, _ in numbered))


def csv_blocks(path: Path, content: str) -> tuple[list[Block], str]:
    """Read a table and the lines of one cell above it; return them with the separator of the cells.

    Args:
        path: The file, for messages. A ``.tsv`` file has tabs.
        content: The file's text. A first line ``sep=;``, as Excel writes it, sets the separator.

    Raises:
        DataError: Quotes do not close, or a row is longer than the header.
    """
    separator = _SEPARATOR_LINE.match(content)
    content = content[separator.end() :] if separator else content
    is_tsv = path.name.lower().removesuffix(".gz").endswith(".tsv")
    sign = separator[1] if separator else "\t" if is_tsv else _separator(content)
    lines = csv.reader(io.StringIO(content, newline=""), delimiter=sign, strict=True, skipinitialspace=sign != "\t")
    try:
        numbered = [(number, row) for number, row in enumerate(lines, 1) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"no CSV table ({error})", path=path) from None
    rows = [["\n".join(filter(None, map(clean_text, cell.splitlines()))) for cell in row] for _, row in numbered]
    start = _num_above(rows)
    above, table = [row[0] for row in rows[:start]], rows[start:]
    for (number, _), row in zip(numbered[start:], table, strict=True):
        # A comma in a number would have shifted the cells after it.
        if sign == "," and 1 < len(table[0]) < len(row) and any(row[len(table[0]) :]):
            problem = f"has {len(row)} cells where the header has {len(table[0])}"
            head = f"row {numbered[start][0]} was taken for the header: {' | '.join(table[0])[:_HEAD_SHOWN]}"
            raise DataError(problem, path=path, row=number, hint=f'put a cell with a comma in quotes: "1,250" ({head})')
    cells = (tuple(GridCell(k, k + 1, text) for k, text in enumerate(row) if text) for row in table)
    grid = Grid(tuple(cells), numbers=tuple(range(1, len(table) + 1)))
    is_table = len(table) > 1 and any(len(row) > 1 for row in table)
    return [*above, grid] if is_table else [*above, *(" ".join(row) for row in table)], sign


def _separator(content: str) -> str:
    """Return the sign that most lines have equally often. Text above the table has other numbers of it."""
    lines = [line for line in _QUOTED.sub("", content).splitlines() if line.strip()]

    def evenness(sign: str) -> tuple[int, int, bool]:
        counts = Counter(line.count(sign) for line in lines if sign in line)
        # "1,234" in a cell makes the comma the least sure sign.
        return max(counts.values(), default=0), counts.total(), sign != ","

    return max(_SEPARATORS, key=evenness)


def _num_above(rows: list[list[str]]) -> int:
    """Count the lines of one cell before the header. A header, too, may have a name in its first cell alone."""
    start = next((k for k, row in enumerate(rows) if any(row[1:])), len(rows))
    is_padded = any(len(row) > 1 for row in rows[:start])
    if is_padded and start < len(rows) and not all(map(_COLUMN_NAME.search, filter(None, rows[start][1:]))):
        return next(k for k, row in enumerate(rows) if len(row) > 1)
    return start
