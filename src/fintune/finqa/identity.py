"""Which page, report and company a FinQA record is about.

``ETR/2009/page_107.pdf-2`` is question 2 about page 107 of ETR's report of 2009.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from fintune.records import FinQARecord

Level: TypeAlias = Literal["page", "report", "company"]

LEVELS: tuple[Level, ...] = ("page", "report", "company")


def group_of(record_id: str, level: Level) -> str:
    """Return the page, report or company that a record id names.

    An id without "/" is its own page, report and company.
    """
    page = record_id.rpartition("-")[0] or record_id
    parts = page.split("/")
    keep = {"page": len(parts), "report": max(1, len(parts) - 1), "company": max(1, len(parts) - 2)}
    return "/".join(parts[: keep[level]])


def page_content(record: FinQARecord) -> Hashable:
    """The text and the table of a record: equal for two questions about one page, whatever their ids are."""
    return record.pre_text, record.table, record.post_text
