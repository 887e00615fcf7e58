"""The official FinQA verdict on one prediction, and other views of it.

A prediction is execution-correct if its program runs and gives exactly ``exe_ans``, and program-correct if the official
script calls it equal to the gold program (github.com/czyssrs/FinQA, code/evaluate/evaluate.py). Every part of the
package that asks whether a program is right asks here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias, get_args

from fintune.errors import DataError
from fintune.finqa.equal import equal_program
from fintune.finqa.execute import NO_RESULT, Execution, execute, run_program
from fintune.finqa.official import split_step, split_steps
from fintune.finqa.program import OPERATIONS, tokenize, untokenize
from fintune.records import FinQARecord, Record

EvidenceKind: TypeAlias = Literal["table", "text", "both", "unknown"]
QuestionType: TypeAlias = Literal["percent", "yes_no", "amount"]
PredictionOutcome: TypeAlias = Literal["equal_program", "other_program", "wrong_result", "no_result", "invalid"]
OUTCOMES: tuple[PredictionOutcome, ...] = get_args(PredictionOutcome)

PERCENT = re.compile(r"percent|%|growth rate|portion", re.IGNORECASE)
NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)", re.ASCII)


def is_execution_correct(execution: Execution, exe_ans: float | str) -> bool:
    """Return whether an execution gives exactly the gold result, which has 5 decimals: the official verdict."""
    return not execution.invalid and execution.result == exe_ans


def executes_to_gold(program: str, record: FinQARecord) -> bool:
    """Return whether a program in linear form runs on the record's table and gives exactly its ``exe_ans``."""
    return is_execution_correct(execute(tokenize(program), record.table), record.qa.exe_ans)


class OfficialVerdict(Record):
    """The official verdict on one prediction. Its fields are the first columns of ``score.csv``.

    Attributes:
        id: The question's id.
        exe_correct: Whether the program executes to exactly ``exe_ans``.
        program_correct: Whether the official script calls the program equal to the gold program.
        invalid: The official invalid flag.
        result: The official result: a number, or text for "yes", "no", "n/a" and numbers that are not finite.
        outcome: The kind of success or failure. ``no_result`` has no complete step; officially it is not invalid.
    """

    id: str
    exe_correct: bool
    program_correct: bool
    invalid: bool
    result: float | str
    outcome: PredictionOutcome


class Verdict(OfficialVerdict):
    """The official verdict on one prediction, the tolerant views, and the groups it is counted in.

    Attributes:
        exe_ans: The gold result.
        equality_raised: Whether the official script stops here with an AssertionError: the programs are equal and the
            results differ. Such a prediction counts as program-correct and execution-incorrect.
        reason: Why there is no result, in words; None if there is one.
        sign_insensitive: Whether the result is correct, or correct with the other sign.
        scale_100: Whether the result is correct, or a hundred times too large or too small.
        within_1_percent: Whether the result is at most 1 % of ``exe_ans`` away from it.
        answer_agreement: Whether the result agrees with the annotator's free-text ``answer``; None if the record has
            no answer, or one that is no single number, yes or no.
        program: The predicted program in linear form.
        gold_program: The gold program in linear form.
        num_steps: Number of steps of the gold program.
        operations: The operations of the gold program, without repetition.
        evidence: Whether the gold evidence (``gold_inds``) is in the table, in the text, or in both.
        question_type: ``yes_no`` by ``exe_ans``, ``percent`` by the words of the question or a "%" in the answer.
    """

    exe_ans: float | str
    equality_raised: bool
    reason: str | None
    sign_insensitive: bool
    scale_100: bool
    within_1_percent: bool
    answer_agreement: bool | None
    program: str
    gold_program: str
    num_steps: int
    operations: tuple[str, ...]
    evidence: EvidenceKind
    question_type: QuestionType


def judge(record: FinQARecord, tokens: Sequence[str]) -> tuple[Verdict, bool]:
    """Judge one prediction.

    Args:
        record: The question, with its page and gold program.
        tokens: The official tokens of the predicted program, "EOF" included.

    Returns:
        The verdict, and whether the official comparison can read the gold program at all.
    """
    gold = _gold(record.qa.program)
    ran = run_program(tokens, record.table)
    execution, exe_ans = ran.execution, record.qa.exe_ans
    exe_correct = is_execution_correct(execution, exe_ans)
    comparable = True
    try:
        program_correct = equal_program(gold.tokens, tokens)
    except DataError:
        comparable = program_correct = False
    return Verdict(
        id=record.id,
        exe_correct=exe_correct,
        program_correct=program_correct,
        invalid=execution.invalid,
        result=execution.result,
        exe_ans=exe_ans,
        equality_raised=program_correct and execution.result != exe_ans,
        outcome=_outcome(execution, exe_correct, program_correct),
        reason=ran.reason,
        sign_insensitive=exe_correct or _near(execution, exe_ans, _is_opposite),
        scale_100=exe_correct or _near(execution, exe_ans, _is_scaled),
        within_1_percent=exe_correct or _near(execution, exe_ans, _is_near),
        answer_agreement=agrees_with_answer(execution, record.qa.answer),
        program=untokenize(tokens),
        gold_program=record.qa.program,
        num_steps=gold.num_steps,
        operations=gold.operations,
        evidence=_evidence(record),
        question_type=_question_type(record),
    ), comparable


class _Gold(NamedTuple):
    tokens: tuple[str, ...]
    num_steps: int
    operations: tuple[str, ...]


@lru_cache(maxsize=16384)
def _gold(program: str) -> _Gold:
    tokens = tuple(tokenize(program))
    named: list[str] = []
    for raw in split_steps(tokens[:-1]):
        try:
            named.append(split_step(raw)[0])
        except ValueError:
            named.append("")
    return _Gold(tokens, len(named), tuple(name for name in OPERATIONS if name in named))


def _outcome(execution: Execution, exe_correct: bool, program_correct: bool) -> PredictionOutcome:
    if execution.invalid:
        return "invalid"
    if exe_correct:
        return "equal_program" if program_correct else "other_program"
    return "no_result" if execution.result == NO_RESULT else "wrong_result"


def _near(execution: Execution, exe_ans: float | str, test: Callable[[float, float], bool]) -> bool:
    if execution.invalid or execution.unrounded is None or isinstance(exe_ans, str):
        return False
    return test(execution.unrounded, exe_ans) or test(round(execution.unrounded, 5), exe_ans)


def _is_opposite(value: float, gold: float) -> bool:
    return abs(value) == abs(gold)


def _is_near(value: float, gold: float) -> bool:
    return _close(value, gold, 0.01)


def _is_scaled(value: float, gold: float) -> bool:
    # Scaled before it is rounded: 0.0675676 * 100 is 6.75676, while the rounded 0.06757 gives 6.757.
    return any(_close(round(scaled, 5), gold, 1e-12) for scaled in (value * 100, value / 100) if math.isfinite(scaled))


def _close(value: float, gold: float, tolerance: float) -> bool:
    return abs(value - gold) <= tolerance * abs(gold)


def _evidence(record: FinQARecord) -> EvidenceKind:
    kinds = {name.partition("_")[0] for name in record.qa.gold_inds or ()}
    if "table" in kinds:
        return "both" if "text" in kinds else "table"
    return "text" if "text" in kinds else "unknown"


def _question_type(record: FinQARecord) -> QuestionType:
    if isinstance(record.qa.exe_ans, str):
        return "yes_no"
    percent = PERCENT.search(record.qa.question) or "%" in (record.qa.answer or "")
    return "percent" if percent else "amount"


def agrees_with_answer(execution: Execution, answer: str | None) -> bool | None:
    """Return whether a result agrees with an annotator's free-text answer.

    A number agrees if it is less than one unit of the answer's last digit away, since annotators round and truncate.
    An answer with "%" is compared with the result and with 100 times the result. Signs count. Units such as "million"
    are ignored.

    Returns:
        None if the answer is no single number, yes or no.
    """
    text = (answer or "").strip().lower()
    if text in {"yes", "no"}:
        return not execution.invalid and execution.result == text
    numbers = NUMBER.findall(text)
    if len(numbers) != 1:
        return None
    if execution.invalid or execution.unrounded is None:
        return False
    digits = numbers[0].replace(",", "")
    unit = 10.0 ** -len(digits.partition(".")[2])
    candidates = [execution.unrounded, *([execution.unrounded * 100] if "%" in text else [])]
    return any(abs(candidate - float(digits)) < unit for candidate in candidates)
