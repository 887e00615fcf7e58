"""Execution of FinQA programs as the official script does it (github.com/czyssrs/FinQA, code/evaluate/evaluate.py).

What looks odd here is the official behaviour, which the headline scores rest on: the last token is dropped whatever it
is, steps after the last ")" are not seen, a table operation on ``#n`` reads the row of an earlier one, of rows with one
name the last counts, the result alone is rounded. `execute` gives the verdict, `run` the same with every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from fintune.finqa.official import cell_number, split_step, split_steps, str_to_num, structure_error
from fintune.finqa.program import ARITHMETIC_OPERATIONS

Value: TypeAlias = float | complex | str
Table: TypeAlias = Sequence[Sequence[str]]

NO_RESULT = "n/a"


class Execution(NamedTuple):
    """The official verdict on one program.

    Attributes:
        invalid: The official invalid flag. A program without a single step is not invalid, it has no result.
        result: Number rounded to 5 decimals, "yes", "no", or "n/a" where no step gave a result. A number that is
            not finite or not real, or joined words, is written as text.
        unrounded: The number before rounding, None where the result is no finite number.
    """

    invalid: bool
    result: float | str
    unrounded: float | None = None


class OperandRun(NamedTuple):
    """One argument as the run saw it.

    Attributes:
        text: As written, without surrounding space.
        value: What it stands for; the numbers of the whole row for a table operation; None where that failed.
        step: The earlier step that it refers to, 0-based.
        row: The table row that a table operation read, 0 is the header.
    """

    text: str
    value: Value | tuple[float, ...] | None
    step: int | None = None
    row: int | None = None


class StepRun(NamedTuple):
    """One step as the run saw it.

    Attributes:
        operation: Name of the operation, "" where none could be read.
        operands: The arguments that were read before the step ended.
        value: Its result, None where it failed.
        reason: Why it failed, or None.
    """

    operation: str
    operands: tuple[OperandRun, ...]
    value: Value | None = None
    reason: str | None = None


class Run(NamedTuple):
    """A program's execution with every step that was reached.

    Attributes:
        execution: The verdict.
        steps: Steps in order; the last may be the one that failed.
        reason: Why the program is invalid or has no result, in words for people; None where it has one.
    """

    execution: Execution
    steps: tuple[StepRun, ...]
    reason: str | None = None


class _StopError(Exception):
    """A step failed. Where the official script leaves its loop (and does not throw), it still rounds what it has."""

    def __init__(self, reason: str, *, rounds: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.rounds = reason, rounds


def execute(tokens: Sequence[str], table: Table) -> Execution:
    """Execute a program.

    Args:
        tokens: Official tokens, "EOF" included: the last one is dropped whatever it is.
        table: Rows of cells; cell 0 of a row is its name.

    Returns:
        The official verdict; never raises for what a program or a table holds.
    """
    return run_program(tokens, table).execution


def run_program(tokens: Sequence[str], table: Table) -> Run:
    """Execute a program and keep every step; same arguments and verdict as `execute`."""
    body = tokens[:-1]
    if broken := structure_error(body):
        return Run(Execution(True, NO_RESULT), (), broken)
    machine = _Machine(table)
    last: Value = NO_RESULT
    reason: str | None = None
    rounds = True
    for index, raw in enumerate(split_steps(body)):
        try:
            value = machine.step(index, raw)
        except _StopError as stop:
            reason, rounds = f"step {index + 1}: {stop.reason}", stop.rounds
            break
        if value is not None:
            last = value
    execution = _finish(last, invalid=reason is not None, rounds=rounds)
    if reason is None and execution.invalid:
        reason = f"the result is no number: {execution.result}"
    elif reason is None and execution.result == NO_RESULT:
        reason = "no complete step"
    return Run(execution, tuple(machine.steps), reason)


class _Machine:
    """State of one execution: results by step, and the row that the last table operation by name has read."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.results: dict[int, Value] = {}
        self.steps: list[StepRun] = []
        self._rows: Mapping[str, int] | None = None
        self._row: int | None = None
        self._row_numbers: tuple[float, ...] | None = None

    def step(self, index: int, raw: str) -> Value | None:
        """Run one step and record it; None where the official script passes over it without a word."""
        operands: list[OperandRun] = []
        operation = ""
        try:
            operation, first, second = self._split(raw)
            if operation in ARITHMETIC_OPERATIONS:
                value = _arithmetic(operation, self._operand(first, operands), self._operand(second, operands))
            elif operation.startswith("table_"):
                value = _over_row(operation, self._row_operand(first, operands))
            else:
                self.steps.append(StepRun(operation, (), reason="no operation; passed over"))
                return None
        except _StopError as stop:
            self.steps.append(StepRun(operation, tuple(operands), reason=stop.reason))
            raise
        self.results[index] = value
        self.steps.append(StepRun(operation, tuple(operands), value))
        return value

    def _split(self, raw: str) -> tuple[str, str, str]:
        raw = raw.strip()
        try:
            return split_step(raw)
        except ValueError as error:
            raise _StopError(str(error), rounds=raw.count("(") > 1) from None

    def _operand(self, text: str, operands: list[OperandRun]) -> Value:
        if "#" in text:
            return self._reference(text, operands)
        try:
            number = str_to_num(text)
        except ValueError:
            operands.append(OperandRun(text, None))
            raise _StopError(f"{text!r} is no constant") from None
        operands.append(OperandRun(text, number))
        if number is None:
            raise _StopError(f"{text!r} is no number", rounds=True)
        return number

    def _reference(self, text: str, operands: list[OperandRun]) -> Value:
        try:
            step = int(text.replace("#", ""))
            value = self.results[step]
        except (ValueError, KeyError):
            operands.append(OperandRun(text, None))
            raise _StopError(f"{text!r} is no earlier step") from None
        operands.append(OperandRun(text, value, step=step))
        return value

    def _row_operand(self, text: str, operands: list[OperandRun]) -> tuple[float, ...]:
        if self._rows is None:
            try:
                self._rows = {row[0]: number for number, row in enumerate(self.table)}
            except IndexError:
                raise _StopError("the table has a row without cells") from None
        if "#" in text:
            # The reference is looked up and then not used: the row of the last table operation stands in for it.
            self._reference(text, operands)
            operands[-1] = OperandRun(text, self._row_numbers, operands[-1].step, self._row)
            if self._row_numbers is None:
                raise _StopError(f"{text!r} names no row, and no earlier step has read one")
            return self._row_numbers
        if text not in self._rows:
            operands.append(OperandRun(text, None))
            raise _StopError(f"the table has no row {text!r}", rounds=True)
        self._row = self._rows[text]
        operands.append(OperandRun(text, None, row=self._row))
        self._row_numbers = self._numbers(self.table[self._row])
        operands[-1] = OperandRun(text, self._row_numbers, row=self._row)
        return self._row_numbers

    @staticmethod
    def _numbers(row: Sequence[str]) -> tuple[float, ...]:
        numbers: list[float] = []
        for column, cell in enumerate(row[1:], 1):
            try:
                number = cell_number(cell)
            except ValueError:
                raise _StopError(f"cell {column} of row {row[0]!r} is no constant: {cell!r}") from None
            if number is None:
                raise _StopError(f"cell {column} of row {row[0]!r} is no number: {cell!r}", rounds=True)
            numbers.append(number)
        return tuple(numbers)


def _arithmetic(operation: str, first: Value, second: Value) -> Value:
    # Earlier results may be words ("yes") or complex: Python's own rules for these decide, as they do officially.
    left: float = first  # type: ignore[assignment]
    right: float = second  # type: ignore[assignment]
    try:
        if operation == "add":
            return left + right
        if operation == "subtract":
            return left - right
        if operation == "multiply":
            return left * right
        if operation == "divide":
            return left / right
        if operation == "exp":
            power: Value = left**right
            return power
        return "yes" if left > right else "no"
    except ZeroDivisionError:
        raise _StopError("division by zero") from None
    except OverflowError:
        raise _StopError("the result is too large") from None
    except TypeError:
        raise _StopError(f"{operation} cannot take {first!r} and {second!r}") from None


def _over_row(operation: str, numbers: tuple[float, ...]) -> Value:
    if operation == "table_sum":
        return _total(numbers)
    if not numbers:
        raise _StopError("the row has no cells")
    if operation == "table_max":
        return max(numbers)
    if operation == "table_min":
        return min(numbers)
    return _total(numbers) / len(numbers)


def _total(numbers: Sequence[float]) -> float:
    # Not sum(): from Python 3.12 on it compensates rounding, and the official figures were made before that.
    total: float = 0
    for number in numbers:
        total += number
    return total


def _finish(last: Value, *, invalid: bool, rounds: bool) -> Execution:
    if isinstance(last, str):
        return Execution(invalid or (last not in {"yes", "no", NO_RESULT}), last)
    if isinstance(last, complex):
        return Execution(True, str(last))
    result = round(last, 5) if rounds else last
    if result - result != 0:
        return Execution(invalid, str(result))
    return Execution(invalid, result, unrounded=last)
