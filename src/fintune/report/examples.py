"""What the example browser of a page shows: each question with its page, the parts that the gold program uses, answers.

Two blocks of JSON: a small index that is parsed when the page opens, and the report pages, one a line, each of which is
parsed only when a reader opens a question on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fintune.finqa.execute import Value
from fintune.finqa.parse import ParseError, parse
from fintune.finqa.program import Number, RowName, tokenize
from fintune.finqa.trace import Trace, trace
from fintune.finqa.verdict import OUTCOMES, OfficialVerdict
from fintune.records import FinQARecord, Prediction
from fintune.report.answer_text import confidence_words
from fintune.report.operands import Used, shown_operands, words_of

MAX_TEXT_CHARACTERS = 600
"""So much of a completion is shown where it is not just its program."""

_NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)")


@dataclass(frozen=True)
class Answer:
    """What was predicted for one question.

    Attributes:
        tokens: The official tokens that were judged, "EOF" included.
        program: The program as text.
        judged: The verdict, or None where it was not scored.
        text: What the model wrote, where that is not just its program.
        cut_off: Whether it reached the token limit.
        error: The kind of its error, where that is known.
        confidence: How certain the model was, in words.
    """

    tokens: Sequence[str]
    program: str
    judged: OfficialVerdict | None = None
    text: str = ""
    cut_off: bool = False
    error: str = ""
    confidence: str = ""

    @classmethod
    def of(cls, prediction: Prediction, judged: OfficialVerdict | None) -> Answer:
        """The answer that a prediction of a run is."""
        program = prediction.program
        text = "" if prediction.text.strip() == program else prediction.text
        cut_off = prediction.finish_reason == "length"
        return cls(tokenize(program), program, judged, text, cut_off, confidence=_confidence(prediction))


def used_parts(record: FinQARecord) -> Used:
    """Which cells and sentences the gold program of a record uses.

    Evidence comes from ``gold_inds``; within it, operands are found by their number, without regard to sign, currency
    or percent sign (programs write ``32`` for a cell ``-32 ( 32 )``). Where ``gold_inds`` is missing, the whole page is
    searched, the table first.
    """
    numbers, row_names = _operands(record.qa.program)
    sentences = (*record.pre_text, *record.post_text)
    evidence = record.qa.gold_inds
    if evidence is not None:
        rows = _indices(evidence, "table", len(record.table))
        text = _indices(evidence, "text", len(sentences))
    else:
        rows, text = list(range(len(record.table))), []
    cells = [
        (row, column)
        for row in rows
        for column, cell in enumerate(record.table[row])
        if column and (_numbers(cell) & numbers or (record.table[row][0].strip() in row_names and cell.strip()))
    ]
    missing = numbers - {number for row, column in cells for number in _numbers(record.table[row][column])}
    if evidence is None:
        rows = sorted({row for row, _ in cells})
        hits = {index: words_of(sentence, missing) for index, sentence in enumerate(sentences)}
        marks = {index: words for index, words in hits.items() if words}
    else:
        marks = {index: words_of(sentences[index], numbers) for index in text}
        # Where a page's first row was taken for a header, operands stand in it, and gold_inds name the row below.
        missing -= {_number(sentences[index].split(" ")[word]) for index, words in marks.items() for word in words}
        header = record.table[0] if rows and 0 not in rows else ()
        cells += [(0, column) for column, cell in enumerate(header) if column and _numbers(cell) & missing]
    return Used(tuple(rows), tuple(cells), marks, evidence is None)


def browser_blocks(
    records: Sequence[FinQARecord],
    answers: Mapping[str, Mapping[str, Answer]],
    num_cut: Mapping[str, int],
    num_compared: int | None = None,
) -> tuple[str, str]:
    """The two blocks for the page, safe inside a ``script`` element.

    Args:
        records: The questions to show.
        answers: By the name of who answered, then by id.
        num_cut: Units of the page that were left out of the prompt, by id.
        num_compared: The first so many of those who answered are asked whether they agree; all where None.

    Returns:
        The index (one JSON object) and the pages (one JSON object a line).
    """
    pages: dict[str, int] = {}
    examples = []
    for record in records:
        page = script_json({"n": len(record.pre_text), "s": [*record.pre_text, *record.post_text], "t": record.table})
        used = used_parts(record)
        gold = _traced(record, tokenize(record.qa.program))
        examples.append(
            {
                "id": record.id,
                "q": record.qa.question,
                "p": record.qa.program,
                "v": record.qa.exe_ans,
                "s": step_values(gold),
                "o": shown_operands(gold, record, used),
                "a": record.qa.answer or "",
                "page": pages.setdefault(page, len(pages)),
                "rows": used.rows,
                "cells": used.cells,
                "text": {str(index): words for index, words in used.sentences.items()},
                "derived": used.derived,
                "cut": num_cut.get(record.id, 0),
                "m": [_answer(record, by_id.get(record.id), used) for by_id in answers.values()],
            }
        )
    compared = len(answers) if num_compared is None else num_compared
    return script_json({"kinds": list(answers), "num_compared": compared, "examples": examples}), "\n".join(pages)


def script_json(value: Any) -> str:
    """JSON on one line that cannot end a ``script`` element or begin a comment in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def step_values(ran: Trace) -> list[str]:
    """The value of each step for people, "failed" for one that has none."""
    return ["failed" if step.value is None else _shown(step.value) for step in ran.steps]


def _shown(value: Value) -> str:
    if isinstance(value, float) and abs(value) < 1e15:
        return f"{value:,.5f}".rstrip("0").rstrip(".") if abs(value) >= 1 else f"{value:.5g}"
    return str(value)


def _traced(record: FinQARecord, tokens: Sequence[str]) -> Trace:
    return trace(tokens, record.table, (*record.pre_text, *record.post_text))


def _answer(record: FinQARecord, answer: Answer | None, gold: Used) -> dict[str, Any] | None:
    if answer is None:
        return None
    ran = _traced(record, answer.tokens)
    shown: dict[str, Any] = {"p": answer.program, "s": step_values(ran), "o": shown_operands(ran, record, gold)}
    if ran.reason is not None:
        shown["why"] = ran.reason
    if answer.text:
        shown["t"] = answer.text[:MAX_TEXT_CHARACTERS]
    if answer.cut_off:
        shown["cut"] = 1
    if answer.error:
        shown["e"] = answer.error
    if answer.confidence:
        shown["k"] = answer.confidence
    if answer.judged is not None:
        shown |= {"c": OUTCOMES.index(answer.judged.outcome), "r": str(answer.judged.result)}
    return shown


def _confidence(prediction: Prediction) -> str:
    if prediction.confidence is None:
        return ""
    results = [each.result for each in prediction.candidates]
    chosen = next((each.result for each in prediction.candidates if each.program == prediction.program), None)
    known, agree = confidence_words(prediction.confidence, results, chosen)
    return f"confidence {known}" + (f": {agree}" if agree else "")


def _operands(program: str) -> tuple[set[float], set[str]]:
    numbers: set[float] = set()
    row_names: set[str] = set()
    try:
        steps = parse(program).steps
    except ParseError:  # prepare has checked the programs; one that gets here is still worth showing, without marks
        return numbers, row_names
    for step in steps:
        for argument in (step.first, step.second):
            if isinstance(argument, Number):
                numbers |= _numbers(argument.text)
            elif isinstance(argument, RowName):
                row_names.add(argument.text.strip())
    return numbers, row_names


def _indices(evidence: Mapping[str, str], kind: str, length: int) -> list[int]:
    names = (name.split("_") for name in evidence)
    found = {int(name[1]) for name in names if len(name) == 2 and name[0] == kind and name[1].isdigit()}
    return sorted(index for index in found if index < length)


def _numbers(text: str) -> set[float]:
    """The numbers of a cell, without their signs."""
    return {abs(float(found.replace(",", ""))) for found in _NUMBER.findall(text)}


def _number(text: str) -> float | None:
    """The number of an operand or word, without its sign; None where there is none."""
    return next(iter(_numbers(text)), None)
