"""Which sentences and table rows supply the operands of a gold program, where ``gold_inds`` does not say.

An operand that stands in one place names it. One that stands in several is taken from a place that another operand
needs anyway, then from the place that most open operands share, then from the one nearest to the question in words
(:func:`fintune.finqa.text_similarity.rank_lines`). An operand in the table's header belongs to the rows below it, as in
``gold_inds``, where the header goes with every row.
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
"""Derived evidence against the annotated: the same; all of it and more; only of it; some of it; none of it."""


@dataclass(frozen=True)
class DerivedEvidence:
    """What supplies a program's operands.

    Attributes:
        units: Text by key, as in ``gold_inds``, ``{"table_2": row in words, "text_0": sentence}``; table first.
        chosen: Those operands that stand in several places.
        missing: Those that stand nowhere on the page.
    """

    units: Mapping[str, str]
    chosen: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether there is evidence, and for every operand."""
        return bool(self.units) and not self.missing


def derive(tokens: Sequence[str], table: Table, sentences: Sequence[str], question: str) -> DerivedEvidence:
    """Find the evidence of a program.

    Args:
        tokens: Official tokens, "EOF" included.
        table: Rows of cells.
        sentences: ``pre_text + post_text``.
        question: Decides between places that are equal otherwise.
    """
    places: dict[str, set[str]] = {}
    missing: list[str] = []
    for operand in (each for step in trace(tokens, table, sentences).steps for each in step.operands):
        if operand.kind == "elsewhere" and operand.text not in missing:
            missing.append(operand.text)
        if operand.kind in {"cell", "sentence", "row"}:
            places[operand.text] = {f"table_{row}" for row, _ in operand.cells}
            places[operand.text] |= {f"text_{k}" for k in operand.sentences}
    units = _units(table, sentences)
    nearness = _nearness(units, question)
    chosen = tuple(text for text, found in places.items() if len(found - {"table_0"}) > 1)
    kept = _cover(places, nearness)
    return DerivedEvidence({key: units[key] for key in units if key in kept}, chosen, tuple(missing))


def agreement(derived: Collection[str], annotated: Collection[str]) -> Agreement:
    """How derived evidence stands to the annotated, both as keys."""
    found, gold = set(derived), set(annotated)
    if found == gold:
        return "exact"
    if found > gold:
        return "covers"
    if found and found < gold:
        return "within"
    return "overlaps" if found & gold else "apart"


def _units(table: Table, sentences: Sequence[str]) -> dict[str, str]:
    rows = {f"table_{k}": table_row_to_text(table[0], row) for k, row in enumerate(table)}
    return rows | {f"text_{k}": sentence for k, sentence in enumerate(sentences)}


def _nearness(units: Mapping[str, str], question: str) -> dict[str, int]:
    """Place of each unit in the order of relevance, 0 for the most relevant."""
    keys = list(units)
    rows = [k for k, key in enumerate(keys) if key.startswith("table_")]
    return {keys[k]: place for place, k in enumerate(rank_lines(question, list(units.values()), rows))}


def _cover(places: Mapping[str, Collection[str]], nearness: Mapping[str, int]) -> set[str]:
    open_places = [set(found) - {"table_0"} for found in places.values()]
    kept = {key for found in open_places if len(found) == 1 for key in found}
    while left := [found for found in open_places if found and not found & kept]:
        shared = {key: sum(key in found for found in left) for found in left for key in found}
        kept.add(min(shared, key=lambda key: (-shared[key], nearness[key])))
    in_header = any(set(found) == {"table_0"} for found in places.values())
    if in_header and not any(key.startswith("table_") for key in kept):
        rows = [key for key in nearness if key.startswith("table_") and key != "table_0"]
        kept.add(min(rows, key=lambda key: nearness[key], default="table_0"))
    return kept
