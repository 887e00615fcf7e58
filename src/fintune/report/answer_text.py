"""An answer for the terminal: the result, the program step by step, and the source of each number on the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from fintune.finqa.trace import Operand, Trace, magnitudes
from fintune.records import FinQARecord

_MAX_POSITIONS = 3
_MAX_SENTENCE_CHARACTERS = 160
_MIN_PERCENT = 0.01


def answer_lines(
    record: FinQARecord,
    program: str,
    traced: Trace,
    result: float | str | None,
    ungrounded: Sequence[Operand],
    *,
    has_only_constants: bool = False,
) -> Iterator[Text]:
    """Yield the lines to print.

    Args:
        record: The page and the question.
        program: The program in linear form; "" if the completion has none.
        traced: The execution of the program.
        result: The result of the program; None if it has none.
        ungrounded: Operands that are nowhere on the page.
        has_only_constants: Whether the program uses nothing but constants.
    """
    if result is None:
        yield Text.assemble(("no answer", "bold red"), f"  {traced.reason or 'the program has no result'}")
    else:
        mark = [("  ungrounded", "bold yellow")] if ungrounded or has_only_constants else []
        yield Text.assemble((_format_result(result, record.qa.question, traced), "bold green"), *mark)
    yield Text.assemble(("program ", "dim"), program or "none")
    for number, step in enumerate(traced.steps):
        arguments = ", ".join(operand.text for operand in step.operands)
        value = f"failed: {step.reason}" if step.value is None else _format_number(step.value)
        yield Text.assemble((f"  #{number} ", "dim"), f"{step.operation}({arguments}) = ", (value, "bold"))
        for operand in step.operands:
            for position in _positions(operand, record):
                yield Text.assemble(f"       {operand.text}  ", (position, "dim"))
    for operand in ungrounded:
        in_question = magnitudes(operand.text) <= magnitudes(record.qa.question)
        where = "in the question, but not on the page" if in_question else "not on the page"
        yield Text.assemble(("  ungrounded ", "yellow"), f"{operand.text} is {where}")
    if has_only_constants and result is not None:
        yield Text.assemble(("  ungrounded ", "yellow"), "the program uses only constants, and no number of the page")


def describe_confidence(
    confidence: float | None, results: Sequence[float | str | None], result: float | str | None
) -> tuple[str, str]:
    """Describe the model's confidence, and how many candidates agree.

    Args:
        confidence: A fraction; None if the engine does not report it.
        results: The results of all candidates if there were several; None for a candidate that does not run.
        result: The result of the answer.

    Returns:
        ``60 %`` and ``3 of 5 candidates have this result``; the latter is "" for a single completion.
    """
    num_same = sum(other is not None and other == result for other in results)
    agree = f"{num_same} of {len(results)} candidates have this result" if results else ""
    if confidence is None:
        return "not known", agree
    percent = 100 * confidence
    if percent < _MIN_PERCENT:
        return f"< {_MIN_PERCENT} %", agree
    return (f"{percent:.0f} %" if percent >= 1 else f"{percent:.2g} %"), agree


def confidence_line(
    confidence: float | None, results: Sequence[float | str | None], result: float | str | None
) -> Text:
    """Return :func:`describe_confidence` as a line."""
    share, agree = describe_confidence(confidence, results, result)
    return Text.assemble(("confidence ", "dim"), share, (f"  {agree}" if agree else "", "dim"))


def _format_number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5f}".rstrip("0").rstrip(".") if abs(value) < 1e15 else f"{value:g}"
    return str(value)


def _format_result(result: float | str, question: str, traced: Trace) -> str:
    # Programs give a fraction if a question asks for percent.
    asks_for_percent = any(word in question.lower() for word in ("percent", "%"))
    is_share = asks_for_percent and traced.steps[-1].operation == "divide"
    percent = f"  ({_format_number(100 * result)} %)" if isinstance(result, float) and is_share else ""
    return f"{_format_number(result)}{percent}"


def _positions(operand: Operand, record: FinQARecord) -> Iterator[str]:
    texts = (*record.pre_text, *record.post_text)
    if operand.kind == "row":
        row = operand.cells[0][0] if operand.cells else 0
        yield f"row {record.table[row][0]}: {', '.join(record.table[row][1:])}"
        return
    for row, column in operand.cells[:_MAX_POSITIONS]:
        header = record.table[0][column] if column < len(record.table[0]) else ""
        yield f"{record.table[row][0]}, {header}: {record.table[row][column]}" if row else f"column {header}"
    if not operand.cells:
        for index in operand.sentences[:_MAX_POSITIONS]:
            sentence = texts[index]
            is_short = len(sentence) <= _MAX_SENTENCE_CHARACTERS
            yield sentence if is_short else f"{sentence[:_MAX_SENTENCE_CHARACTERS]} ..."
    num_more = (len(operand.cells) or len(operand.sentences)) - _MAX_POSITIONS
    if num_more > 0:
        yield f"and {num_more} more"
