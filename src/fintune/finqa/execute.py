"""Execution of FinQA programs as the official script does it (github.com/czyssrs/FinQA, code/evaluate/evaluate.py).

The published scores depend on the official behaviour, so odd behaviour is kept:

- the last token is dropped, whatever it is, and steps after the last ")" are ignored;
- a table operation on ``#n`` reads the row of an earlier table operation;
- if several rows have one name, the last one counts;
- only the final result is rounded.

`execute` returns the verdict. `run_program` also returns every step.
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
        invalid: The official invalid flag. A program without a single step is not invalid: it has no result.
        result: A number rounded to 5 decimals, "yes", "no", or "n/a" if no step gave a result. A number that is not
            finite or not real, or joined words, is written as text.
        unrounded: The number before rounding; None if the result is not a finite number.
    """

    invalid: bool
    result: float | str
    unrounded: float | None = None


class OperandRun(NamedTuple):
    """One argument of a step, as the execution read it.

    Attributes:
        text: The argument as written, without surrounding space.
        value: The value; the numbers of the whole row for a table operation; None if it could not be read.
        step: The 0-based earlier step that it refers to.
        row: The table row that a table operation read; 0 is the header.
    """

    text: str
    value: Value | tuple[float, ...] | None
    step: int | None = None
    row: int | None = None


class StepRun(NamedTuple):
    """One step of an execution.

    Attributes:
        operation: The name of the operation; "" if none could be read.
        operands: The arguments that were read before the step ended.
        value: The result; None if the step failed.
        reason: Why the step failed, or None.
    """

    operation: str
    operands: tuple[OperandRun, ...]
    value: Value | None = None
    reason: str | None = None


class Run(NamedTuple):
    """The execution of a program, with every step that was reached.

    Attributes:
        execution: The verdict.
        steps: The steps in order; the last one may have failed.
        reason: Why the program is invalid or has no result, in words; None if it has a result.
    """

    execution: Execution
    steps: tuple[StepRun, ...]
    reason: str | None = None


class _StopError(Exception):
    """A step failed. If the official script leaves its loop there without an exception, it still rounds the result."""

    def __init__(self, reason: str, *, rounds: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.rounds = reason, rounds


def execute(tokens: Sequence[str], table: Table) -> Execution:
    """Execute a program. No content of a program or a table raises an error.

    Args:
        tokens: The official tokens, "EOF" included: the last one is dropped, whatever it is.
        table: Rows of cells; cell 0 of a row is its name.

    Returns:
        The official verdict.
    """
    return run_program(tokens, table).execution


def run_program(tokens: Sequence[str], table: Table) -> Run:
    """Execute a program and keep every step; arguments and verdict are those of `execute`."""
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
        reason = f"the result is not a number: {execution.result}"
    elif reason is None and execution.result == NO_RESULT:
        reason = "no complete step"
    return Run(execution, tuple(machine.steps), reason)


class _Machine:
    """The state of one execution: the results of the steps, and the row that the last named table operation read."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.results: dict[int, Value] = {}
        self.steps: list[StepRun] = []
        self._rows: Mapping[str, int] | None = None
        self._row: int | None = None
        self._row_numbers: tuple[float, ...] | None = None

    def step(self, index: int, raw: str) -> Value | None:
        """Run one step and record it; return None if the official script skips it silently."""
        operands: list[OperandRun] = []
        operation = ""
        try:
            operation, first, second = self._split(raw)
            if operation in ARITHMETIC_OPERATIONS:
                value = _arithmetic(operation, self._operand(first, operands), self._operand(second, operands))
            elif operation.startswith("table_"):
                value = _over_row(operation, self._row_operand(first, operands))
            else:
                self.steps.append(StepRun(operation, (), reason="not an operation; skipped"))
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
            raise _StopError(f"{text!r} is not a constant") from None
        operands.append(OperandRun(text, number))
        if number is None:
            raise _StopError(f"{text!r} is not a number", rounds=True)
        return number

    def _reference(self, text: str, operands: list[OperandRun]) -> Value:
        try:
            step = int(text.replace("#", ""))
            value = self.results[step]
        except (ValueError, KeyError):
            operands.append(OperandRun(text, None))
            raise _StopError(f"{text!r} is not an earlier step") from None
        operands.append(OperandRun(text, value, step=step))
        return value

    def _row_operand(self, text: str, operands: list[OperandRun]) -> tuple[float, ...]:
        if self._rows is None:
            try:
                self._rows = {row[0]: number for number, row in enumerate(self.table)}
            except IndexError:
                raise _StopError("the table has a row without cells") from None
        if "#" in text:
            # The reference is looked up but not used: the row of the last table operation takes its place.
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
                raise _StopError(f"cell {column} of row {row[0]!r} is not a constant: {cell!r}") from None
            if number is None:
                raise _StopError(f"cell {column} of row {row[0]!r} is not a number: {cell!r}", rounds=True)
            numbers.append(number)
        return tuple(numbers)


def _arithmetic(operation: str, first: Value, second: Value) -> Value:
    # Earlier results may be words ("yes") or complex numbers. Python's rules for them decide, as in the official
    # script.
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
    # Not sum(): since Python 3.12 it compensates rounding errors, and the official figures are older.
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
