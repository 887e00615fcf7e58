"""``fintune ask``: one question about one page, with the source of its numbers; ``fintune page``: the page as read."""

from __future__ import annotations

import json as json_format
import math
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fintune.cli.common import (
    FILE,
    candidates_option,
    echo,
    engine_option,
    four_bit_option,
    page_mode_option,
    predict_overrides,
    resolve_run_model,
    strategy_option,
)
from fintune.config import PredictOptions, PromptOptions
from fintune.config.load import load
from fintune.data.files import read_whole_text
from fintune.data.page_file import PageReading, read_page
from fintune.errors import DataError, ModelError, PromptError
from fintune.finqa.page import page_units
from fintune.finqa.program import OPERATIONS, tokenize
from fintune.finqa.prompt import build_messages, prompt_budget
from fintune.finqa.trace import Operand, Trace, trace
from fintune.inference.decoding_strategies import choose_prediction, decoding_from_options, make_grammars
from fintune.inference.generate import memory_hint
from fintune.inference.open_model import ModelSpec, open_model
from fintune.inference.protocol import sorted_by_prompt
from fintune.records import Candidate, FinQARecord
from fintune.report.answer_text import answer_lines, confidence_line
from fintune.util.console import make_console
from fintune.util.memory import advice_on_memory
from fintune.util.text import abridge_remarks, escape_control_chars

if TYPE_CHECKING:
    from fintune.data.page_numbers import Mark
    from fintune.inference.open_model import EngineChoice

_CALL = re.compile(r"\w+\(")
_LONGEST_TEXT = 80

_decimal_option = click.option(
    "--decimal",
    type=click.Choice(["point", "comma"]),
    help="Decimal separator used in the table (default: detect).",
)
_table_option = click.option("--table", type=int, metavar="N", help="Number of the table, if the page has several.")
_id_option = click.option(
    "--id", "record_id", metavar="ID", help="Id of the record, if the page is a FinQA file of several."
)


@click.command("ask")
@click.argument("model")
@click.argument("question")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--page", type=FILE, metavar="FILE", help="Page that the question is about.  [required]")
@click.option("--text", type=FILE, metavar="FILE", help="Text file to put before the page's own text.")
@_id_option
@_decimal_option
@_table_option
@click.option("--adapter", type=FILE, metavar="DIR", help="PEFT adapter of the model.")
@engine_option
@four_bit_option
@page_mode_option
@strategy_option
@candidates_option
@click.option("--config", type=FILE, metavar="CONFIG", help="Configuration of the run that trained the model.")
@click.option("--json", is_flag=True, help="Print one JSON object instead of text.")
def ask_command(
    model: str,
    question: str,
    overrides: tuple[str, ...],
    page: Path | None,
    text: Path | None,
    record_id: str | None,
    decimal: Mark | None,
    table: int | None,
    adapter: Path | None,
    engine: EngineChoice,
    load_in_4bit: bool,
    constrain: str | None,
    strategy: str | None,
    num_candidates: int | None,
    config: Path | None,
    json: bool,
) -> None:
    """Answer a question about a page, and show the program and the cells and sentences that it uses.

    MODEL is a folder, a hub id, builtin:smollm2-135m, a GGUF file, a run's folder (its GGUF file, else its merged
    model), or the address of an OpenAI-compatible server: http://127.0.0.1:8080/v1#NAME. The page is a FinQA record
    (JSON), a CSV table, or an HTML or Markdown page. Of several tables, the one that fits the question best is read, or
    that of --table. Numbers that are not on the page are marked as ungrounded. The exit status is 1 if there is no
    answer.
    """
    if page is None:
        raise click.UsageError(
            f"ask needs a page: give --page FILE. To chat without a page: fintune serve {shlex.quote(model)}"
        )
    flags = predict_overrides(constrain, strategy, num_candidates)
    model, run_options = resolve_run_model(model, with_adapter=adapter is not None)
    options = load(config, (*(run_options if config is None else ()), *overrides, *flags)).config
    spec = ModelSpec.from_options(model, options, adapter=adapter, engine=engine, load_in_4bit=load_in_4bit)
    spec.engine_name  # noqa: B018 - refuses what does not go together, before the page is read
    more = read_whole_text(text, hint="give plain text") if text is not None else ""
    reading = read_page(page, question, text=more, record_id=record_id, decimal=decimal, table=table)
    for note in abridge_remarks(reading.notes, "fintune page shows all"):
        echo(f"fintune: {page}: {note}", err=True)
    answer = answer_question(reading.record, spec, options.prompt, options.predict)
    if json:
        click.echo(json_format.dumps(answer.as_json(), ensure_ascii=False, indent=2, allow_nan=False))
    else:
        _print_answer(answer, options.predict)
    if answer.result is None:
        sys.exit(1)


@click.command("page")
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILE...")
@_decimal_option
@_table_option
@click.option(
    "--question", default="", metavar="TEXT", help="Question that chooses the table, if the page has several."
)
@_id_option
@click.option("--json", is_flag=True, help="Print one JSON object a file.")
def page_command(
    files: tuple[Path, ...],
    decimal: Mark | None,
    table: int | None,
    question: str,
    record_id: str | None,
    json: bool,
) -> None:
    """Show how report pages are read: the table with its names, the text, the units, and what was left out.

    The exit status is 2 if a file could not be read; the others are shown.
    """
    failed = False
    for path in files:
        try:
            page = read_page(path, question or None, record_id=record_id, decimal=decimal, table=table)
        except DataError as error:
            failed = True
            if json:
                click.echo(json_format.dumps({"file": str(path), "error": str(error)}, ensure_ascii=False))
            else:
                echo(f"fintune: {error}", err=True)
            continue
        if json:
            record = page.record
            shown: dict[str, object] = {
                "file": str(path),
                "table": record.table,
                "pre_text": record.pre_text,
                "post_text": record.post_text,
            }
            shown |= {
                "units": page.units,
                "notes": page.notes,
                "table_number": page.number,
                "num_tables": page.num_tables,
            }
            click.echo(json_format.dumps(shown, ensure_ascii=False))
        else:
            _print_page(path, page)
    if failed:
        sys.exit(2)


def _print_page(path: Path, page: PageReading) -> None:
    out = make_console()
    out.print(f"{path}: table {page.number} of {page.num_tables}", style="bold", markup=False, soft_wrap=True)
    record = page.record
    for sentence in record.pre_text:
        out.print(escape_control_chars(sentence), markup=False, soft_wrap=True)
    for row in record.table:
        out.print(escape_control_chars(" | ".join(row)), markup=False, highlight=False, soft_wrap=True)
    for sentence in record.post_text:
        out.print(escape_control_chars(sentence), markup=False, soft_wrap=True)
    for unit in page.units:
        out.print(f"unit: {escape_control_chars(unit)}", markup=False, soft_wrap=True)
    for note in page.notes:
        out.print(f"note: {escape_control_chars(note)}", markup=False, soft_wrap=True)


def _print_answer(answer: Answer, options: PredictOptions) -> None:
    out = make_console()
    lines = answer_lines(
        answer.record,
        "" if answer.is_text else answer.program,
        answer.traced,
        answer.result,
        answer.elsewhere,
        has_only_constants=answer.has_only_constants,
    )
    for line in lines:
        out.print(line, soft_wrap=True)
    results = [candidate.result for candidate in answer.candidates]
    out.print(confidence_line(answer.confidence, results, answer.result), soft_wrap=True)
    if options.num_fewshot:
        click.echo("fintune: ask ignores predict.num_fewshot: it shows no solved questions", err=True)
    if answer.num_cut:
        click.echo(f"fintune: {answer.num_cut} sentences and rows did not fit prompt.max_length", err=True)
    if answer.finish_reason == "length":
        limit = options.max_new_tokens
        click.echo(f"fintune: the completion was cut off at predict.max_new_tokens={limit}", err=True)


@dataclass(frozen=True)
class Answer:
    """The answer of a model.

    Attributes:
        record: The page and the question.
        text: The completion.
        program: The program in the completion, "" if there is none.
        traced: Execution of the program.
        finish_reason: "length" if the completion was cut off.
        confidence: See :class:`fintune.records.Prediction`.
        candidates: All completions, if there were several.
        engine: Name of the engine.
        num_cut: Sentences and table rows that did not fit the prompt.
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
        """Result of the program, or None."""
        execution = self.traced.execution
        has_result = not execution.invalid and self.traced.reason is None
        return execution.result if has_result else None

    @property
    def is_text(self) -> bool:
        """Whether the completion is plain text instead of a program."""
        return _is_text(self.program, self.traced)

    @property
    def elsewhere(self) -> tuple[Operand, ...]:
        """Operands that are not on the page."""
        return tuple(
            operand
            for step in self.traced.steps
            for operand in step.operands
            if operand.kind == "elsewhere" and operand.value is not None
        )

    @property
    def has_only_constants(self) -> bool:
        """Whether the program uses constants only."""
        kinds = {operand.kind for step in self.traced.steps for operand in step.operands}
        return bool(kinds) and kinds <= {"constant", "step"}

    @property
    def grounded(self) -> bool:
        """Whether there is an answer that uses only numbers of the page and constants."""
        return self.result is not None and not self.elsewhere and not self.has_only_constants

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values. Infinite numbers, which JSON cannot express, become text."""
        sentences = (*self.record.pre_text, *self.record.post_text)
        operands = [operand for step in self.traced.steps for operand in step.operands]
        cells = sorted({cell for operand in operands for cell in operand.cells})
        texts = sorted({index for operand in operands for index in operand.sentences})
        values = {
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
                    "value": _json_value(step.value),
                    "reason": step.reason,
                }
                for step in self.traced.steps
            ],
            "cells": [{"row": row, "column": column, "text": self.record.table[row][column]} for row, column in cells],
            "sentences": [{"index": index, "text": sentences[index]} for index in texts],
            "candidates": [candidate.model_dump(mode="json") for candidate in self.candidates],
            "text": self.text,
            "finish_reason": self.finish_reason,
            "engine": self.engine,
            "num_cut": self.num_cut,
            "num_prompt_tokens": self.num_prompt_tokens,
            "seconds": round(self.seconds, 3),
        }
        return {name: _finite(value) for name, value in values.items()}


def answer_question(record: FinQARecord, spec: ModelSpec, prompt: PromptOptions, options: PredictOptions) -> Answer:
    """Ask a model a question about a page.

    Args:
        record: The page with the question. No other field of ``qa`` is read.
        spec: The model.
        prompt: System message and maximum length of the prompt.
        options: How tokens and candidates are chosen.

    Raises:
        ModelError: The model cannot be used with these options, or page and question do not fit its context.
        ResourceError: A package, the hub or a server is missing, or memory ran out.
        DataError: The question alone is longer than ``prompt.max_length``.
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
        traced=_with_reasons(trace(tokenize(predicted.program), record.table, sentences), predicted.program),
        finish_reason=predicted.finish_reason,
        confidence=predicted.confidence,
        candidates=predicted.candidates,
        engine=model.engine,
        num_cut=built.num_cut,
        num_prompt_tokens=predicted.num_prompt_tokens,
        seconds=predicted.seconds,
    )


def _with_reasons(traced: Trace, program: str) -> Trace:
    """Return the execution with reasons for people."""
    if _is_text(program, traced):
        short = program if len(program) <= _LONGEST_TEXT else f"{program[:_LONGEST_TEXT].rstrip()} ..."
        return replace(traced, reason=f"the model wrote text, not a program: {short}")
    # The official script takes "inf" and "nan" for results; here they are no answer.
    result = traced.execution.result
    if traced.reason is None and result in {"inf", "-inf", "nan"}:
        return replace(traced, reason=f"the result is not a finite number: {result}")
    return traced


def _is_text(program: str, traced: Trace) -> bool:
    if not program or not traced.execution.invalid:
        return False
    return not _CALL.match(program) and tokenize(program)[0] not in OPERATIONS


def _operand(operand: Operand) -> dict[str, Any]:
    value = operand.value
    return {
        "text": operand.text,
        "from": operand.kind,
        "value": list(value) if isinstance(value, tuple) else _json_value(value),
        "cells": [list(cell) for cell in operand.cells],
        "sentences": list(operand.sentences),
        "step": operand.step,
    }


def _json_value(value: object) -> float | str | None:
    return value if value is None or isinstance(value, (float, str)) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
