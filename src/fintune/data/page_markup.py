"""Tables and text of an HTML page, with the standard library's parser, and of a Markdown page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_BLOCKS = frozenset(
    """address article aside blockquote br caption center dd div dl dt fieldset figcaption figure footer form h1 h2 h3
    h4 h5 h6 header hr li main nav ol option p pre section summary title ul""".split()  # noqa: SIM905
)
_HIDDEN = {"script", "style", "template", "noscript", "head"}
_MAX_SPAN = 100
# Two of Unicode's private characters enclose raised text until its cell or line is complete.
_RAISED, _LOWERED = "\ue000", "\ue001"
_SIGN = r"[*\u2020\u2021\u00a7\u00b6#,;]+|\([^\W_]{1,4}\)|\[[^\[\]]{1,20}\]"
_MARK = rf"(?:\d{{1,3}}|[A-Za-z]|{_SIGN})"
_FOOTNOTE = rf"{_RAISED}\s*{_MARK}(?:[\s,;]+{_MARK}|{_SIGN})*\s*{_LOWERED}"
# Raised text before a stroke is the upper part of a fraction.
_FOOTNOTES = re.compile(rf"(\s*){_FOOTNOTE}(?:[\s,;]*{_FOOTNOTE})*(?!\s*[/\u2044])")
_TIMES_TEN = re.compile(r"[\u00d7\u00b7*xX]\s*10$")
_LEADING, _TRAILING = {"$", "€", "£", "¥", "(", "$(", "-"}, {")", "%", ")%", "%)"}
_RULE = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*")
# A figure in a cell may begin with a minus or ">", so these are looked for in lines of text alone.
_LINE_MARK = re.compile(r"^\s*(?:#{1,6}\s+|[-*+]\s+|>\s?|\d{1,3}[.)]\s+)")
# Underscores inside a word belong to it, and a star between two digits multiplies.
_MARKS = re.compile(
    r"\\([!-/:-@\[-`{-~])|!?\[([^\]]*)\]\([^)]*\)"
    r"|`{1,3}(?=\S)|(?<=\S)`{1,3}|(?<!\d)\*{1,3}(?=\S)|(?<=\S)\*{1,3}(?!\d)|(?<!\w)_{1,3}(?=\S)|(?<=\S)_{1,3}(?!\w)"
)
_HTML = re.compile(r"&[#\w]+;|</?[a-z]+[\s/>]|<!--", re.IGNORECASE)
_HTML_TABLE = "<table"


class HtmlPage(HTMLParser):
    """Reads a page; see the attributes afterwards. A table that nothing closes ends with the page.

    Attributes:
        tables: Cells of every innermost table with figures, rows in order; a cell over several columns or rows is in
            the first one, and the others are empty. Raised footnote marks are left out, as in the text.
        before: Lines of text before the first table, its caption the last of them.
        after: Lines of text after it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[list[list[str]]] = []
        self.before: list[str] = []
        self.after: list[str] = []
        self._open: list[_Table] = []
        self._hidden: list[str] = []
        self._words: list[str] = []
        self.feed(text)
        self.close()
        self._end_line()
        while self._open:
            loose = self._open[-1].loose
            self.handle_endtag("table")
            self._words.extend(loose)
            self._end_line()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open what the tag opens."""
        if tag in _HIDDEN:
            self._hidden.append(tag)
        if tag == "table":
            self._end_line()
            if self._open:
                self._open[-1].is_outer = True
            self._open.append(_Table())
        elif self._open and tag == "caption":
            self._open[-1].start_caption()
        elif self._open and tag == "tr":
            self._open[-1].start_row()
        elif self._open and tag in ("td", "th"):
            spans = dict(attrs)
            self._open[-1].start_cell(_span(spans.get("colspan")), _span(spans.get("rowspan")))
        elif tag == "sup":
            self._add(_RAISED)
        elif tag in _BLOCKS:
            self._end_line()

    def handle_endtag(self, tag: str) -> None:
        """Close what the tag closes."""
        if tag in self._hidden:
            while self._hidden.pop() != tag:
                pass
        if tag == "table" and self._open:
            table = self._open.pop()
            rows = _joined(table.rows())
            if caption := _plain("".join(table.caption)):
                self._lines().append(caption)
            if has_figures(rows) and not table.is_outer:
                self.tables.append(rows)
            else:
                # Pages use tables for layout, too: what is in them is text.
                for cell in (cell for row in rows for cell in row):
                    self._words.append(cell)
                    self._end_line()
        elif tag in ("td", "th", "tr", "caption") and self._open:
            self._open[-1].end_cell()
        elif tag == "sup":
            self._add(_LOWERED)
        elif tag in _BLOCKS:
            self._end_line()

    def handle_data(self, data: str) -> None:
        """Take text."""
        self._add(data.replace(_RAISED, " ").replace(_LOWERED, " "))

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Pass over ``<![endif]-->`` and the like as browsers do, up to the next ``>``."""
        if self.rawdata.startswith("<![CDATA[", i):
            return super().parse_marked_section(i, report)
        return self.rawdata.find(">", i) + 1 or -1

    def _add(self, text: str) -> None:
        if self._hidden:
            return
        if self._open:
            self._open[-1].add(text)
        else:
            self._words.append(text)

    def _end_line(self) -> None:
        if self._open:
            self._open[-1].add(" ")
            return
        line = _plain("".join(self._words))
        self._words = []
        if line:
            self._lines().append(line)

    def _lines(self) -> list[str]:
        return self.after if self.tables else self.before


class _Table:
    """A table while it is read."""

    def __init__(self) -> None:
        self.is_outer = False
        self.loose: list[str] = []
        """Text in no cell."""
        self.caption: list[str] = []
        self._rows: list[dict[int, list[str]]] = []
        self._taken: set[tuple[int, int]] = set()
        self._cell: list[str] | None = None

    def start_caption(self) -> None:
        self._cell = self.caption

    def start_row(self) -> None:
        self._cell = None
        self._rows.append({})

    def start_cell(self, columns: int, rows: int) -> None:
        if not self._rows:
            self._rows.append({})
        row = len(self._rows) - 1
        column = 0
        while (row, column) in self._taken:
            column += 1
        self._taken |= {(row + down, column + right) for down in range(rows) for right in range(columns)}
        self._cell = self._rows[-1].setdefault(column, [])

    def end_cell(self) -> None:
        self._cell = None

    def add(self, text: str) -> None:
        if self._cell is not None:
            self._cell.append(text)
        else:
            self.loose.append(text)

    def rows(self) -> list[list[str]]:
        width = 1 + max((column for _, column in self._taken), default=-1)
        cells = [[_plain("".join(row.get(k, ())), is_figure=k > 0) for k in range(width)] for row in self._rows]
        return [row for row in cells if any(row)]


def _plain(text: str, *, is_figure: bool = False) -> str:
    """Return text in one line, without raised footnote marks after a word. In the cell of a figure, also before it."""

    def remove(match: re.Match[str]) -> str:
        before = text[: match.start()].strip()
        if _TIMES_TEN.search(before) or not (is_figure or before):
            return match[0]
        return " " if match[1] or text[match.end() : match.end() + 1].isalnum() else ""

    whole = _FOOTNOTES.sub(remove, text)
    return " ".join(whole.replace(_RAISED, " ").replace(_LOWERED, " ").split())


def _span(value: str | None) -> int:
    return min(max(int(value), 1), _MAX_SPAN) if value and value.strip().isdecimal() else 1


def _joined(table: list[list[str]]) -> list[list[str]]:
    """Cells that hold only a sign go to their number, and columns that are then empty go away."""
    rows = []
    for row in table:
        cells = list(row)
        for k, cell in enumerate(cells):
            after = next((n for n in range(k + 1, len(cells)) if cells[n]), None)
            before = next((n for n in range(k - 1, 0, -1) if cells[n]), None)
            if k and cell in _LEADING and after is not None and any(map(str.isdigit, cells[after])):
                cells[k], cells[after] = "", f"{cell} {cells[after]}"
            elif k and cell in _TRAILING and before is not None and any(map(str.isdigit, cells[before])):
                cells[k], cells[before] = "", f"{cells[before]} {cell}"
        rows.append(cells)
    return _together(rows)


def _together(rows: list[list[str]]) -> list[list[str]]:
    """Columns that no row fills together with the one on their left are one column: pages set figures apart by them."""
    if not rows:
        return rows
    kept: list[list[str]] = []
    for column in map(list, zip(*rows, strict=True)):
        if kept and len(kept) > 1 and not any(a and b for a, b in zip(kept[-1], column, strict=True)):
            kept[-1] = [a or b for a, b in zip(kept[-1], column, strict=True)]
        elif any(column) or not kept:
            kept.append(column)
    return [list(row) for row in zip(*kept, strict=True)]


def has_figures(table: list[list[str]]) -> bool:
    """Whether a table has digits in other cells than its header and the names of its rows."""
    return any(any(map(str.isdigit, cell)) for row in table[1:] for cell in row[1:])


def markdown_page(content: str) -> tuple[list[list[list[str]]], list[str], list[str]]:
    """Read a page: its tables with figures, and the lines of text before the first of them and after it.

    Where no table is written with pipes, those in HTML are taken.
    """
    tables, above, below = _piped(content)
    start = content.lower().find(_HTML_TABLE)
    if tables or start < 0:
        return tables, above, below
    end = content.lower().rfind("</table>")
    page = HtmlPage(content[start : end if end > start else len(content)])
    rest = content[end + len("</table>") :] if end > start else ""
    return page.tables, [*_lines(content[:start]), *page.before], [*page.after, *_lines(rest)]


def is_markdown(content: str) -> bool:
    """Whether a table with pipes seems to be in a text."""
    return any(_RULE.fullmatch(line) and "|" in line for line in content.splitlines())


def _piped(content: str) -> tuple[list[list[list[str]]], list[str], list[str]]:
    lines = content.splitlines()
    tables: list[list[list[str]]] = []
    above: list[str] = []
    below: list[str] = []
    at = 0
    while at < len(lines):
        is_header = "|" in lines[at] and at + 1 < len(lines) and "-" in lines[at + 1] and _RULE.fullmatch(lines[at + 1])
        if not is_header:
            (below if tables else above).extend(_lines(lines[at]))
            at += 1
            continue
        rows = [_pipes(lines[at])]
        at += 2
        while at < len(lines) and "|" in lines[at]:
            rows.append(_pipes(lines[at]))
            at += 1
        if has_figures(rows):
            tables.append(rows)
        else:
            (below if tables else above).extend(cell for row in rows for cell in row)
    return tables, above, below


def _lines(text: str) -> list[str]:
    return [_without_marks(_LINE_MARK.sub("", line, count=1)) for line in text.splitlines()]


def _pipes(line: str) -> list[str]:
    inside = line.strip().removeprefix("|")
    inside = inside[:-1] if inside.endswith("|") and not inside.endswith("\\|") else inside
    return [_without_marks(cell.replace("\\|", "|")).strip() for cell in re.split(r"(?<!\\)\|", inside)]


def _without_marks(text: str) -> str:
    if _HTML.search(text) and _HTML_TABLE not in text.lower():
        page = HtmlPage(text)
        text = " ".join(page.before)
    return _MARKS.sub(lambda match: match[1] or (_without_marks(match[2]) if match[2] else ""), text)
