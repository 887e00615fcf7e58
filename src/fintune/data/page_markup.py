"""The lines of text and the tables of an HTML, Markdown or CSV file, in the order of the page.

Only what a browser shows is read. Markdown becomes HTML first (CommonMark with tables), so both have one reader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from fintune.data.page_table import Grid, GridCell, clean_text, num_figures
from fintune.errors import DataError

Block: TypeAlias = "str | Grid"
"""A line of text or a table."""

_BLOCKS = frozenset(
    """address article aside blockquote br caption center dd div dl dt fieldset figcaption figure footer form h1 h2 h3
    h4 h5 h6 header hr li main nav ol option p pre section summary table title tr ul""".split()  # noqa: SIM905
)
_UNSEEN = frozenset(("head", "ix:header", "ix:hidden", "noscript", "script", "style", "svg", "template"))
_BOXES = frozenset(("div", "p", "table", "tbody", "td", "th", "thead", "tr"))
_HIDING = re.compile(
    r"display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse)|mso-hide\s*:\s*all"
    r"|(?:font-size|opacity)\s*:\s*0(?:\.0*)?(?:[a-z%]*)\s*(?:!|;|$)"
)
_RAISING = re.compile(
    r"vertical-align\s*:\s*(?:super|text-top|\d*\.?[1-9])|(?:^|;)\s*(?:top\s*:\s*-|bottom\s*:\s*\d*\.?[1-9])"
)
_FONT_SIZE = re.compile(r"font-size\s*:\s*(?:(\d*\.?\d+)\s*(pt|px|em|rem|%)|smaller)")
_SMALL = 0.8
"""A font of at most this part of the font around it writes a mark that follows a word at once."""
_RULES = re.compile(r"(?:^|[}])\s*([^{}@]+)\{([^{}]*)(?=\})")
_AT_RULE = re.compile(r"@[^{};]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}")
_CLOSED_TAG = re.compile(
    r"<(?!(?:area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr)\b)([\w:.-]+)([^<>]*)/>", re.IGNORECASE
)
_MAX_COLSPAN = 1000
_MAX_PLACED = 2_000_000
"""Cells of a table, counted once for each of their rows."""

# Two of Unicode's private characters enclose raised text until its cell or line is complete.
_RAISED, _LOWERED = "\ue000", "\ue001"
_SIGN = r"[*\u2020\u2021\u00a7\u00b6#,;]+|\([^\W_]{1,4}\)|\[[^\[\]]{1,20}\]"
_MARK = rf"(?:\d{{1,3}}|[A-Za-z]|{_SIGN})"
_FOOTNOTE = rf"{_RAISED}\s*{_MARK}(?:[\s,;]+{_MARK}|{_SIGN})*\s*{_LOWERED}"
# Raised text before a stroke is the upper part of a fraction.
_FOOTNOTES = re.compile(rf"(\s*){_FOOTNOTE}(?:[\s,;]*{_FOOTNOTE})*(?!\s*[/\u2044])")
_TIMES_TEN = re.compile(r"[\u00d7\u00b7*xX]\s*10$")

# A product is no emphasis, and a year at the beginning of a line no number of a list.
_LONG_LIST_NUMBER = re.compile(r"^(\s{0,3}\d{4,9})([.)])(?=\s)", re.MULTILINE)
_PRODUCT = re.compile(r"(?<=\d)\*(?=\d)")
_PIPE = re.compile(r"(?<!\\)\|")


def html_blocks(content: str, path: Path) -> list[Block]:
    """Read an HTML page.

    Raises:
        DataError: It is nested too deeply, or a table's spans cover too many cells.
    """
    from lxml import etree

    if "<?xml" in content[:200] or "http://www.w3.org/1999/xhtml" in content[:5000]:
        content = _CLOSED_TAG.sub(r"<\1\2></\1>", content)
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    try:
        root = etree.fromstring(content.replace("\0", "").encode(), parser=parser)
    except etree.XMLSyntaxError as error:
        if "empty" in str(error):
            return []
        raise DataError(f"no HTML that can be read ({error.msg})", path=path) from None
    if root is None:
        return []
    deep = next((entry for entry in parser.error_log if "depth" in entry.message), None)
    if deep is not None:
        raise DataError(f"its tags are nested too deeply in line {deep.line}", path=path, hint="save the page again")
    return _HtmlReader(root, path).blocks


class _HtmlReader:
    """Walks over the elements of a page and collects its blocks."""

    def __init__(self, root: Any, path: Path) -> None:
        from lxml import etree

        self._path = path
        self._styles = _class_styles(root)
        self._sinks: list[list[Block]] = [[]]
        """Where text goes: the page, or the cells and tables that are open."""
        self._tables: list[_OpenTable] = []
        raised: list[Any] = []
        unseen = None
        walk = etree.iterwalk(root, events=("start", "end"))
        for event, node in walk:
            tag = node.tag if isinstance(node.tag, str) else ""
            if event == "start":
                style = self._style(node)
                if tag in _UNSEEN or node.get("hidden") is not None or _HIDING.search(style):
                    walk.skip_subtree()
                    unseen = node
                    continue
                self._open(tag, node)
                if tag == "sup" or (style and self._is_raised(node, tag, style)):
                    raised.append(node)
                    self._add(_RAISED)
                self._add_text(node.text)
            else:
                if node is not unseen:
                    if raised and raised[-1] is node:
                        raised.pop()
                        self._add(_LOWERED)
                    self._close(tag)
                self._add_text(node.tail)
        self.blocks = _lines(self._sinks[0])

    def _style(self, node: Any) -> str:
        names = [f".{name}" for name in (node.get("class") or "").split()] if self._styles else []
        rules = [self._styles[name.lower()] for name in (*names, f"#{node.get('id')}") if name.lower() in self._styles]
        own = node.get("style")
        return ";".join((*rules, own.lower())) if own else ";".join(rules)

    def _is_raised(self, node: Any, tag: str, style: str) -> bool:
        if tag in _BOXES:
            return False
        raising = _RAISING.search(style)
        if raising and ("vertical-align" in raising[0] or "relative" in style):
            return True
        size = _FONT_SIZE.search(style)
        before = self._sinks[-1][-1] if self._sinks[-1] else ""
        if not size or not isinstance(before, str) or not re.search(r"[\w)%]$", before):
            return False
        if size[1] is None:
            return True
        if size[2] in ("%", "em", "rem"):
            return float(size[1]) <= _SMALL * (100 if size[2] == "%" else 1)
        outer = next((found for found in map(self._font_size, node.iterancestors()) if found), None)
        return outer is not None and outer[2] == size[2] and float(size[1]) <= _SMALL * float(outer[1])

    def _font_size(self, node: Any) -> re.Match[str] | None:
        return _FONT_SIZE.search(self._style(node))

    def _add(self, text: str) -> None:
        self._sinks[-1].append(text)

    def _add_text(self, text: str | None) -> None:
        if text:
            self._add(re.sub(r"[ \t\r\n\f]+", " ", text.replace(_RAISED, " ").replace(_LOWERED, " ")))

    def _open(self, tag: str, node: Any) -> None:
        if tag == "table":
            self._tables.append(_OpenTable())
            self._sinks.append(self._tables[-1].loose)
        elif self._tables and tag == "caption":
            self._sinks.append(self._tables[-1].caption)
        elif self._tables and tag == "tr":
            self._tables[-1].rows.append([])
        elif self._tables and tag in ("td", "th"):
            self._sinks.append(self._tables[-1].cell(_span(node.get("colspan")) or 1, _span(node.get("rowspan"))))
        elif tag in _BLOCKS:
            self._add("\n")

    def _close(self, tag: str) -> None:
        if tag == "table":
            self._sinks.pop()
            self._sinks[-1] += ["\n", *self._tables.pop().blocks(self._path), "\n"]
        elif self._tables and tag in ("td", "th", "caption"):
            self._sinks.pop()
        elif tag in _BLOCKS:
            self._add("\n")


class _OpenTable:
    """A table while it is read."""

    def __init__(self) -> None:
        self.caption: list[Block] = []
        self.loose: list[Block] = []
        self.rows: list[list[tuple[int, int, list[Block]]]] = []

    def cell(self, columns: int, rows: int) -> list[Block]:
        if not self.rows:
            self.rows.append([])
        self.rows[-1].append((columns, rows, []))
        return self.rows[-1][-1][2]

    def blocks(self, path: Path) -> Iterator[Block]:
        """Yield the caption, then the table, or its text if it only arranges other things, then text in no cell."""
        yield " ".join(line for line in _lines(self.caption) if isinstance(line, str)) + "\n"
        grid = _place(self.rows, path)
        contents = [content for row in self.rows for _, _, content in row]
        inner = [block for content in contents for block in content if isinstance(block, Grid)]
        own, most = num_figures(grid), max(map(num_figures, inner), default=0)
        if own and own >= most:
            yield grid
            for other in inner:
                yield from (f"{' '.join(cell.text for cell in row)}\n" for row in other.rows)
        elif most:
            for content in contents:
                yield from (*content, "\n")
        else:
            for row in grid.rows:
                texts = list(dict.fromkeys(row))
                # A bullet or a number belongs to the line that it begins.
                is_list = len(texts) > 1 and len(texts[0].text) <= 5 and not texts[0].text.isalpha()
                yield (" " if is_list else "\n").join(cell.text for cell in texts) + "\n"
        yield from ("\n", *self.loose)


def _place(rows: Sequence[Sequence[tuple[int, int, list[Block]]]], path: Path) -> Grid:
    """Return the cells with their columns; a cell over several rows is in each of them."""
    placed: list[tuple[GridCell, ...]] = []
    marks: list[str] = []
    open_cells: list[tuple[int, int, int, GridCell | None]] = []  # start, end, rows left, and the cell
    total = 0
    for number, row in enumerate(rows):
        now = sorted(open_cells, key=lambda item: item[0])
        taken = [(start, end) for start, end, _, _ in now]
        column = at = 0
        for colspan, rowspan, content in row:
            while at < len(taken) and taken[at][0] <= column:
                column = max(column, taken[at][1])
                at += 1
            text = _cell_text(content, is_figure=column > 0, marks=marks)
            cell = GridCell(column, column + colspan, text) if text else None
            now.append((column, column + colspan, min(rowspan or len(rows), len(rows) - number), cell))
            column += colspan
        placed.append(tuple(sorted((cell for _, _, _, cell in now if cell), key=lambda cell: cell.start)))
        open_cells = [(start, end, left - 1, cell) for start, end, left, cell in now if left > 1]
        total += len(now)
        if total > _MAX_PLACED:
            raise DataError(f"a table's cells span more than {_MAX_PLACED} places", path=path)
    return Grid(tuple(row for row in placed if row), tuple(marks))


def _cell_text(content: Sequence[Block], *, is_figure: bool, marks: list[str]) -> str:
    text = "".join(block for block in content if isinstance(block, str))
    lines = (_plain(line, is_figure=is_figure, marks=marks) for line in text.split("\n"))
    return "\n".join(filter(None, lines))


def _lines(content: Sequence[Block]) -> list[Block]:
    """Join pieces of text to lines."""
    blocks: list[Block] = []
    words: list[str] = []
    for block in (*content, Grid()):
        if isinstance(block, str):
            words.append(block)
            continue
        blocks += filter(None, (_plain(line, is_figure=False, marks=[]) for line in "".join(words).split("\n")))
        words = []
        blocks.append(block)
    return blocks[:-1]


def _plain(text: str, *, is_figure: bool, marks: list[str]) -> str:
    """Return a line without raised footnote marks after a word. In the cell of a figure, also before it."""
    if _RAISED not in text:
        return clean_text(text)

    def remove(match: re.Match[str]) -> str:
        before = text[: match.start()].strip()
        if _TIMES_TEN.search(before[-8:]) or not (is_figure or before):
            return match[0]
        marks.append(clean_text(re.sub(f"[{_RAISED}{_LOWERED}]", "", match[0])))
        return " " if match[1] or text[match.end() : match.end() + 1].isalnum() else ""

    return clean_text(re.sub(f"[{_RAISED}{_LOWERED}]", " ", _FOOTNOTES.sub(remove, text)))


def _span(value: str | None) -> int:
    digits = (value or "").strip()
    return min(int(digits[:9]), _MAX_COLSPAN) if digits.isdecimal() and digits.isascii() else 1


def _class_styles(root: Any) -> dict[str, str]:
    """Return the style of every ``.class`` and ``#id`` that a style sheet of the page hides or raises."""
    styles: dict[str, str] = {}
    for sheet in root.iter("style"):
        for selectors, style in _RULES.findall(_AT_RULE.sub("", (sheet.text or "").lower())):
            if _HIDING.search(style) or _RAISING.search(style):
                names = (re.fullmatch(r"[a-z0-9]*([.#][\w-]+)", selector.strip()) for selector in selectors.split(","))
                styles |= {name[1]: style for name in names if name}
    return styles


def markdown_blocks(content: str, path: Path) -> list[Block]:
    """Read a Markdown page; HTML in it is read, too.

    Raises:
        DataError: A row has more cells than the header of its table, or figures and fewer cells.
    """
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": True}).enable("table").disable("code")
    content = _LONG_LIST_NUMBER.sub(r"\1\\\2", _PRODUCT.sub(r"\\*", content))
    tokens = markdown.parse(content)
    lines = re.split(r"\r\n?|\n", content)  # as markdown-it counts them; splitlines also cuts at a form feed
    num_cells = 0
    for token in tokens:
        if token.type == "table_open" and token.map:
            num_cells = len(_pipes(lines[token.map[0]]))
        elif token.type == "tr_open" and token.map:
            cells = _pipes(lines[token.map[0]])
            is_short = len(cells) < num_cells and any(map(str.isdigit, "".join(cells[1:])))
            if any(cells[num_cells:]) or is_short:
                problem = f"has {len(cells)} cells where the header has {num_cells}"
                hint = r"write a bar inside a cell as \| and leave no cell out"
                raise DataError(problem, path=path, row=token.map[0] + 1, hint=hint)
    return html_blocks(markdown.renderer.render(tokens, markdown.options, {}), path)


def _pipes(line: str) -> list[str]:
    inside = line.strip().removeprefix("|")
    inside = inside[:-1] if inside.endswith("|") and not inside.endswith("\\|") else inside
    return [cell.strip() for cell in _PIPE.split(inside)]


def is_markdown(content: str) -> bool:
    """Whether a table with pipes seems to be in a text."""
    rules = (set(line) for line in content.splitlines())
    return any({"|", "-"} <= rule <= set(" \t|:-") for rule in rules)
