"""The example browser of a page: every question with its page, what the gold program uses, and the answers.

The data are two blocks of JSON. A small index is parsed when the page opens. The report pages follow, one a line; each
is parsed when a reader opens a question on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fintune.finqa.cleaning import clean
from fintune.finqa.execute import Value
from fintune.finqa.page import page_content
from fintune.finqa.program import tokenize
from fintune.finqa.trace import Operand, Trace, magnitudes, trace
from fintune.finqa.verdict import OUTCOMES, OfficialVerdict
from fintune.records import FinQARecord, Prediction
from fintune.report.answer_text import describe_confidence

MAX_TEXT_CHARACTERS = 600
"""Longest part of a completion that is shown if it is more than its program."""

_NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)")


@dataclass(frozen=True)
class UsedParts:
    """The parts of a page that a program uses.

    Attributes:
        rows: Indices of the table rows that are evidence (``table_k``).
        cells: (row, column) of the cells whose number is an operand, or that a table operation reads.
        sentences: Indices of the sentences that are evidence (``text_k``), each with the indices of its words (split
            at spaces) that are operands.
        derived: Whether ``gold_inds`` is missing, so that the parts come from the operands alone.
    """

    rows: tuple[int, ...]
    cells: tuple[tuple[int, int], ...]
    sentences: Mapping[int, tuple[int, ...]]
    derived: bool


@dataclass(frozen=True)
class BrowserAnswer:
    """A prediction for one question.

    Attributes:
        tokens: The official tokens that were judged, "EOF" included.
        program: The program as text.
        verdict: The verdict, or None if the prediction was not scored.
        text: The completion, if it is more than its program.
        is_cut_off: Whether the completion reached the token limit.
        error: The kind of error, if known.
        confidence: The model's confidence, in words.
    """

    tokens: Sequence[str]
    program: str
    verdict: OfficialVerdict | None = None
    text: str = ""
    is_cut_off: bool = False
    error: str = ""
    confidence: str = ""

    @classmethod
    def from_prediction(cls, prediction: Prediction, verdict: OfficialVerdict | None) -> BrowserAnswer:
        """Take the answer from a prediction of a run."""
        program = prediction.program
        text = "" if prediction.text.strip() == program else prediction.text
        confidence = ""
        if prediction.confidence is not None:
            results = [candidate.result for candidate in prediction.candidates]
            chosen = next((c.result for c in prediction.candidates if c.program == program), None)
            confidence = "confidence " + ": ".join(
                filter(None, describe_confidence(prediction.confidence, results, chosen))
            )
        is_cut_off = prediction.finish_reason == "length"
        return cls(tokenize(program), program, verdict, text, is_cut_off, confidence=confidence)


def find_used_parts(record: FinQARecord) -> UsedParts:
    """Find the cells and sentences that the gold program of a record uses.

    Evidence comes from ``gold_inds``. Within it, operands are found by their number, without sign, currency and percent
    sign: programs write ``32`` for a cell ``-32 ( 32 )``. If ``gold_inds`` is missing, the whole page is searched, the
    table first.
    """
    sentences, evidence = (*record.pre_text, *record.post_text), record.qa.gold_inds
    steps = _trace(record, tokenize(record.qa.program)).steps
    operands = [operand for step in steps for operand in step.operands if operand.cells or operand.sentences]
    cells = {(r, c) for operand in operands for r, c in operand.cells if c and record.table[r][c].strip()}
    if evidence is None:
        rows = sorted({row for row, _ in cells})
        missing = {number for operand in operands if not operand.cells for number in magnitudes(operand.text)}
        hits = {index: find_words(sentence, missing) for index, sentence in enumerate(sentences)}
        return UsedParts(tuple(rows), tuple(sorted(cells)), {k: words for k, words in hits.items() if words}, True)
    rows = _indices(evidence, "table", len(record.table))
    numbers = {number for operand in operands if operand.kind != "row" for number in magnitudes(operand.text)}
    marks = {k: find_words(sentences[k], numbers) for k in _indices(evidence, "text", len(sentences))}
    used = {(row, column) for row, column in cells if row in rows}
    for operand in operands:
        # If a page's first row was taken for a header, operands are in it, and gold_inds name the row below.
        if rows and not used & set(operand.cells) and not marks.keys() & set(operand.sentences):
            used |= {(row, column) for row, column in operand.cells if row == 0 and column}
    return UsedParts(tuple(rows), tuple(sorted(used)), marks, False)


def browser_blocks(
    records: Sequence[FinQARecord],
    answers: Mapping[str, Mapping[str, BrowserAnswer]],
    num_cut: Mapping[str, int],
    num_compared: int | None = None,
) -> tuple[str, str]:
    """Write the index (one JSON object) and the pages (one a line) of the questions, safe inside a ``script`` element.

    Args:
        records: The questions to show.
        answers: Answers by the label of the model, then by id.
        num_cut: Number of sentences and rows that were cut from the prompt, by id.
        num_compared: Number of models, from the first, whose programs are compared; None for all.
    """
    pages: dict[Hashable, tuple[int, str]] = {}
    examples = []
    for record in records:
        content = page_content(record)
        if content not in pages:
            sentences = [*record.pre_text, *record.post_text]
            page = script_json({"n": len(record.pre_text), "s": sentences, "t": record.table})
            pages[content] = (len(pages), page)
        used = find_used_parts(record)
        example = {
            "id": record.id,
            "q": clean(record.qa.question, "question")[0],
            "p": record.qa.program,
            "v": record.qa.exe_ans,
            **_steps(_trace(record, tokenize(record.qa.program)), record, used),
            "a": record.qa.answer or "",
            "page": pages[content][0],
            "rows": used.rows,
            "cells": used.cells,
            "text": {str(index): words for index, words in used.sentences.items()},
            "derived": used.derived,
            "cut": num_cut.get(record.id, 0),
            "m": [_answer(record, by_id.get(record.id), used) for by_id in answers.values()],
        }
        examples.append(example)
    compared = len(answers) if num_compared is None else num_compared
    index = script_json({"kinds": list(answers), "num_compared": compared, "examples": examples})
    return index, "\n".join(page for _, page in pages.values())


def script_json(value: Any) -> str:
    """Write JSON on one line that can neither end a ``script`` element nor start a comment in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _steps(traced: Trace, record: FinQARecord, gold: UsedParts) -> dict[str, Any]:
    values = ["failed" if step.value is None else _format_value(step.value) for step in traced.steps]
    return {"s": values, "o": operand_positions(traced, record, gold)}


def operand_positions(traced: Trace, record: FinQARecord, gold: UsedParts) -> list[list[dict[str, Any]]]:
    """Find the operands of each step on the page; constants and earlier steps are left out.

    A number may occur several times on a page. If the gold program uses one of the occurrences, that one is meant.
    Else all cells with the number are returned or, without such cells, all sentences.

    Returns:
        A list for each step with a mapping for each operand: its text ``t``, its cells ``c`` as [row, column], its
        sentences ``x`` as index to the indices of words, ``row`` if the whole row is read, and ``q`` if it occurs in
        the question alone. An operand without any of these occurs nowhere.
    """
    return [
        [
            _position(operand, record, gold)
            for operand in step.operands
            if operand.kind in {"cell", "sentence", "row"}
            or (operand.kind == "elsewhere" and operand.value is not None)
        ]
        for step in traced.steps
    ]


def find_words(sentence: str, numbers: Collection[float]) -> tuple[int, ...]:
    """Return the indices of the words (split at spaces) of a sentence that are one of the numbers, signs aside."""
    return tuple(
        index
        for index, word in enumerate(sentence.split(" "))
        if _NUMBER.fullmatch(word.strip("$%().,;:")) and magnitudes(word) <= set(numbers)
    )


def _position(operand: Operand, record: FinQARecord, gold: UsedParts) -> dict[str, Any]:
    texts = (*record.pre_text, *record.post_text)
    words = {k: find_words(texts[k], magnitudes(operand.text)) for k in operand.sentences}
    cells = tuple(cell for cell in operand.cells if cell in gold.cells)
    marked = {k: indices for k, indices in words.items() if set(indices) & set(gold.sentences.get(k, ()))}
    if not cells and not marked:
        cells, marked = operand.cells, {} if operand.cells else words
    in_question = operand.kind == "elsewhere" and magnitudes(operand.text) <= magnitudes(record.qa.question)
    position = {
        "t": operand.text,
        "c": cells,
        "x": {str(k): indices for k, indices in marked.items()},
        "row": int(operand.kind == "row"),
        "q": int(in_question),
    }
    return {key: value for key, value in position.items() if value}


def _format_value(value: Value) -> str:
    if isinstance(value, float) and abs(value) < 1e15:
        return f"{value:,.5f}".rstrip("0").rstrip(".") if abs(value) >= 1 else f"{value:.5g}"
    return str(value)


def _trace(record: FinQARecord, tokens: Sequence[str]) -> Trace:
    return trace(tokens, record.table, (*record.pre_text, *record.post_text))


def _answer(record: FinQARecord, answer: BrowserAnswer | None, gold: UsedParts) -> dict[str, Any] | None:
    if answer is None:
        return None
    traced = _trace(record, answer.tokens)
    entry = {"p": answer.program, **_steps(traced, record, gold)}
    optional = {
        "why": traced.reason,
        "t": answer.text[:MAX_TEXT_CHARACTERS],
        "cut": int(answer.is_cut_off),
        "e": answer.error,
        "k": answer.confidence,
    }
    entry |= {key: value for key, value in optional.items() if value}
    if answer.verdict is not None:
        entry |= {"c": OUTCOMES.index(answer.verdict.outcome), "r": str(answer.verdict.result)}
    return entry


def _indices(evidence: Mapping[str, str], kind: str, length: int) -> list[int]:
    names = (name.split("_") for name in evidence)
    indices = {int(name[1]) for name in names if len(name) == 2 and name[0] == kind and name[1].isdigit()}
    return sorted(index for index in indices if index < length)
