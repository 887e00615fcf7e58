"""The guard's prompts, which come with the package and never change: a run is measured as every other one.

``guard_data/finance.jsonl`` holds questions with reference answers; ``guard_data/statements.jsonl`` FinQA records with
programs, made by ``builtin:statements`` (4 companies, small pages, 3 questions each, seed 4096).
"""

from __future__ import annotations

from importlib.resources import files

from fintune.finqa.prompt import build_messages, prompt_budget
from fintune.records import FinQARecord, Message, Record

TASK = "Write the program that answers the question from the page."
"""Stands before each page, in the user's turn: some chat templates refuse a system message."""
_ROOM = 4000
"""Enough for each page whole, in bytes and so in any tokens."""


class GuardPrompt(Record):
    """A prompt with what should be answered.

    Attributes:
        id: Short.
        group: ``finance`` or ``statements``.
        messages: The turns before the answer.
        answer: The reference.
        record: The page with its gold result, of ``statements``.
    """

    id: str
    group: str
    messages: tuple[Message, ...]
    answer: str
    record: FinQARecord | None = None


class _Question(Record):
    id: str
    question: str
    answer: str


def prompts() -> list[GuardPrompt]:
    """All of them, the questions of a page one behind the other."""
    asked = [_Question.model_validate_json(line) for line in _lines("finance.jsonl")]
    found = [
        GuardPrompt(
            id=each.id,
            group="finance",
            messages=(Message(role="user", content=each.question),),
            answer=each.answer,
        )
        for each in asked
    ]
    return found + [_page(FinQARecord.model_validate_json(line)) for line in _lines("statements.jsonl")]


def _page(record: FinQARecord) -> GuardPrompt:
    built = build_messages(
        record,
        system="",
        budget=prompt_budget(_ROOM, 0),
        count_tokens=lambda text: len(text.encode()),
        count_prompt=lambda messages: sum(len(message.content.encode()) for message in messages),
    )
    assert built.num_cut == 0, "the pages are whole"
    (turn,) = built.messages
    asked = Message(role="user", content=f"{TASK}\n\n{turn.content}")
    return GuardPrompt(id=record.id, group="statements", messages=(asked,), answer=record.qa.program, record=record)


def _lines(name: str) -> list[str]:
    return (files("fintune.evaluation") / "regression_data" / name).read_text(encoding="utf-8").splitlines()
