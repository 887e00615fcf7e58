"""Builds a program step by step, together with the evidence that its numbers are."""

from __future__ import annotations

from dataclasses import dataclass, field

from fintune.data.synthetic.page import Number, Series
from fintune.finqa.program import Argument, Constant, Nothing, Program, Reference, RowName, Step
from fintune.finqa.program import Number as Literal


@dataclass
class Builder:
    """A program under construction.

    Attributes:
        steps: Steps so far.
        numbers: Numbers of the page in order of use.
        rows: Table rows that table operations read.
    """

    steps: list[Step] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def do(self, operation: str, first: Number | Reference | int, second: Number | Reference | int) -> Reference:
        """Add an arithmetic step; an int is a constant (``const_100``)."""
        return self._add(Step(operation, self._argument(first), self._argument(second)))

    def over_row(self, operation: str, series: Series) -> Reference:
        """Add a table operation over the row of a series."""
        number = next(iter(series.numbers.values()))
        assert series.row_name is not None and number.row is not None
        self.rows.append(number.row)
        return self._add(Step(operation, RowName(series.row_name), Nothing()))

    def in_unit(self, number: Number, scale: int) -> Number | Reference:
        """The number counted in another unit, by one step where the units differ."""
        if number.scale == scale:
            return number
        if number.scale > scale:
            return self.do("multiply", number, number.scale // scale)
        return self.do("divide", number, scale // number.scale)

    @property
    def program(self) -> Program:
        """What was built."""
        return Program(tuple(self.steps))

    def _add(self, step: Step) -> Reference:
        self.steps.append(step)
        return Reference(len(self.steps) - 1)

    def _argument(self, value: Number | Reference | int) -> Argument:
        if isinstance(value, Reference):
            return value
        if isinstance(value, int):
            return Constant(f"const_{value}")
        self.numbers.append(value)
        return Literal(value.text)
