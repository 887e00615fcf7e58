"""The verdict on one prediction: official flags, and what else is said and grouped by."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

from fintune.errors import ArtifactError, DataError
from fintune.finqa.constants import OPERATIONS
from fintune.finqa.equal import equal_program
from fintune.finqa.execute import Execution, run
from fintune.finqa.official import split_step, split_steps
from fintune.finqa.program import tokenize, untokenize
from fintune.records import FinQARecord, Record

Evidence: TypeAlias = Literal["table", "text", "both", "unknown"]
QuestionType: TypeAlias = Literal["percent", "yes_no", "amount"]
Outcome: TypeAlias = Literal["equal_program", "other_program", "wrong_result", "no_result", "invalid"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

PERCENT = re.compile(r"percent|%|growth rate|portion", re.IGNORECASE)
NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)", re.ASCII)


class Judged(Record):
    """The official verdict on one prediction: the first columns of a row of ``score.csv``.

    Attributes:
        exe_correct: Executes to exactly ``exe_ans``.
        program_correct: Equal to the gold program as the official script decides it.
        invalid: The official invalid flag.
        result: Official result; text for "yes", "no", "n/a" and what is no finite number.
        outcome: The kind of success or failure; no_result has no complete step and is not officially invalid.
    """

    id: str
    exe_correct: bool
    program_correct: bool
    invalid: bool
    result: float | str
    outcome: Outcome


def read_verdicts(path: Path) -> dict[str, Judged]:
    """The verdicts of a ``score.csv``, by id.

    Raises:
        ArtifactError: It is missing, or no such file.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {
                row["id"]: Judged.model_validate({name: row[name] for name in Judged.model_fields})
                for row in csv.DictReader(file)
            }
    except (OSError, ValueError, csv.Error, KeyError) as error:
        raise ArtifactError(
            f"{path}: cannot be read ({str(error).splitlines()[0]})",
            hint=f"--redo score/{path.parent.name} makes it anew",
        ) from None


class Verdict(Judged):
    """The verdict on one prediction, and what it is grouped by.

    Attributes:
        equality_raised: The official script would stop with an AssertionError here: an equal program with another
            result. It counts as program-correct and, by its result, as execution-incorrect.
        reason: Why there is no result, in words; None where there is one.
        sign_insensitive: Correct, or with the other sign.
        scale_100: Correct, or a hundred times too large or too small.
        within_1_percent: Correct, or at most 1 % of ``exe_ans`` away from it.
        answer_agreement: Agrees with the annotator's free-text ``answer``; None where that is not known or no single
            number, yes or no.
        program: The predicted program in linear form.
        num_steps: Steps of the gold program.
        operations: Operations of the gold program, each once.
        evidence: Where the gold evidence (``gold_inds``) stands.
        question_type: yes_no by ``exe_ans``; percent by the words of the question and the sign in the answer.
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
    evidence: Evidence
    question_type: QuestionType


def judge(record: FinQARecord, tokens: Sequence[str]) -> tuple[Verdict, bool]:
    """Judge one prediction.

    Args:
        record: The question that it answers.
        tokens: Its official tokens, "EOF" included.

    Returns:
        The verdict, and whether the official comparison can read the gold program at all.
    """
    gold = _gold(record.qa.program)
    ran = run(tokens, record.table)
    execution, exe_ans = ran.execution, record.qa.exe_ans
    exe_correct = not execution.invalid and execution.result == exe_ans
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


def _outcome(execution: Execution, exe_correct: bool, program_correct: bool) -> Outcome:
    if execution.invalid:
        return "invalid"
    if exe_correct:
        return "equal_program" if program_correct else "other_program"
    return "no_result" if execution.result == "n/a" else "wrong_result"


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


def _evidence(record: FinQARecord) -> Evidence:
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
    """Whether a result agrees with an annotator's free text, None where that holds no single number, yes or no.

    A number agrees that is less than one unit of the answer's last digit away, since annotators both round and cut;
    beside an answer with "%" stand results as they are and times 100. Signs count; units ("million") are not read.
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
