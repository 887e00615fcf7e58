"""Tables and text of a Markdown page."""

from __future__ import annotations

import re

from fintune.data.html_page import HtmlPage, has_figures

_RULE = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*")
# A figure in a cell may begin with a minus or ">", so these are looked for in lines of text alone.
_LINE_MARK = re.compile(r"^\s*(?:#{1,6}\s+|[-*+]\s+|>\s?|\d{1,3}[.)]\s+)")
# Underscores inside a word belong to it, and a star between two digits multiplies.
_MARKS = re.compile(
    r"\\([!-/:-@\[-`{-~])|!?\[([^\]]*)\]\([^)]*\)"
    r"|`{1,3}(?=\S)|(?<=\S)`{1,3}|(?<!\d)\*{1,3}(?=\S)|(?<=\S)\*{1,3}(?!\d)|(?<!\w)_{1,3}(?=\S)|(?<=\S)_{1,3}(?!\w)"
)
_HTML = re.compile(r"&[#\w]+;|</?[a-z]+[\s/>]|<!--", re.IGNORECASE)
_TABLE = "<table"


def markdown_page(content: str) -> tuple[list[list[list[str]]], list[str], list[str]]:
    """Read a page: its tables with figures, and the lines of text before the first of them and behind it.

    Where no table is written with pipes, those in HTML are taken.
    """
    tables, above, below = _piped(content)
    start = content.lower().find(_TABLE)
    if tables or start < 0:
        return tables, above, below
    end = content.lower().rfind("</table>")
    page = HtmlPage(content[start : end if end > start else len(content)])
    behind = content[end + len("</table>") :] if end > start else ""
    return page.tables, [*_lines(content[:start]), *page.before], [*page.after, *_lines(behind)]


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
    if _HTML.search(text) and _TABLE not in text.lower():
        page = HtmlPage(text)
        text = " ".join(page.before)
    return _MARKS.sub(lambda found: found[1] or (_without_marks(found[2]) if found[2] else ""), text)
