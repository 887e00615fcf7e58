"""``fintune ask``: one question about one page, answered with the program, its steps and where its numbers stand."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from fintune.config import PredictOptions, PromptOptions
from fintune.errors import ModelError, PromptError
from fintune.finqa.page import page_units
from fintune.finqa.program import OPERATIONS, tokenize
from fintune.finqa.prompt import build_messages, prompt_budget
from fintune.finqa.trace import Operand, Trace, trace
from fintune.inference.decoding_strategies import choose_prediction, decoding_from_options, make_grammars
from fintune.inference.generate import memory_hint
from fintune.inference.open_model import ModelSpec, open_model
from fintune.inference.protocol import sorted_by_prompt
from fintune.records import Candidate, FinQARecord
from fintune.util.memory import advice_on_memory

_CALL = re.compile(r"\w+\(")
_LONGEST_TEXT = 80


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        record: The page and the question.
        text: The completion.
        program: The program in it, "" where there is none.
        traced: Its execution.
        finish_reason: "length" where the completion was cut off.
        confidence: See :class:`fintune.records.Prediction`.
        candidates: All completions, where there were several.
        engine: What ran the model.
        num_cut: Sentences and table rows that were left out of the prompt to fit it.
        num_prompt_tokens: Length of the prompt.
        seconds: Time of the completion.
    """

    record: FinQARecord
    text: str
    program: str
    traced: Trace
    finish_reason: str
    confidence: float | None
    candidates: tuple[Candidate, ...]
    engine: str
    num_cut: int
    num_prompt_tokens: int
    seconds: float

    @property
    def result(self) -> float | str | None:
        """What the program executes to; None where it has no result."""
        execution = self.traced.execution
        has_result = not execution.invalid and self.traced.reason is None
        return execution.result if has_result else None

    @property
    def elsewhere(self) -> tuple[Operand, ...]:
        """Operands that stand nowhere on the page."""
        return tuple(
            operand
            for step in self.traced.steps
            for operand in step.operands
            if operand.kind == "elsewhere" and operand.value is not None
        )

    @property
    def of_constants(self) -> bool:
        """Whether no number of the page went into it, and none from elsewhere: constants alone."""
        kinds = {operand.kind for step in self.traced.steps for operand in step.operands}
        return bool(kinds) and kinds <= {"constant", "step"}

    @property
    def grounded(self) -> bool:
        """Whether there is an answer, made of numbers of the page (and constants beside them) alone."""
        return self.result is not None and not self.elsewhere and not self.of_constants

    def as_json(self) -> dict[str, Any]:
        """All of it, for machines; a number that is not finite, which JSON has no word for, as text."""
        sentences = (*self.record.pre_text, *self.record.post_text)
        cells = sorted({cell for step in self.traced.steps for each in step.operands for cell in each.cells})
        texts = sorted({place for step in self.traced.steps for each in step.operands for place in each.sentences})
        found = {
            "question": self.record.qa.question,
            "answer": self.result,
            "grounded": self.grounded,
            "ungrounded_operands": [operand.text for operand in self.elsewhere],
            "reason": self.traced.reason,
            "confidence": self.confidence,
            "program": self.program,
            "steps": [
                {
                    "operation": step.operation,
                    "operands": [_operand(operand) for operand in step.operands],
                    "value": _plain(step.value),
                    "reason": step.reason,
                }
                for step in self.traced.steps
            ],
            "cells": [{"row": row, "column": column, "text": self.record.table[row][column]} for row, column in cells],
            "sentences": [{"index": place, "text": sentences[place]} for place in texts],
            "candidates": [each.model_dump(mode="json") for each in self.candidates],
            "text": self.text,
            "finish_reason": self.finish_reason,
            "engine": self.engine,
            "num_cut": self.num_cut,
            "num_prompt_tokens": self.num_prompt_tokens,
            "seconds": round(self.seconds, 3),
        }
        return {name: _finite(value) for name, value in found.items()}


def ask(record: FinQARecord, spec: ModelSpec, prompt: PromptOptions, options: PredictOptions) -> Answer:
    """Put a question to a model.

    Args:
        record: The page with the question; nothing else of ``qa`` is read.
        spec: The model.
        prompt: System message and longest prompt.
        options: How tokens are chosen, what they may say, and how one of several candidates is chosen.

    Raises:
        ModelError: The model cannot be used, or not in this way; or page and question do not fit its context.
        ResourceError: A package, the hub or a server is missing, or memory ran out.
        DataError: The question alone is longer than the prompt may be.
    """
    grammars = make_grammars(options, [record])
    hint = memory_hint(
        min(options.batch_size, options.num_candidates),
        prompt.max_length,
        "add --load-in-4bit" if spec.can_load_in_4bit else None,
    )
    with advice_on_memory(hint, during=f"asking {spec.name}"):
        model = open_model(spec)
        try:
            built = build_messages(
                record,
                system=prompt.system,
                budget=prompt_budget(prompt.max_length),
                count_tokens=model.count_text_tokens,
                count_prompt=model.count_tokens,
            )
            completions = sorted_by_prompt(model.complete([built.messages], decoding_from_options(options, grammars)))
        except PromptError as error:
            raise ModelError(f"the page with its question{error.problem}", hint=error.hint) from None
        finally:
            model.close()
    predicted = choose_prediction(record.id, completions, options, record.table, grammars[0] if grammars else None)
    sentences = [unit.text for unit in page_units(record) if unit.kind == "text"]
    return Answer(
        record=record,
        text=predicted.text,
        program=predicted.program,
        traced=_in_words(trace(tokenize(predicted.program), record.table, sentences), predicted.program),
        finish_reason=predicted.finish_reason,
        confidence=predicted.confidence,
        candidates=predicted.candidates,
        engine=model.engine,
        num_cut=built.num_cut,
        num_prompt_tokens=predicted.num_prompt_tokens,
        seconds=predicted.seconds,
    )


def _in_words(traced: Trace, program: str) -> Trace:
    """An execution with reasons for people."""
    is_text = not _CALL.match(program) and tokenize(program)[0] not in OPERATIONS
    if traced.execution.invalid and program and is_text:
        short = program if len(program) <= _LONGEST_TEXT else f"{program[:_LONGEST_TEXT].rstrip()} ..."
        return replace(traced, reason=f"the model wrote text, not a program: {short}")
    # The official script takes "inf" and "nan" for results; nobody asks a page for them.
    result = traced.execution.result
    if traced.reason is None and result in {"inf", "-inf", "nan"}:
        return replace(traced, reason=f"the result is no finite number: {result}")
    return traced


def _operand(operand: Operand) -> dict[str, Any]:
    value = operand.value
    return {
        "text": operand.text,
        "from": operand.kind,
        "value": list(value) if isinstance(value, tuple) else _plain(value),
        "cells": [list(cell) for cell in operand.cells],
        "sentences": list(operand.sentences),
        "step": operand.step,
    }


def _plain(value: object) -> float | str | None:
    return value if value is None or isinstance(value, (float, str)) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
