"""A page and a question as chat messages, cut to a number of tokens.

The user's message is the text before the table, the table, the text after it and, last, the question; one sentence and
one table row a line. A table row names its columns, so that a cell is found by row and column name without counting::

    ( in millions )
    segment revenue | 2009: 1267 | 2008: 1356 | 2007: 1345

Words that all column names share at their beginning or end are left to the header line (:func:`table_lines`).

Numbers stand as the programs of FinQA write them (``subtract(1267, 1356)``). Texts and cells are cleaned by
`fintune.finqa.cleaning`; a row leaves out its empty cells, the page its empty sentences.

Row names stay as they are, because table operations call rows by them.
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
"""Room kept for the program; FinQA's longest gold needs about 90 tokens where every digit is one."""


class TooLongError(DataError):
    """A question that alone, with the system message and the template, does not fit."""


@dataclass(frozen=True)
class Built:
    """A prompt.

    Attributes:
        messages: System message, where there is one, and the user's.
        num_cut: Sentences and table rows that were left out.
        kept: Units of the page that the prompt holds, in the order of the page.
        num_tokens: Length of the prompt as ``count_prompt`` gave it.
    """

    messages: tuple[Message, ...]
    num_cut: int
    kept: tuple[PageUnit, ...]
    num_tokens: int


def prompt_budget(max_length: int, num_completion_tokens: int = 0) -> int:
    """Tokens that a prompt may have.

    The room for the completion does not depend on the gold program unless that is longer, so that the cut of a page
    tells nothing about its answer.

    Args:
        max_length: Tokens of prompt and completion together.
        num_completion_tokens: Length of the completion, where it is known.
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
        record: Page and question; nothing of its program, answer or evidence is read.
        system: System message; none where empty.
        budget: Tokens that the prompt may have.
        count_tokens: Tokens of a text.
        count_prompt: Tokens of rendered messages, template included; the sum over their contents where None.

    Raises:
        TooLongError: System message and question alone are longer than ``budget``.
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
    """What fits, taken in ``order``; each line is counted once, then the whole prompt until it is exactly right."""
    messages = build(set())
    num_tokens = measure(messages)
    if num_tokens > budget:
        raise TooLongError(
            f"the question alone needs {num_tokens} of {budget} prompt tokens", hint="raise prompt.max_length"
        )
    room = budget - num_tokens
    taken: list[int] = []
    # Sentences that cleaning left empty take no room, so none of them is cut.
    empty = {k for k, (unit, line) in enumerate(lines) if unit.kind == "text" and not line}
    for k in order:
        if k in empty:
            continue
        cost = count_tokens(lines[k][1] + "\n")
        if cost <= room:
            room -= cost
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
    """One line a row, header first.

    A cell is written ``column: cell``. Where all columns share words at the beginning or the end (``december 31 ,
    2009`` and ``december 31 , 2008``), the rows have the words that differ and the header line the whole names; a
    single column is named in the header line alone.
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
    # A bracket is one word: "( in millions )" is shared as a whole or not at all.
    names = [re.findall(r"\([^()]*\)|\S+", column) for column in columns]
    start = _num_shared(names)
    end = _num_shared([name[start:][::-1] for name in names])
    return [" ".join(name[start : len(name) - end]) for name in names]


def _num_shared(names: Sequence[Sequence[str]]) -> int:
    """How many first words all names share, each keeping at least one word of its own."""
    shortest = min((len(name) for name in names), default=0)
    number = 0
    while number < shortest - 1 and len({name[number] for name in names}) == 1:
        number += 1
    return number


def excerpt(record: FinQARecord, keys: Collection[str]) -> str:
    """The user's message with a part of the page: the units of these keys, and the header above any row of them.

    Args:
        record: Page and question.
        keys: ``text_3``, ``table_1`` ...; unknown ones are left out.
    """
    wanted = {*keys, "table_0"} if any(key.startswith("table_") for key in keys) else set(keys)
    lines = [(unit, line) for unit, line in page_lines(record) if unit.key in wanted]
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
    """The line that asks; alone, it is a further question about a page that was shown before."""
    return _question_line(clean_question(question))


def _question_line(question: str) -> str:
    return f"{QUESTION_HEADING} {question}"
