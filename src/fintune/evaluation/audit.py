"""Audit FinQA files: unusual records of one file, and what two files share.

A finding does not mean that a record is wrong: the official score includes all of them. What two files share shows
whether a score on one flatters a model that was trained on the other.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

from fintune.errors import DataError
from fintune.finqa.evidence import AGREEMENTS, Agreement, agreement, derive
from fintune.finqa.execute import NO_RESULT, Execution
from fintune.finqa.grammar import can_be_named, outside, vocabulary
from fintune.finqa.official import cell_number
from fintune.finqa.page import LEVELS, group_of, page_content
from fintune.finqa.parse import parse
from fintune.finqa.program import Program, Reference, tokenize
from fintune.finqa.trace import Trace, trace
from fintune.finqa.verdict import NUMBER, PERCENT, agrees_with_answer
from fintune.records import FinQARecord, Record

Splits: TypeAlias = Mapping[str, Sequence[FinQARecord]]  # by the name of their file

FINDINGS: Mapping[str, str] = {
    "not_in_language": "gold program is outside the language",
    "does_not_execute": "gold program does not execute",
    "executes_to_other": "gold program executes to another value than exe_ans",
    "unused_step": "a step of the gold program is not used",
    "operand_not_on_page": "an operand is neither on the page nor in the question",
    "operand_sign_dropped": "an operand is a cell's number without its minus",
    "answer_other_sign": "answer has the other sign than exe_ans",
    "answer_other_scale": "answer is exe_ans times a power of ten (except 100 for an answer in %)",
    "answer_other_value": "answer is another value than exe_ans",
    "percent_times_100": "a question for a percentage has a result times 100 (most are fractions)",
    "row_name_unwritable": "table has a row that no program can name",
    "row_name_twice": "table has several rows of one name (the last one counts)",
    "question_twice_on_page": "the same question about the same page",
    "question_on_other_page": "the same question about another page",
}
"""Kinds of finding in the order of the table, with their meaning."""

SHARED = ("id", *LEVELS, "page_text", "question", "near_question")
"""What is compared: the id and its parts, the page's text and table whatever the id, the question's words, and pairs of
questions that share `NEAR` of their words."""

NEAR = 0.8
"""Share of the words that two nearly equal questions have in common (Jaccard index of the sets)."""

_WORD = re.compile(r"[^\W_]+(?:[.,]\d+)*")
_POWERS = (2, 3, 6, 9, -2, -3, -6, -9)


class EvidenceAudit(Record):
    """Evidence derived from the operands (`fintune.finqa.evidence`), compared with the annotated (``gold_inds``).

    Attributes:
        num_annotated: Number of records with ``gold_inds``.
        agreement: Number of those by agreement: exact, covers (all and more), within (a part), overlaps, apart.
        num_unambiguous: Number of those whose operands are each in one place.
        unambiguous: Number of these by agreement.
        num_derived: Number of records without ``gold_inds`` for which evidence of every operand was found.
        num_without: Number of records without either.
    """

    num_annotated: int
    agreement: dict[Agreement, int]
    num_unambiguous: int
    unambiguous: dict[Agreement, int]
    num_derived: int
    num_without: int


class SplitAudit(Record):
    """The audit of one file: its usable records, and the pages, reports and companies that they ask about.

    Attributes:
        dropped: Number of records that cannot be used, by reason.
        findings: Ids by kind of finding (`FINDINGS`), in file order; every kind is a key.
    """

    num_records: int
    num_pages: int
    num_reports: int
    num_companies: int
    dropped: dict[str, int]
    findings: dict[str, tuple[str, ...]]
    evidence: EvidenceAudit


class SharedItems(Record):
    """One kind of thing that two files share.

    ``num`` counts distinct things; for ``near_question`` it counts pairs of different questions. ``num_first`` and
    ``num_second`` count the records of each file that have one of them.
    """

    num: int
    num_first: int
    num_second: int
    second_ids: tuple[str, ...]


class Overlap(Record):
    """What two files share; ``shared`` has an entry for everything in `SHARED`."""

    first: str
    second: str
    shared: dict[str, SharedItems]


def audit_split(records: Sequence[FinQARecord], dropped: Mapping[str, int]) -> SplitAudit:
    """Audit the usable records of one file; ``dropped`` is the number of the other records by reason."""
    findings: dict[str, list[str]] = {kind: [] for kind in FINDINGS}
    repeated = _repeated_questions(records)
    for record in records:
        traced = trace(tokenize(record.qa.program), record.table, _sentences(record))
        kinds = {*_program_findings(record, traced), *_answer_findings(record, traced.execution)}
        for kind in kinds | set(_table_findings(record)) | repeated[record.id]:
            findings[kind].append(record.id)
    pages, reports, companies = (len({group_of(record.id, level) for record in records}) for level in LEVELS)
    return SplitAudit(
        num_records=len(records),
        num_pages=pages,
        num_reports=reports,
        num_companies=companies,
        dropped=dict(dropped),
        findings={kind: tuple(ids) for kind, ids in findings.items()},
        evidence=_audit_evidence(records),
    )


def question_words(question: str) -> tuple[str, ...]:
    """Return the words and numbers of a question in lower case; questions are the same if these are."""
    return tuple(_WORD.findall(question.lower()))


def _sentences(record: FinQARecord) -> tuple[str, ...]:
    return record.pre_text + record.post_text


def _program_findings(record: FinQARecord, traced: Trace) -> Iterator[str]:
    execution = traced.execution
    if execution.invalid or execution.result == NO_RESULT:
        yield "does_not_execute"
    elif execution.result != record.qa.exe_ans:
        yield "executes_to_other"
    operands = (operand for step in traced.steps for operand in step.operands)
    if any(_is_sign_dropped(operand.value, operand.cells, record) for operand in operands):
        yield "operand_sign_dropped"
    try:
        program = parse(record.qa.program)
    except DataError:
        yield "not_in_language"
        return
    if _has_unused_step(program):
        yield "unused_step"
    if _is_times_100(program) and PERCENT.search(record.qa.question):
        yield "percent_times_100"
    words = vocabulary(record.table, (*_sentences(record), record.qa.question))
    if any(reason.startswith("number") for reason in outside(program, words)):
        yield "operand_not_on_page"


def _is_sign_dropped(value: object, cells: Sequence[tuple[int, int]], record: FinQARecord) -> bool:
    if not isinstance(value, float) or value <= 0 or not cells:
        return False
    try:
        return all(cell_number(record.table[row][column]) == -value for row, column in cells)
    except ValueError:
        return False


def _has_unused_step(program: Program) -> bool:
    used = {len(program.steps) - 1}
    for index, step in reversed(list(enumerate(program.steps))):
        if index in used:
            used |= {argument.step for argument in (step.first, step.second) if isinstance(argument, Reference)}
    return len(used) < len(program.steps)


def _is_times_100(program: Program) -> bool:
    last = program.steps[-1]
    texts = {argument.text for argument in (last.first, last.second) if not isinstance(argument, Reference)}
    return last.operation == "multiply" and bool(texts & {"const_100", "100"})


def _answer_findings(record: FinQARecord, execution: Execution) -> Iterator[str]:
    answer = (record.qa.answer or "").strip()
    if agrees_with_answer(execution, answer) is not False:  # None: no single number, yes or no
        return
    numbers = NUMBER.findall(answer)
    value = execution.unrounded
    if value is not None and numbers and agrees_with_answer(Execution(False, -value, -value), answer):
        yield "answer_other_sign"
    elif value is not None and numbers and _is_scaled(value, float(numbers[0].replace(",", ""))):
        yield "answer_other_scale"
    else:
        yield "answer_other_value"


def _is_scaled(value: float, answer: float) -> bool:
    # Within 1 %, not within the answer's last digit: any number that is scaled down far enough is near 0.
    near = (abs(abs(value) * 10.0**power - abs(answer)) <= 0.01 * abs(answer) for power in _POWERS)
    return answer != 0 and any(near)


def _table_findings(record: FinQARecord) -> Iterator[str]:
    names = [row[0] for row in record.table[1:] if row and row[0].strip()]
    if not all(map(can_be_named, names)):
        yield "row_name_unwritable"
    if len(set(names)) < len(names):
        yield "row_name_twice"


def _repeated_questions(records: Sequence[FinQARecord]) -> dict[str, set[str]]:
    """Findings about questions that occur more than once, by id."""
    keys = [(question_words(record.qa.question), group_of(record.id, "page")) for record in records]
    num_on_page = Counter(keys)
    num_pages = Counter(words for words, _ in num_on_page)
    findings = defaultdict[str, set[str]](set)
    for record, key in zip(records, keys, strict=True):
        findings[record.id] |= {"question_on_other_page"} if num_pages[key[0]] > 1 else set()
        findings[record.id] |= {"question_twice_on_page"} if num_on_page[key] > 1 else set()
    return findings


def _audit_evidence(records: Sequence[FinQARecord]) -> EvidenceAudit:
    counts: Counter[Agreement] = Counter()
    unambiguous: Counter[Agreement] = Counter()
    num_derived = 0
    for record in records:
        derived = derive(tokenize(record.qa.program), record.table, _sentences(record), record.qa.question)
        if record.qa.gold_inds:
            kind = agreement(derived.units, record.qa.gold_inds)
            counts[kind] += 1
            unambiguous[kind] += not derived.chosen
        else:
            num_derived += derived.complete
    return EvidenceAudit(
        num_annotated=counts.total(),
        agreement={kind: counts[kind] for kind in AGREEMENTS},
        num_unambiguous=unambiguous.total(),
        unambiguous={kind: unambiguous[kind] for kind in AGREEMENTS},
        num_derived=num_derived,
        num_without=len(records) - counts.total() - num_derived,
    )


def find_overlaps(splits: Splits) -> list[Overlap]:
    """Compare every two files, in their order."""
    return [
        Overlap(first=first, second=second, shared=_shared(splits[first], splits[second]))
        for first, second in combinations(splits, 2)
    ]


def _shared(first: Sequence[FinQARecord], second: Sequence[FinQARecord]) -> dict[str, SharedItems]:
    keys: dict[str, Callable[[FinQARecord], Hashable]] = {
        "id": lambda record: record.id,
        "page": lambda record: group_of(record.id, "page"),
        "report": lambda record: group_of(record.id, "report"),
        "company": lambda record: group_of(record.id, "company"),
        "page_text": page_content,
        "question": lambda record: question_words(record.qa.question),
    }

    def items(num: int, in_first: list[int], in_second: list[int]) -> SharedItems:
        ids = tuple(second[index].id for index in in_second)
        return SharedItems(num=num, num_first=len(in_first), num_second=len(ids), second_ids=ids)

    shared = {}
    for name, key in keys.items():
        sides = [[key(record) for record in records] for records in (first, second)]
        both = set(sides[0]) & set(sides[1])
        in_first, in_second = ([index for index, value in enumerate(side) if value in both] for side in sides)
        shared[name] = items(len(both), in_first, in_second)
    pairs = near_pairs(*([question_words(record.qa.question) for record in side] for side in (first, second)))
    near_first, near_second = (sorted({pair[side] for pair in pairs}) for side in (0, 1))
    return shared | {"near_question": items(len(pairs), near_first, near_second)}


def near_pairs(first: Sequence[Sequence[str]], second: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """Find pairs of questions (`question_words`) that share `NEAR` of their words and are not equal, as indices."""
    frequency = Counter(word for words in (*first, *second) for word in set(words))
    ordered = [[sorted(set(w), key=lambda word: (frequency[word], word)) for w in side] for side in (first, second)]
    # Sets that share at least NEAR of their words share one of their rarest (prefix filter, Chaudhuri et al. 2006).
    by_word: dict[str, list[int]] = defaultdict(list)
    for index, words in enumerate(ordered[0]):
        for word in _rarest(words):
            by_word[word].append(index)
    pairs = []
    for index, words in enumerate(ordered[1]):
        for other in sorted({other for word in _rarest(words) for other in by_word.get(word, ())}):
            common = len(set(words).intersection(ordered[0][other]))
            total = len(words) + len(ordered[0][other]) - common
            if common >= NEAR * total and tuple(first[other]) != tuple(second[index]):
                pairs.append((other, index))
    return pairs


def _rarest(words: Sequence[str]) -> Sequence[str]:
    # Slightly less than NEAR, because 0.8 * 5 is more than 4 in binary floats for some lengths.
    return words[: len(words) - math.ceil((NEAR - 1e-9) * len(words)) + 1]
