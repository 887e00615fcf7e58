"""A page and a question as chat messages, cut to a number of tokens.

The user's message is the text before the table, the table, the text after it and, last, the question. Every sentence
and every table row has its own line. A table row names its columns, so a model finds a cell by name without counting::

    ( in millions )
    segment revenue | 2009: 1267 | 2008: 1356 | 2007: 1345

Words that all column names share at their beginning or end are only in the header line (:func:`table_lines`).

Numbers are written as in FinQA's programs (``subtract(1267, 1356)``). `fintune.finqa.cleaning` cleans texts and cells.
Empty cells and empty sentences are left out. Row names do not change, because table operations name rows by them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

from fintune.errors import DataError
from fintune.finqa.cleaning import clean_cell, clean_question, clean_sentence
from fintune.finqa.page import PageUnit, units_of_page
from fintune.finqa.text_similarity import rank_lines
from fintune.records import FinQARecord, Message

TokenCount = Callable[[str], int]
PromptCount = Callable[[Sequence[Message]], int]

QUESTION_HEADING = "Question:"
"""The beginning of a prompt's last line."""
COMPLETION_TOKENS = 96
"""Tokens reserved for the program. FinQA's longest gold program needs about 90 if every digit is a token."""


class TooLongError(DataError):
    """The question alone, with the system message and the template, is too long."""


@dataclass(frozen=True)
class Built:
    """A prompt.

    Attributes:
        messages: The system message, if there is one, and the user's message.
        num_cut: Number of sentences and table rows that were left out.
        kept: Units of the page in the prompt, in the order of the page.
        num_tokens: Length of the prompt in tokens, by ``count_prompt``.
    """

    messages: tuple[Message, ...]
    num_cut: int
    kept: tuple[PageUnit, ...]
    num_tokens: int


def prompt_budget(max_length: int, num_completion_tokens: int = 0) -> int:
    """Return the number of tokens that a prompt may have.

    The number of tokens that are reserved for the completion does not depend on the gold program, unless the program is
    longer. So the cut of a page says nothing about its answer.

    Args:
        max_length: Tokens of prompt and completion together.
        num_completion_tokens: Length of the completion in tokens, if it is known.
    """
    return max_length - max(min(COMPLETION_TOKENS, max_length // 4), num_completion_tokens)


def build_messages(
    record: FinQARecord,
    *,
    system: str,
    budget: int,
    count_tokens: TokenCount,
    count_prompt: PromptCount | None = None,
) -> Built:
    """Build the prompt for a record; a page that is too long is cut.

    The least relevant units are left out first (:func:`~fintune.finqa.text_similarity.rank_lines`), the table's header
    last, and the question never.

    Args:
        record: The page and the question. Program, answer and evidence are not read.
        system: The system message; if it is empty, there is none.
        budget: Number of tokens that the prompt may have.
        count_tokens: Function that returns the number of tokens of a text.
        count_prompt: Function that returns the number of tokens of rendered messages, template included. If it is None,
            the tokens of the contents are added up.

    Raises:
        TooLongError: The system message and the question alone are longer than ``budget``.
    """

    def measure(messages: Sequence[Message]) -> int:
        return count_prompt(messages) if count_prompt else sum(count_tokens(m.content) for m in messages)

    lines = page_lines(record)
    question = clean_question(record.qa.question)

    def build(kept: set[int]) -> tuple[Message, ...]:
        content = _content([line for k, line in enumerate(lines) if k in kept], question)
        user = Message(role="user", content=content)
        return (Message(role="system", content=system), user) if system else (user,)

    kept = set(range(len(lines)))
    messages = build(kept)
    num_tokens = measure(messages)
    if num_tokens > budget:
        rows = {k for k, (unit, _) in enumerate(lines) if unit.kind == "table"}
        order = rank_lines(question, [line for _, line in lines], rows, first=sorted(rows)[:1])
        kept, messages, num_tokens = _cut(lines, order, build, measure, budget, count_tokens)
    units = tuple(unit for k, (unit, _) in enumerate(lines) if k in kept)
    return Built(messages, len(lines) - len(kept), units, num_tokens)


def _cut(
    lines: Sequence[tuple[PageUnit, str]],
    order: Sequence[int],
    build: Callable[[set[int]], tuple[Message, ...]],
    measure: PromptCount,
    budget: int,
    count_tokens: TokenCount,
) -> tuple[set[int], tuple[Message, ...], int]:
    """Keep the lines that fit, in ``order``: first by the sum of their tokens, then by the tokens of the prompt."""
    messages = build(set())
    num_tokens = measure(messages)
    if num_tokens > budget:
        raise TooLongError(
            f"the question alone needs {num_tokens} of {budget} prompt tokens", hint="raise prompt.max_length"
        )
    remaining_tokens = budget - num_tokens
    taken: list[int] = []
    # Sentences that are empty after cleaning need no tokens, so none of them is cut.
    empty = {k for k, (unit, line) in enumerate(lines) if unit.kind == "text" and not line}
    for k in order:
        if k in empty:
            continue
        cost = count_tokens(lines[k][1] + "\n")
        if cost <= remaining_tokens:
            remaining_tokens -= cost
            taken.append(k)
    while taken:
        kept = empty | set(taken)
        messages = build(kept)
        num_tokens = measure(messages)
        if num_tokens <= budget:
            return kept, messages, num_tokens
        taken.pop()
    return empty, build(empty), measure(build(empty))


def page_lines(record: FinQARecord) -> Sequence[tuple[PageUnit, str]]:
    """Return the units of a page with their lines in a prompt."""
    return _page_lines(record.pre_text, record.table, record.post_text)


@lru_cache(64)  # several questions are asked about a page
def _page_lines(
    pre_text: tuple[str, ...], table: tuple[tuple[str, ...], ...], post_text: tuple[str, ...]
) -> tuple[tuple[PageUnit, str], ...]:
    rows = table_lines(table)
    units = units_of_page(pre_text, table, post_text)
    return tuple((unit, rows[unit.index] if unit.kind == "table" else clean_sentence(unit.text)) for unit in units)


def table_lines(table: Sequence[Sequence[str]]) -> list[str]:
    """Return one line for every row, header first.

    A cell is written ``column: cell``. If all columns share words at the beginning or the end (``december 31 , 2009``
    and ``december 31 , 2008``), the rows have only the words that differ, and the header line has the whole names. A
    single column is named only in the header line.
    """
    if not table:
        return []
    columns = [clean_cell(name) for name in table[0][1:]]
    labels = _labels(columns)
    corner = table[0][0] if table[0] else ""
    lines = [corner if labels == columns else " | ".join((corner, *columns))]
    for row in table[1:]:
        pairs = zip_longest(labels, map(clean_cell, row[1:]), fillvalue="")
        lines.append(" | ".join([*row[:1], *(f"{label}: {cell}" if label else cell for label, cell in pairs if cell)]))
    return lines


def _labels(columns: Sequence[str]) -> list[str]:
    if len(columns) == 1:
        return [""]
    # A bracket counts as one word: "( in millions )" is shared as a whole or not at all.
    names = [re.findall(r"\([^()]*\)|\S+", column) for column in columns]
    start = _num_shared(names)
    end = _num_shared([name[start:][::-1] for name in names])
    return [" ".join(name[start : len(name) - end]) for name in names]


def _num_shared(names: Sequence[Sequence[str]]) -> int:
    """Return how many first words all names share; every name keeps at least one word."""
    shortest = min((len(name) for name in names), default=0)
    number = 0
    while number < shortest - 1 and len({name[number] for name in names}) == 1:
        number += 1
    return number


def excerpt(record: FinQARecord, keys: Collection[str]) -> str:
    """Return the user's message with a part of the page: the units of these keys, and the header if one is a row.

    Args:
        record: The page and the question.
        keys: Keys such as ``text_3`` and ``table_1``; unknown keys are ignored.
    """
    kept = {*keys, "table_0"} if any(key.startswith("table_") for key in keys) else set(keys)
    lines = [(unit, line) for unit, line in page_lines(record) if unit.key in kept]
    return _content(lines, clean_question(record.qa.question))


def _content(lines: Sequence[tuple[PageUnit, str]], question: str) -> str:
    blocks: list[list[str]] = []
    kind = ""
    for unit, line in lines:
        if unit.kind != kind:
            blocks.append([])
            kind = unit.kind
        if line:
            blocks[-1].append(line)
    parts = ["\n".join(block) for block in blocks if block]
    return "\n\n".join([*parts, _question_line(question)])


def question_line(question: str) -> str:
    """Return the line of a question; alone, it is another question about a page that an earlier message has."""
    return _question_line(clean_question(question))


def _question_line(question: str) -> str:
    return f"{QUESTION_HEADING} {question}"
