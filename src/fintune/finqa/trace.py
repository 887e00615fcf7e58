"""The execution of a program for people: each step, each operand, and the operand's position on the page.

The verdict and all values come from `fintune.finqa.execute`. Only the positions are computed here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fintune.finqa.execute import Execution, OperandRun, Run, Table, Value, run_program

OperandKind: TypeAlias = Literal["cell", "sentence", "constant", "step", "row", "elsewhere"]

_NUMBER = re.compile(r"(?:\d[\d,]*\.?\d*|\.\d+)", re.ASCII)


@dataclass(frozen=True)
class Operand:
    """One argument of a step.

    Attributes:
        text: The argument as written.
        kind: The source: a number in a table cell (and perhaps also in sentences), a number only in sentences, a
            constant, an earlier step, a whole table row, or elsewhere, which means nowhere on the page.
        value: The number or word; for a row, its numbers; None if it is neither.
        cells: (row, column) of every cell that holds the number, or of the whole row for a table operation. Row 0 is
            the header, column 0 the name.
        sentences: Indices of all sentences that hold the number.
        step: The 0-based earlier step.
    """

    text: str
    kind: OperandKind
    value: Value | tuple[float, ...] | None
    cells: tuple[tuple[int, int], ...] = ()
    sentences: tuple[int, ...] = ()
    step: int | None = None


@dataclass(frozen=True)
class TracedStep:
    """One step: its operation, operands and result, or the reason why there is no result."""

    operation: str
    operands: tuple[Operand, ...]
    value: Value | None
    reason: str | None


@dataclass(frozen=True)
class Trace:
    """The execution of a program.

    Attributes:
        execution: The official verdict.
        steps: Every step that was reached.
        reason: Why there is no result; None if there is one.
    """

    execution: Execution
    steps: tuple[TracedStep, ...]
    reason: str | None


def trace(tokens: Sequence[str], table: Table, sentences: Sequence[str] = ()) -> Trace:
    """Execute a program and find its operands on the page.

    A number is wherever its digits are, whatever the sign, "$" or "%" around them: "-5.2%" is found in "( 5.2 )".

    Args:
        tokens: The official tokens, "EOF" included.
        table: Rows of cells.
        sentences: ``pre_text + post_text``; sentences are counted in this order.
    """
    ran: Run = run_program(tokens, table)
    page = _Page(table, sentences)
    steps = tuple(
        TracedStep(
            step.operation, tuple(page.operand(operand, table) for operand in step.operands), step.value, step.reason
        )
        for step in ran.steps
    )
    return Trace(ran.execution, steps, ran.reason)


def magnitudes(text: str) -> set[float]:
    """Return all numbers of a text without their signs; "1,234.5" is one number."""
    return {float(digits.replace(",", "")) for digits in _NUMBER.findall(text)}


class _Page:
    """The positions of the numbers of a page."""

    def __init__(self, table: Table, sentences: Sequence[str]) -> None:
        self.cells: dict[float, list[tuple[int, int]]] = {}
        self.sentences: dict[float, list[int]] = {}
        for row, cells in enumerate(table):
            for column, cell in enumerate(cells):
                for number in magnitudes(cell):
                    self.cells.setdefault(number, []).append((row, column))
        for index, sentence in enumerate(sentences):
            for number in magnitudes(sentence):
                self.sentences.setdefault(number, []).append(index)

    def operand(self, operand: OperandRun, table: Table) -> Operand:
        if operand.row is not None:
            cells = tuple((operand.row, column) for column in range(1, len(table[operand.row])))
            return Operand(operand.text, "row", operand.value, cells=cells, step=operand.step)
        if operand.step is not None:
            return Operand(operand.text, "step", operand.value, step=operand.step)
        if "const" in operand.text:
            return Operand(operand.text, "constant", operand.value)
        numbers = magnitudes(operand.text) if operand.value is not None else set()
        if len(numbers) != 1:
            return Operand(operand.text, "elsewhere", operand.value)
        number = numbers.pop()
        cells, sentences = tuple(self.cells.get(number, ())), tuple(self.sentences.get(number, ()))
        kind: OperandKind = "cell" if cells else "sentence" if sentences else "elsewhere"
        return Operand(operand.text, kind, operand.value, cells, sentences)
