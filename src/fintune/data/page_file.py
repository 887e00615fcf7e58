"""Read one page from a user's file: a FinQA record, a table in CSV, or an HTML or Markdown page with one table.

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
from pathlib import Path
from typing import NamedTuple

from fintune.data.decimal_commas import Mark, with_points
from fintune.data.files import read_whole_text
from fintune.data.page_markup import HtmlPage, is_markdown, markdown_page
from fintune.errors import DataError
from fintune.records import FinQAQuestion, FinQARecord

KINDS = "a FinQA record (.json), a table (.csv, .tsv), or a page with one table (.html, .md)"

_KNOWN = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".md": "markdown", ".markdown": "markdown"}
_KNOWN |= {".html": "html", ".htm": "html", ".xhtml": "html"}
_SHEETS = {".csv", ".tsv", ".txt", ".xlsx", ".xls", ".ods"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")
_ABBREVIATION = re.compile(r"\b(?:[A-Z]|Inc|Corp|Co|Ltd|No|vs|Mr|Ms|Dr|approx|U\.S)\.$")
_BRACKETED = re.compile(r"([$€£¥]?)\s*\(\s*([$€£¥]?)\s*(\d[\d,]*\.?\d*|\.\d+)\s*\)?\s*\)?\s*(%?)\s*\)?")
# A footnote mark after a loss: (5.2)*, (5.2)(a), (5.2) [1].
_FOOTNOTE = re.compile(
    r"(?<=[)%])(?:\s*(?:[*\u2020\u2021\u00a7\u00b6#\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+"
    r"|\((?:[A-Za-z]|\d{1,2})\)|\[(?:[A-Za-z]|\d{1,2})\]))+$"
)
# Dashes that mean a minus before a number, but not between two numbers.
_DASH = re.compile(r"(?<![\w.%)\]])(?<![\w.%)\]]\s)[\u2012\u2013\ufe63](?=\s?[$€£¥]?\s?\.?\d)")
_MINUS = re.compile(r"([$€£¥]?)(\s*)-\s*([$€£¥]?)\s*(?=\.?\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:,\d{3})*(?!\d))")
_SEPARATORS = ";\t|,"
_SEPARATOR_LINE = re.compile(r'"?sep=([;,|\t:])"?[;,|\t]*\r?\n', re.IGNORECASE)
_QUOTED = re.compile(r'"[^"]*"')
_HEAD_SHOWN = 80
"""Letters of a header in a message."""
_COLUMN_NAME = re.compile(r"[^\W\d_]|\b(?:19|20)\d\d\b")


def read_page(
    path: Path, question: str, *, text: str = "", record_id: str | None = None, decimal: Mark | None = None
) -> FinQARecord:
    """Read a page and put a question to it.

    Args:
        path: The file. Its name decides its kind, or its content if the name does not.
        question: The question; that of a FinQA record is not read.
        text: Sentences before the table.
        record_id: Id of the record, if the file has several.
        decimal: Decimal separator of the table's numbers; detected if None. A FinQA record has points.

    Raises:
        DataError: The file cannot be read, has no table or several, has no number or one that can be read in two ways,
            or has no records though one is asked for.
    """
    if not question.strip():
        raise DataError("no question was asked", path=path, hint='put it last, in quotes: "What was ...?"')
    content = read_whole_text(path, hint=f"give {KINDS}", encoding_hint=_encoding_hint(path))
    kind = _kind(path, content)
    if kind == "json":
        page = _finqa(path, content, record_id)
        before = [*sentences([text]), *page.pre_text]
        return _with_numbers(page.model_copy(update={"pre_text": tuple(before), "qa": _asked(question)}), path)
    if record_id is not None:
        raise DataError(f"no FinQA file, so it has no record {record_id}", path=path, hint="leave out --id")
    sign = ""
    if kind == "csv":
        rows, above, sign = csv_page(path, content)
        tables, below = [rows], []
    elif kind == "html":
        parsed = HtmlPage(content)
        tables, above, below = parsed.tables, parsed.before, parsed.after
    else:
        tables, above, below = markdown_page(content)
    if len(tables) != 1 or not tables[0]:
        what = "holds no table" if not tables or not tables[0] else f"holds {len(tables)} tables"
        hint = "keep the one that the question is about" if len(tables) > 1 else f"give {KINDS}"
        raise DataError(what, path=path, hint=hint)
    table, texts = with_points(
        tables[0],
        [question, text, *above, *below],
        path=path,
        semicolons=sign == ";",
        comma_separated=sign == ",",
        mark=decimal,
    )
    end = 2 + len(above)
    page = FinQARecord(
        id=path.name,
        pre_text=tuple(sentences(texts[1:end])),
        post_text=tuple(sentences(texts[end:])),
        table=_even(table),
        qa=_asked(texts[0]),
    )
    return _with_numbers(page, path)


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
            if not _ABBREVIATION.search(line[start : end.start()]):
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
        raw = json.loads(content)
    except (ValueError, RecursionError):
        try:
            raw = [json.loads(line) for line in content.split("\n") if line.strip()]
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON ({error})", path=path) from None
    rows = raw if isinstance(raw, list) else [raw]
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


def _even(table: list[list[str]]) -> tuple[tuple[str, ...], ...]:
    width = max(map(len, table))
    rows = [[*row, *[""] * (width - len(row))] for row in table]
    return tuple((row[0], *map(_cell, row[1:])) for row in rows)


def _cell(text: str) -> str:
    text = _THOUSANDS.sub("", _DASH.sub("-", text.replace("\u2212", "-")))
    match = _BRACKETED.fullmatch(text.strip()) or _BRACKETED.fullmatch(_FOOTNOTE.sub("", text.strip()))
    if match is None:
        return _MINUS.sub(r"\1\2-\3", text, count=1) if _MINUS.match(text) else text
    sign, currency, number, percent = match.groups()
    return f"{sign or currency}-{number}{percent} ( {sign or currency}{number}{percent} )"


class CsvPage(NamedTuple):
    """The content of a CSV file.

    Attributes:
        rows: Rows of cells, the header first; empty if there is no table.
        above: Lines of one cell before the header.
        sign: The separator of the cells.
    """

    rows: list[list[str]]
    above: list[str]
    sign: str


def csv_page(path: Path, content: str) -> CsvPage:
    """Read a table.

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
    rows = [[" ".join(cell.split()) for cell in row] for _, row in numbered]
    start = _num_above(rows)
    above, table = [row[0] for row in rows[:start]], rows[start:]
    for (number, _), row in zip(numbered[start:], table, strict=True):
        # A comma in a number would have shifted the cells after it.
        if sign == "," and 1 < len(table[0]) < len(row) and any(row[len(table[0]) :]):
            problem = f"has {len(row)} cells where the header has {len(table[0])}"
            head = f"row {numbered[start][0]} was taken for the header: {' | '.join(table[0])[:_HEAD_SHOWN]}"
            raise DataError(problem, path=path, row=number, hint=f'put a cell with a comma in quotes: "1,250" ({head})')
    return CsvPage(table if len(table) > 1 else [], above, sign)


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
