"""What a FinQA id says: ``ETR/2009/page_107.pdf-2`` is question 2 about page 107 of ETR's report of 2009."""

from __future__ import annotations

from typing import Literal, TypeAlias

Level: TypeAlias = Literal["page", "report", "company"]

LEVELS: tuple[Level, ...] = ("page", "report", "company")


def group_of(record_id: str, level: Level) -> str:
    """The page, report or company that a record is about.

    An id in another form is cut as far as it goes; what has no "/" is a page, a report and a company of its own.
    """
    page = record_id.rpartition("-")[0] or record_id
    parts = page.split("/")
    keep = {"page": len(parts), "report": max(1, len(parts) - 1), "company": max(1, len(parts) - 2)}
    return "/".join(parts[: keep[level]])
