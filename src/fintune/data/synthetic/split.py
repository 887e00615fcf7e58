"""Splits that no company crosses."""

from __future__ import annotations

from collections.abc import Iterable

from fintune.records import FinQARecord


def company_of(record_id: str) -> str:
    """The ticker of an id ``TICKER/YEAR/page_N.pdf-K``."""
    return record_id.partition("/")[0]


def split_by_company(records: Iterable[FinQARecord], *, num_train: int) -> tuple[list[FinQARecord], list[FinQARecord]]:
    """The records of the first ``num_train`` companies, and those of all others.

    Args:
        records: In any order; companies count in the order of their first record.
        num_train: Companies of the first part.
    """
    number: dict[str, int] = {}
    parts: tuple[list[FinQARecord], list[FinQARecord]] = ([], [])
    for record in records:
        place = number.setdefault(company_of(record.id), len(number))
        parts[place >= num_train].append(record)
    return parts
