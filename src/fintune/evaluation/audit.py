"""What is odd about the gold of one FinQA file: a kind of finding, and the ids that it holds for.

Nothing here says that a record is wrong: the official score takes every one of them as it stands.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from fintune.errors import DataError
from fintune.evaluation.audit_evidence import EvidenceAudit, audit_evidence
from fintune.finqa.execute import NO_RESULT, Execution
from fintune.finqa.grammar import can_be_named, outside, vocabulary
from fintune.finqa.identity import LEVELS, group_of
from fintune.finqa.official import cell_number
from fintune.finqa.parse import parse
from fintune.finqa.program import Program, Reference, tokenize
from fintune.finqa.trace import Trace, trace
from fintune.finqa.verdict import NUMBER, PERCENT, agrees_with_answer
from fintune.records import FinQARecord, Record

KINDS: Mapping[str, str] = {
    "not_in_language": "gold program is outside the language",
    "does_not_execute": "gold program does not execute",
    "executes_to_other": "gold program executes to another value than exe_ans",
    "unused_step": "a step of the gold program is not used by the last one",
    "operand_not_on_page": "an operand stands neither on the page nor in the question",
    "operand_sign_dropped": "an operand is a cell's number without its minus",
    "row_not_readable": "a table operation names a row with text or brackets",
    "constant_unknown": "a constant is outside FinQA's vocabulary",
    "answer_missing": "answer is not given or empty",
    "answer_not_numeric": "answer holds no single number, yes or no",
    "answer_other_sign": "answer has the other sign than exe_ans",
    "answer_other_scale": "answer is exe_ans times a power of ten (beside % that is not 100)",
    "answer_other_value": "answer is another value than exe_ans",
    "percent_times_100": "a question for a percentage, with a result times 100 (most are fractions)",
    "row_name_unwritable": "table has a row that no program can name",
    "row_name_twice": "table has several rows of one name (the last counts)",
    "question_twice_on_page": "the same question about the same page",
    "question_conflict": "the same question about the same page, with another exe_ans",
    "question_on_other_page": "the same question about another page",
}
"""Kinds of finding in the order in which they are shown, with their meaning."""

_WORD = re.compile(r"[^\W_]+(?:[.,]\d+)*")
_POWERS = (2, 3, 6, 9, -2, -3, -6, -9)


class SplitAudit(Record):
    """One file.

    Attributes:
        num_records: Usable records.
        num_pages: Pages that they ask about; likewise reports and companies.
        dropped: Records that cannot be used, by reason.
        findings: Ids by kind (`KINDS`), in file order; every kind is there.
    """

    num_records: int
    num_pages: int
    num_reports: int
    num_companies: int
    dropped: dict[str, int]
    findings: dict[str, tuple[str, ...]]
    evidence: EvidenceAudit


def audit_split(records: Sequence[FinQARecord], dropped: Mapping[str, int]) -> SplitAudit:
    """Look at one file.

    Args:
        records: Its usable records.
        dropped: Number of others, by reason.
    """
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    twins = _twins(records)
    for record in records:
        traced = trace(tokenize(record.qa.program), record.table, _sentences(record))
        kinds = {*_program(record, traced), *_answer(record, traced.execution), *_table(record), *twins[record.id]}
        for kind in kinds:
            found[kind].append(record.id)
    pages, reports, companies = (len({group_of(record.id, level) for record in records}) for level in LEVELS)
    return SplitAudit(
        num_records=len(records),
        num_pages=pages,
        num_reports=reports,
        num_companies=companies,
        dropped=dict(dropped),
        findings={kind: tuple(ids) for kind, ids in found.items()},
        evidence=audit_evidence(records),
    )


def question_words(question: str) -> tuple[str, ...]:
    """Words and numbers of a question in lower case: questions are the same where these are."""
    return tuple(_WORD.findall(question.lower()))


def _sentences(record: FinQARecord) -> tuple[str, ...]:
    return record.pre_text + record.post_text


def _program(record: FinQARecord, traced: Trace) -> Iterator[str]:
    execution = traced.execution
    if execution.invalid or execution.result == NO_RESULT:
        yield "does_not_execute"
    elif execution.result != record.qa.exe_ans:
        yield "executes_to_other"
    if any(_sign_dropped(each.value, each.cells, record) for step in traced.steps for each in step.operands):
        yield "operand_sign_dropped"
    try:
        program = parse(record.qa.program)
    except DataError:
        yield "not_in_language"
        return
    if _unused(program):
        yield "unused_step"
    if _in_percent(program) and PERCENT.search(record.qa.question):
        yield "percent_times_100"
    for reason in outside(program, vocabulary(record.table, (*_sentences(record), record.qa.question))):
        if reason.startswith("number"):
            yield "operand_not_on_page"
        elif reason.startswith("row"):
            yield "row_not_readable"
        elif reason.startswith("constant"):
            yield "constant_unknown"


def _sign_dropped(value: object, cells: Sequence[tuple[int, int]], record: FinQARecord) -> bool:
    if not isinstance(value, float) or value <= 0 or not cells:
        return False
    numbers = []
    for row, column in cells:
        try:
            numbers.append(cell_number(record.table[row][column]))
        except ValueError:
            return False
    return all(number == -value for number in numbers)


def _unused(program: Program) -> bool:
    used = {len(program.steps) - 1}
    for k in range(len(program.steps) - 1, -1, -1):
        step = program.steps[k]
        if k in used:
            used |= {each.step for each in (step.first, step.second) if isinstance(each, Reference)}
    return len(used) < len(program.steps)


def _in_percent(program: Program) -> bool:
    last = program.steps[-1]
    texts = {each.text for each in (last.first, last.second) if not isinstance(each, Reference)}
    return last.operation == "multiply" and bool(texts & {"const_100", "100"})


def _answer(record: FinQARecord, execution: Execution) -> Iterator[str]:
    answer = (record.qa.answer or "").strip()
    agrees = agrees_with_answer(execution, answer)
    if not answer:
        yield "answer_missing"
    elif agrees is None:
        yield "answer_not_numeric"
    elif not agrees:
        numbers = NUMBER.findall(answer)
        value = execution.unrounded
        if value is None or not numbers:
            yield "answer_other_value"
        elif agrees_with_answer(Execution(False, -value, -value), answer):
            yield "answer_other_sign"
        else:
            yield "answer_other_scale" if _scaled(value, float(numbers[0].replace(",", ""))) else "answer_other_value"


def _scaled(value: float, answer: float) -> bool:
    # Within 1 %, not within the answer's last digit: scaled down far enough, anything is near 0.
    near = (abs(abs(value) * 10.0**power - abs(answer)) <= 0.01 * abs(answer) for power in _POWERS)
    return answer != 0 and any(near)


def _table(record: FinQARecord) -> Iterator[str]:
    names = [row[0] for row in record.table[1:] if row and row[0].strip()]
    if not all(map(can_be_named, names)):
        yield "row_name_unwritable"
    if len(set(names)) < len(names):
        yield "row_name_twice"


def _twins(records: Sequence[FinQARecord]) -> dict[str, set[str]]:
    """Findings about questions that are there more than once, by id."""
    groups: dict[tuple[str, ...], list[FinQARecord]] = defaultdict(list)
    for record in records:
        groups[question_words(record.qa.question)].append(record)
    found: dict[str, set[str]] = {record.id: set() for record in records}
    for group in groups.values():
        pages: dict[str, list[FinQARecord]] = defaultdict(list)
        for record in group:
            pages[group_of(record.id, "page")].append(record)
        for same in pages.values():
            for record in same:
                found[record.id] |= {"question_on_other_page"} if len(pages) > 1 else set()
                found[record.id] |= {"question_twice_on_page"} if len(same) > 1 else set()
                conflict = len({other.qa.exe_ans for other in same}) > 1
                found[record.id] |= {"question_conflict"} if conflict else set()
    return found
