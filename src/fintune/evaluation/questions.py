"""Questions with known answers: those of the evaluation split, and the fixed prompts of the regression set.

The regression set comes with the package and never changes, so that every run is measured on the same prompts.
``regression_data/finance.jsonl`` holds questions with reference answers. ``regression_data/statements.jsonl`` holds
FinQA records made by ``builtin:statements`` (4 companies, small pages, 3 questions each, seed 4096).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from fintune.finqa.program import extract_program
from fintune.finqa.prompt import build_messages, prompt_budget
from fintune.finqa.verdict import executes_to_gold
from fintune.records import Example, FinQARecord, Message, Record

TASK = "Write the program that answers the question from the page."
"""Precedes each page in the user's turn, because some chat templates refuse a system message."""
_PAGE_BYTES = 4000
"""A prompt budget that no page of the regression set reaches, counted in bytes."""


@dataclass(frozen=True)
class GoldQuestion:
    """A prompt of the evaluation split, with the page, the gold program and the gold result of its record."""

    messages: tuple[Message, ...]
    record: FinQARecord

    def is_correct(self, completion: str) -> bool:
        """Whether the program in a completion executes to the gold result."""
        return executes_to_gold(extract_program(completion), self.record)


def read_questions(prepare: Path, ids: Collection[str]) -> list[GoldQuestion]:
    """Read the questions with these ids of a finished ``prepare`` that have a gold program, in its order."""
    gold = prepare / "gold.json"
    rows = json.loads(gold.read_text(encoding="utf-8")) if gold.is_file() else []
    records = {record.id: record for record in map(FinQARecord.model_validate, rows)}
    with (prepare / "eval.jsonl").open(encoding="utf-8") as lines:
        examples = [Example.model_validate_json(line) for line in lines]
    return [
        GoldQuestion(example.messages, records[example.id])
        for example in examples
        if example.id in ids and example.id in records
    ]


class RegressionPrompt(Record):
    """A prompt of the regression set with its reference answer; ``record`` is its page in the group ``statements``."""

    id: str
    group: Literal["finance", "statements"]
    messages: tuple[Message, ...]
    answer: str
    record: FinQARecord | None = None


def regression_prompts() -> list[RegressionPrompt]:
    """Read the regression set. The questions about one page are adjacent."""
    finance = []
    for row in map(json.loads, _lines("finance.jsonl")):
        messages = (Message(role="user", content=row["question"]),)
        finance.append(RegressionPrompt(id=row["id"], group="finance", messages=messages, answer=row["answer"]))
    return finance + [_page_prompt(FinQARecord.model_validate_json(line)) for line in _lines("statements.jsonl")]


def _page_prompt(record: FinQARecord) -> RegressionPrompt:
    built = build_messages(
        record,
        system="",
        budget=prompt_budget(_PAGE_BYTES, 0),
        count_tokens=lambda text: len(text.encode()),
        count_prompt=lambda messages: sum(len(message.content.encode()) for message in messages),
    )
    assert built.num_cut == 0, "no page of the regression set is cut"
    (turn,) = built.messages
    message = Message(role="user", content=f"{TASK}\n\n{turn.content}")
    return RegressionPrompt(
        id=record.id, group="statements", messages=(message,), answer=record.qa.program, record=record
    )


def _lines(name: str) -> list[str]:
    return (files("fintune.evaluation") / "regression_data" / name).read_text(encoding="utf-8").splitlines()
