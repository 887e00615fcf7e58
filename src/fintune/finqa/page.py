"""A report page in FinQA's terms: sentences ``text_0 … text_n``, table rows ``table_0 … table_m``, and its identity.

``text_k`` is sentence k of the text before and after the table together. ``table_k`` is row k of the table, with the
header as row 0. These are the keys of ``gold_inds``; they follow the preprocessing of github.com/czyssrs/FinQA.

A record id names its page: ``ETR/2009/page_107.pdf-2`` is question 2 about page 107 of ETR's report of 2009.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

from fintune.errors import DataError
from fintune.finqa.cleaning import Edit, TextKind, clean, restore
from fintune.records import FinQARecord

Level: TypeAlias = Literal["page", "report", "company"]

LEVELS: tuple[Level, ...] = ("page", "report", "company")


@dataclass(frozen=True)
class PageUnit:
    """A sentence or a table row.

    Attributes:
        kind: "text" or "table".
        index: The k of ``text_k`` or ``table_k``.
        text: The sentence, or the row in words (:func:`table_row_to_text`).
    """

    kind: Literal["text", "table"]
    index: int
    text: str

    @property
    def key(self) -> str:
        """The name of the unit in ``gold_inds``, such as ``"table_2"``."""
        return f"{self.kind}_{self.index}"


def table_row_to_text(header: Sequence[str], row: Sequence[str]) -> str:
    """Return a row in words: ``(in millions) the revenue of 2009 is $ 12 ; the revenue of 2008 is 10 ;``.

    Args:
        header: Cells of row 0. The first one, if not empty, is put before the rest.
        row: Cells of the row; cell 0 is its name.
    """
    name = row[0] if row else ""
    corner = header[0] if header else ""
    cells = (f"the {name} of {column} is {cell} ;" for column, cell in zip(header[1:], row[1:], strict=False))
    # Only spaces are merged, as in the official code. Other white space in a cell stays.
    return " ".join(part for part in " ".join((corner, *cells)).split(" ") if part)


def page_units(record: FinQARecord) -> tuple[PageUnit, ...]:
    """Return all units in the order of the page: text before the table, table with header, text after the table."""
    return units_of_page(record.pre_text, record.table, record.post_text)


def units_of_page(
    pre_text: Sequence[str], table: Sequence[Sequence[str]], post_text: Sequence[str]
) -> tuple[PageUnit, ...]:
    """Return what :func:`page_units` returns, for the parts of a page."""
    num_before = len(pre_text)
    before = [PageUnit("text", k, text) for k, text in enumerate(pre_text)]
    rows = [PageUnit("table", k, table_row_to_text(table[0], row)) for k, row in enumerate(table)]
    after = [PageUnit("text", num_before + k, text) for k, text in enumerate(post_text)]
    return (*before, *rows, *after)


def count_edits(record: FinQARecord) -> Counter[str]:
    """Count the changes that :func:`clean_record` makes, by rule, in the order in which the rules are met."""
    rules = Counter(_page_rules(record.pre_text, record.table, record.post_text))
    rules.update(edit.rule for edit in clean(record.qa.question, "question")[1])
    return rules


@lru_cache(64)  # several questions are asked about a page
def _page_rules(
    pre_text: tuple[str, ...], table: tuple[tuple[str, ...], ...], post_text: tuple[str, ...]
) -> tuple[str, ...]:
    texts = _page_texts(pre_text, table, post_text)
    return tuple(edit.rule for kind, text in texts if kind is not None for edit in clean(text, kind)[1])


def clean_record(record: FinQARecord) -> tuple[FinQARecord, tuple[tuple[Edit, ...], ...]]:
    """Clean the texts of a record; return it with the edits of every text.

    The order of the edits is text before the table, table, text after the table, question. A sentence that is left out
    becomes empty, so that ``gold_inds`` still names the same sentences. First cells of rows, program, answer and
    evidence do not change. See `fintune.finqa.cleaning`.
    """
    results = [(text, ()) if kind is None else clean(text, kind) for kind, text in _texts(record)]
    return _filled(record, [text for text, _ in results]), tuple(edits for _, edits in results)


def restore_record(cleaned: FinQARecord, edits: Sequence[Sequence[Edit]]) -> FinQARecord:
    """Undo the changes of `clean_record`.

    Raises:
        DataError: The edits are those of another record.
    """
    texts = [text for _, text in _texts(cleaned)]
    if len(texts) != len(edits):
        raise DataError(f"edits of {len(edits)} texts for a record of {len(texts)}", record_id=cleaned.id)
    return _filled(cleaned, [restore(text, changes) for text, changes in zip(texts, edits, strict=True)])


def _texts(record: FinQARecord) -> list[tuple[TextKind | None, str]]:
    """Return all texts with their kinds; the name of a row has none."""
    page = _page_texts(record.pre_text, record.table, record.post_text)
    return [*page, ("question", record.qa.question)]


def _page_texts(
    pre_text: Sequence[str], table: Sequence[Sequence[str]], post_text: Sequence[str]
) -> list[tuple[TextKind | None, str]]:
    cells: list[tuple[TextKind | None, str]] = [("cell" if k else None, c) for row in table for k, c in enumerate(row)]
    before: list[tuple[TextKind | None, str]] = [("sentence", text) for text in pre_text]
    after: list[tuple[TextKind | None, str]] = [("sentence", text) for text in post_text]
    return [*before, *cells, *after]


def _filled(record: FinQARecord, texts: Sequence[str]) -> FinQARecord:
    """Return the record with other texts, in the order of `_texts`."""
    remaining = iter(texts)
    pre_text = tuple(next(remaining) for _ in record.pre_text)
    table = tuple(tuple(next(remaining) for _ in row) for row in record.table)
    post_text = tuple(next(remaining) for _ in record.post_text)
    qa = record.qa.model_copy(update={"question": next(remaining)})
    return record.model_copy(update={"pre_text": pre_text, "table": table, "post_text": post_text, "qa": qa})


def group_of(record_id: str, level: Level) -> str:
    """Return the page, report or company that a record id names.

    An id without "/" is its own page, report and company.
    """
    page = record_id.rpartition("-")[0] or record_id
    parts = page.split("/")
    keep = {"page": len(parts), "report": max(1, len(parts) - 1), "company": max(1, len(parts) - 2)}
    return "/".join(parts[: keep[level]])


def page_content(record: FinQARecord) -> Hashable:
    """Return the text and the table of a record; they are equal for two questions about one page, whatever the ids."""
    return record.pre_text, record.table, record.post_text
