"""An answer for the terminal: the result, the program step by step, and where each number stands on the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from fintune.finqa.trace import Operand, Trace, magnitudes
from fintune.records import FinQARecord

_MAX_PLACES = 3
_MAX_SENTENCE = 160
_LEAST_PERCENT = 0.01


def answer_lines(
    record: FinQARecord,
    program: str,
    traced: Trace,
    result: float | str | None,
    elsewhere: Sequence[Operand],
    *,
    of_constants: bool = False,
) -> Iterator[Text]:
    """Lines to print.

    Args:
        record: Page and question.
        program: In linear form; "" where the completion held none.
        traced: Its execution.
        result: What it executes to; None for nothing.
        elsewhere: Operands that stand nowhere on the page.
        of_constants: Whether constants alone went into it.
    """
    if result is None:
        yield Text.assemble(("no answer", "bold red"), f"  {traced.reason or 'the program has no result'}")
    else:
        mark = [("  ungrounded", "bold yellow")] if elsewhere or of_constants else []
        yield Text.assemble((_shown(result, record.qa.question, traced), "bold green"), *mark)
    yield Text.assemble(("program ", "dim"), program or "none")
    for number, step in enumerate(traced.steps):
        arguments = ", ".join(operand.text for operand in step.operands)
        made = f"failed: {step.reason}" if step.value is None else number_text(step.value)
        yield Text.assemble((f"  #{number} ", "dim"), f"{step.operation}({arguments}) = ", (made, "bold"))
        for operand in step.operands:
            for place in _places(operand, record):
                yield Text.assemble(f"       {operand.text}  ", (place, "dim"))
    for operand in elsewhere:
        where = "in the question alone" if magnitudes(operand.text) <= magnitudes(record.qa.question) else "nowhere"
        yield Text.assemble(("  ungrounded ", "yellow"), f"{operand.text} stands {where}, not on the page")
    if of_constants and result is not None:
        yield Text.assemble(("  ungrounded ", "yellow"), "made of constants alone, of no number of the page")


def confidence_words(
    confidence: float | None, results: Sequence[float | str | None], result: float | str | None
) -> tuple[str, str]:
    """How certain the model is, and what agrees with it.

    Args:
        confidence: As a fraction; None where the engine does not tell it.
        results: Of all candidates, where there were several; None for one that does not run.
        result: That of the answer.

    Returns:
        ``60 %`` and ``3 of 5 candidates have this result``, the latter "" for a single completion.
    """
    num_same = sum(each is not None and each == result for each in results)
    agree = f"{num_same} of {len(results)} candidates have this result" if results else ""
    return "not known" if confidence is None else _share(confidence), agree


def confidence_line(
    confidence: float | None, results: Sequence[float | str | None], result: float | str | None
) -> Text:
    """:func:`confidence_words` as a line."""
    known, agree = confidence_words(confidence, results, result)
    return Text.assemble(("confidence ", "dim"), known, (f"  {agree}" if agree else "", "dim"))


def _share(fraction: float) -> str:
    percent = 100 * fraction
    if percent < _LEAST_PERCENT:
        return f"< {_LEAST_PERCENT} %"
    return f"{percent:.0f} %" if percent >= 1 else f"{percent:.2g} %"


def number_text(value: object) -> str:
    """A value as short as it is exact to 5 decimals."""
    if isinstance(value, float):
        return f"{value:.5f}".rstrip("0").rstrip(".") if abs(value) < 1e15 else f"{value:g}"
    return str(value)


def _shown(result: float | str, question: str, traced: Trace) -> str:
    # Programs give a share of one where a question asks for percent.
    asks_for_share = any(word in question.lower() for word in ("percent", "%"))
    asks_for_share = asks_for_share and traced.steps[-1].operation == "divide"
    percent = f"  ({number_text(100 * result)} %)" if isinstance(result, float) and asks_for_share else ""
    return f"{number_text(result)}{percent}"


def _places(operand: Operand, record: FinQARecord) -> Iterator[str]:
    texts = (*record.pre_text, *record.post_text)
    if operand.kind == "row":
        row = operand.cells[0][0] if operand.cells else 0
        yield f"row {record.table[row][0]}: {', '.join(record.table[row][1:])}"
        return
    for row, column in operand.cells[:_MAX_PLACES]:
        header = record.table[0][column] if column < len(record.table[0]) else ""
        yield f"{record.table[row][0]}, {header}: {record.table[row][column]}" if row else f"column {header}"
    if not operand.cells:
        for place in operand.sentences[:_MAX_PLACES]:
            sentence = texts[place]
            yield sentence if len(sentence) <= _MAX_SENTENCE else f"{sentence[:_MAX_SENTENCE]} ..."
    more = (len(operand.cells) or len(operand.sentences)) - _MAX_PLACES
    if more > 0:
        yield f"and in {more} more places"
