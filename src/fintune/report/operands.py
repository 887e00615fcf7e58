"""Where the operands of a program stand on the page of its question, as the example browser shows them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from fintune.finqa.trace import Operand, Trace, magnitudes
from fintune.records import FinQARecord

Cell: TypeAlias = tuple[int, int]

_AMOUNT = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)")


@dataclass(frozen=True)
class Used:
    """The parts of a page that a program uses.

    Attributes:
        rows: Indices of the table rows that are evidence (``table_k``).
        cells: (row, column) of the cells whose number is an operand, or that a table operation reads.
        sentences: Indices of the sentences that are evidence (``text_k``), each with the indices of its words (split
            at spaces) that are operands.
        derived: Whether ``gold_inds`` was missing, so that the parts were found from the operands alone.
    """

    rows: tuple[int, ...]
    cells: tuple[Cell, ...]
    sentences: Mapping[int, tuple[int, ...]]
    derived: bool


def shown_operands(traced: Trace, record: FinQARecord, gold: Used) -> list[list[dict[str, Any]]]:
    """The operands of each step that come from the page, or should have: constants and earlier steps are left out.

    A number may stand in several places. Where the gold program uses one of them, that is the one meant; else all cells
    that hold it are shown or, where none does, all sentences.

    Returns:
        A list a step; of each operand its text ``t``, its cells ``c`` as [row, column], its sentences ``x`` as index to
        the indices of words, ``row`` where the whole row is read, and ``q`` where it stands in the question alone. One
        without any of these stands nowhere.
    """
    return [
        [_shown(operand, record, gold) for operand in step.operands if _is_from_page(operand)] for step in traced.steps
    ]


def words_of(sentence: str, numbers: Collection[float]) -> tuple[int, ...]:
    """Indices of the words (split at spaces) of a sentence that are one of the numbers, whatever their sign."""
    return tuple(
        index
        for index, word in enumerate(sentence.split(" "))
        if _AMOUNT.fullmatch(word.strip("$%().,;:")) and magnitudes(word) <= set(numbers)
    )


def _is_from_page(operand: Operand) -> bool:
    return operand.kind in {"cell", "sentence", "row"} or (operand.kind == "elsewhere" and operand.value is not None)


def _shown(operand: Operand, record: FinQARecord, gold: Used) -> dict[str, Any]:
    texts = (*record.pre_text, *record.post_text)
    words = {k: words_of(texts[k], magnitudes(operand.text)) for k in operand.sentences}
    cells: tuple[Cell, ...] = tuple(cell for cell in operand.cells if cell in gold.cells)
    marked = {k: found for k, found in words.items() if set(found) & set(gold.sentences.get(k, ()))}
    if not cells and not marked:
        cells, marked = operand.cells, {} if operand.cells else words
    shown: dict[str, Any] = {"t": operand.text}
    if cells:
        shown["c"] = cells
    if marked:
        shown["x"] = {str(k): found for k, found in marked.items()}
    if operand.kind == "row":
        shown["row"] = 1
    if operand.kind == "elsewhere" and magnitudes(operand.text) <= magnitudes(record.qa.question):
        shown["q"] = 1
    return shown
