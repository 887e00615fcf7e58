"""An audit for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from fintune.evaluation.audit import KINDS, SplitAudit
from fintune.evaluation.overlap import NEAR, Overlap
from fintune.finqa.evidence import Agreement

_SHARED = {
    "id": "ids",
    "page": "pages",
    "report": "reports",
    "company": "companies",
    "page_text": "pages of the same text",
    "question": "questions of the same words",
    "near_question": f"pairs of questions that share {NEAR:.0%} of their words",
    "question_and_program": "questions with the same program",
}

_AGREEMENT: Mapping[Agreement, str] = {
    "exact": "the same",
    "covers": "all of it and more",
    "within": "a part of it",
    "overlaps": "a part of it and other",
    "apart": "other",
}


def findings_table(splits: Mapping[str, SplitAudit]) -> Table:
    """Findings by kind, a column a file, and an id to look at; kinds that no file has are left out."""
    table = _table("", *splits, "for example")
    sizes = {"records": "num_records", "pages": "num_pages", "reports": "num_reports", "companies": "num_companies"}
    for name, attribute in sizes.items():
        table.add_row(name, *(f"{getattr(audit, attribute)}" for audit in splits.values()), "")
    for reason in sorted({reason for audit in splits.values() for reason in audit.dropped}):
        table.add_row(f"dropped: {reason}", *(str(audit.dropped.get(reason, 0)) for audit in splits.values()), "")
    table.add_section()
    for kind, meaning in KINDS.items():
        ids = [audit.findings[kind] for audit in splits.values()]
        example = next((found[0] for found in ids if found), "")
        style = "" if example else "dim"
        table.add_row(meaning, *(str(len(found)) for found in ids), example, style=style)
    return table


def evidence_table(splits: Mapping[str, SplitAudit]) -> Table:
    """Derived evidence against the annotated, a column a file."""
    table = _table("evidence derived from the operands", *splits)
    rows = {name: audit.evidence for name, audit in splits.items()}
    table.add_row("records with gold_inds", *(str(each.num_annotated) for each in rows.values()))
    for kind, meaning in _AGREEMENT.items():
        counts = [(each.agreement[kind], each.num_annotated) for each in rows.values()]
        table.add_row(f"  derived: {meaning}", *(_share(*count) for count in counts))
    clear = [(each.unambiguous, each.num_unambiguous) for each in rows.values()]
    foreign = [(found["overlaps"] + found["apart"], number) for found, number in clear]
    table.add_row("every operand in one place", *(str(number) for _, number in clear))
    table.add_row("  derived: something other", *(_share(*count) for count in foreign))
    table.add_row("records without gold_inds", *(str(each.num_derived + each.num_without) for each in rows.values()))
    table.add_row("  derived for every operand", *(str(each.num_derived) for each in rows.values()))
    return table


def overlap_table(overlap: Overlap) -> Table:
    """What two files share."""
    first, second = overlap.first, overlap.second
    table = _table(f"{first} and {second} share", "number", f"records of {first}", f"of {second}", "for example")
    for name, meaning in _SHARED.items():
        shared = overlap.shared[name]
        example = shared.second_ids[0] if shared.second_ids else ""
        counts = (shared.num, shared.num_first, shared.num_second)
        table.add_row(meaning, *map(str, counts), example, style="" if shared.num else "dim")
    return table


def splits_table(rows: Sequence[tuple[str, int, int, int, int]], by: str) -> Table:
    """New splits: file, records before and now, how many came from another file, reports or companies."""
    table = _table("written", "records before", "now", "came from another", f"{by} groups")
    for name, *numbers in rows:
        table.add_row(name, *map(str, numbers))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first, *others, box=None, pad_edge=False)
    for column, name in zip(table.columns[1:], others, strict=True):
        column.justify = "left" if name == "for example" else "right"
        column.no_wrap = name == "for example"
    return table


def _share(number: int, total: int) -> str:
    return f"{number} ({number / total:.1%})" if total else str(number)
