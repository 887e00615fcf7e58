"""The sentences and table rows that supply the operands of a gold program, for records without ``gold_inds``.

An operand in one unit of the page (a sentence or a table row) names that unit. An operand in several is taken from a
unit that another operand needs anyway, then from the unit that most open operands share, then from the one nearest to
the question in words (:func:`fintune.finqa.text_similarity.rank_lines`). An operand in the table's header belongs to
the rows below it. ``gold_inds`` treats it the same way: there the header goes with every row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fintune.finqa.execute import Table
from fintune.finqa.page import table_row_to_text
from fintune.finqa.text_similarity import rank_lines
from fintune.finqa.trace import trace

Agreement: TypeAlias = Literal["exact", "covers", "within", "overlaps", "apart"]

AGREEMENTS: tuple[Agreement, ...] = ("exact", "covers", "within", "overlaps", "apart")
"""Derived evidence compared with the annotated: the same, all of it and more, a part of it, some of it, none of it."""


@dataclass(frozen=True)
class DerivedEvidence:
    """The units of a page that supply a program's operands.

    Attributes:
        units: Text by key, as in ``gold_inds``: ``{"table_2": row in words, "text_0": sentence}``; table first.
        chosen: The operands that are in several units.
        missing: The operands that are nowhere on the page.
    """

    units: Mapping[str, str]
    chosen: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether there is evidence, and every operand has some."""
        return bool(self.units) and not self.missing


def derive(tokens: Sequence[str], table: Table, sentences: Sequence[str], question: str) -> DerivedEvidence:
    """Find the evidence of a program.

    Args:
        tokens: The official tokens, "EOF" included.
        table: Rows of cells.
        sentences: ``pre_text + post_text``.
        question: The question; it decides between units that are equal otherwise.
    """
    keys_of: dict[str, set[str]] = {}
    missing: list[str] = []
    for operand in (operand for step in trace(tokens, table, sentences).steps for operand in step.operands):
        if operand.kind == "elsewhere" and operand.text not in missing:
            missing.append(operand.text)
        if operand.kind in {"cell", "sentence", "row"}:
            keys_of[operand.text] = {f"table_{row}" for row, _ in operand.cells}
            keys_of[operand.text] |= {f"text_{k}" for k in operand.sentences}
    units = _units(table, sentences)
    chosen = tuple(text for text, keys in keys_of.items() if len(keys - {"table_0"}) > 1)
    kept = _cover(keys_of, _ranks(units, question))
    return DerivedEvidence({key: units[key] for key in units if key in kept}, chosen, tuple(missing))


def agreement(derived: Collection[str], annotated: Collection[str]) -> Agreement:
    """Compare the keys of derived evidence with those of annotated evidence."""
    keys, gold = set(derived), set(annotated)
    if keys == gold:
        return "exact"
    if keys > gold:
        return "covers"
    if keys and keys < gold:
        return "within"
    return "overlaps" if keys & gold else "apart"


def _units(table: Table, sentences: Sequence[str]) -> dict[str, str]:
    rows = {f"table_{k}": table_row_to_text(table[0], row) for k, row in enumerate(table)}
    return rows | {f"text_{k}": sentence for k, sentence in enumerate(sentences)}


def _ranks(units: Mapping[str, str], question: str) -> dict[str, int]:
    """Return the rank of each unit by relevance to the question, 0 for the most relevant."""
    keys = list(units)
    rows = [k for k, key in enumerate(keys) if key.startswith("table_")]
    return {keys[k]: position for position, k in enumerate(rank_lines(question, list(units.values()), rows))}


def _cover(keys_of: Mapping[str, Collection[str]], ranks: Mapping[str, int]) -> set[str]:
    """Choose units so that every operand is in one of them."""
    below_header = [set(keys) - {"table_0"} for keys in keys_of.values()]
    kept = {key for keys in below_header if len(keys) == 1 for key in keys}
    while still_open := [keys for keys in below_header if keys and not keys & kept]:
        shared = {key: sum(key in keys for keys in still_open) for keys in still_open for key in keys}
        kept.add(min(shared, key=lambda key: (-shared[key], ranks[key])))
    in_header = any(set(keys) == {"table_0"} for keys in keys_of.values())
    if in_header and not any(key.startswith("table_") for key in kept):
        rows = [key for key in ranks if key.startswith("table_") and key != "table_0"]
        kept.add(min(rows, key=lambda key: ranks[key], default="table_0"))
    return kept
