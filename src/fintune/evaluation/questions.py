"""Questions with a gold program, and whether a completion executes to the gold result: the official verdict's core."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fintune.finqa.execute import execute
from fintune.finqa.program import extract_program, tokenize
from fintune.records import Example, FinQARecord, Message


@dataclass(frozen=True)
class Question:
    """A prompt of the evaluation split with its page.

    Attributes:
        messages: The turns of the prompt.
        record: Holds table and gold result.
    """

    messages: tuple[Message, ...]
    record: FinQARecord

    def is_right(self, text: str) -> bool:
        """Whether the program in a completion executes to the gold result."""
        execution = execute(tokenize(extract_program(text)), self.record.table)
        return not execution.invalid and execution.result == self.record.qa.exe_ans


def read_questions(prepare: Path, ids: Collection[str]) -> list[Question]:
    """Those questions of a finished ``prepare`` that have a gold program, in its order.

    Args:
        prepare: The folder.
        ids: Which of them.
    """
    gold = prepare / "gold.json"
    raw = json.loads(gold.read_text(encoding="utf-8")) if gold.is_file() else []
    records = {record.id: record for record in map(FinQARecord.model_validate, raw)}
    with (prepare / "eval.jsonl").open(encoding="utf-8") as lines:
        examples = [Example.model_validate_json(line) for line in lines]
    return [Question(each.messages, records[each.id]) for each in examples if each.id in ids and each.id in records]
