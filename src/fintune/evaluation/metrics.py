"""FinQA scores over many predictions: the official figures, and other views under their own names.

The official figures are those that github.com/czyssrs/FinQA, code/evaluate/evaluate.py prints: exact equality of the
executed result with ``exe_ans`` (rounded to 5 decimals) and symbolic equality of the programs, both over the number of
predictions.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from fintune.errors import DataError
from fintune.evaluation.statistics import Interval, wilson
from fintune.finqa.verdict import EvidenceKind, PredictionOutcome, QuestionType, Verdict, judge
from fintune.records import FinQARecord, Record

_Key = TypeVar("_Key", int, str, EvidenceKind, QuestionType)


class Rates(Record):
    """The official figures of a set of predictions: fractions with their 95 % intervals (Wilson's)."""

    num_predictions: int
    execution_accuracy: float
    program_accuracy: float
    invalid_rate: float
    execution_accuracy_interval: Interval
    program_accuracy_interval: Interval
    invalid_rate_interval: Interval

    @property
    def no_program_rate(self) -> float:
        """Share of completions without one complete step; officially they are not invalid. Only `Score` knows it."""
        return 0.0


class WholeFile(Record):
    """Figures over every question of the gold file. A missing id is wrong; of several predictions the first counts."""

    num_gold: int
    num_missing: int
    execution_accuracy: float
    program_accuracy: float
    execution_accuracy_interval: Interval
    program_accuracy_interval: Interval


class Tolerant(Record):
    """Views that are no official figure, as fractions of the predictions. `Verdict` describes them.

    ``answer_agreement`` is a fraction of the ``num_with_answer`` predictions whose question has a usable answer; None
    if there is no such prediction.
    """

    sign_insensitive: float
    scale_100: float
    within_1_percent: float
    answer_agreement: float | None
    num_with_answer: int


class Score(Rates):
    """All figures of a set of predictions. The `Rates` are over the predictions, as in the official script.

    Attributes:
        num_duplicates: Number of predictions for an id that has an earlier one. They count, as they do officially.
        num_equality_raised: Number of verdicts with `Verdict.equality_raised`.
        num_gold_not_comparable: Number of predictions whose gold program the official comparison cannot read.
        whole_file: Figures over the whole gold file.
        tolerant: Views that are no official figure.
        outcomes: Number of predictions by `Verdict.outcome`.
        by_num_steps: Figures by number of steps of the gold program.
        by_operation: Figures by operation of the gold program. A program with two operations counts under both.
        by_evidence: Figures by source of the gold evidence.
        by_question_type: Figures by type of question.
    """

    num_duplicates: int
    num_equality_raised: int
    num_gold_not_comparable: int
    whole_file: WholeFile
    tolerant: Tolerant
    outcomes: dict[PredictionOutcome, int]
    by_num_steps: dict[int, Rates]
    by_operation: dict[str, Rates]
    by_evidence: dict[EvidenceKind, Rates]
    by_question_type: dict[QuestionType, Rates]

    @property
    def no_program_rate(self) -> float:
        """Share of completions without one complete step; officially they are not invalid."""
        return self.outcomes.get("no_result", 0) / self.num_predictions


def compute_scores(
    gold: Sequence[FinQARecord], predictions: Sequence[tuple[str, Sequence[str]]]
) -> tuple[Score, list[Verdict]]:
    """Compute all figures, and the verdicts in the order of the predictions.

    Args:
        gold: Records with unique ids.
        predictions: Id and official tokens ("EOF" included) of every prediction.

    Raises:
        DataError: There is no prediction, or a prediction has an id that is not in ``gold``.
    """
    if not predictions:
        raise DataError("there are no predictions to score")
    records = {record.id: record for record in gold}
    if unknown := [record_id for record_id, _ in predictions if record_id not in records]:
        raise DataError("a prediction for an id that is not in the gold file", record_id=unknown[0])
    # Without this, Python looks for garbage among all pages, which took a sixth of the time.
    gc.freeze()
    try:
        judged = [judge(records[record_id], tokens) for record_id, tokens in predictions]
    finally:
        gc.unfreeze()
    verdicts = [verdict for verdict, _ in judged]
    return _score(len(records), verdicts, sum(not comparable for _, comparable in judged)), verdicts


def _score(num_gold: int, verdicts: Sequence[Verdict], num_gold_not_comparable: int) -> Score:
    number = len(verdicts)
    first = {verdict.id: verdict for verdict in reversed(verdicts)}
    answered = [verdict.answer_agreement for verdict in verdicts if verdict.answer_agreement is not None]
    return Score(
        **dict(_rates(verdicts)),
        num_duplicates=number - len(first),
        num_equality_raised=sum(verdict.equality_raised for verdict in verdicts),
        num_gold_not_comparable=num_gold_not_comparable,
        whole_file=WholeFile(
            num_gold=num_gold,
            num_missing=num_gold - len(first),
            **_fractions(
                first.values(), num_gold, execution_accuracy="exe_correct", program_accuracy="program_correct"
            ),
        ),
        tolerant=Tolerant(
            sign_insensitive=sum(verdict.sign_insensitive for verdict in verdicts) / number,
            scale_100=sum(verdict.scale_100 for verdict in verdicts) / number,
            within_1_percent=sum(verdict.within_1_percent for verdict in verdicts) / number,
            answer_agreement=sum(answered) / len(answered) if answered else None,
            num_with_answer=len(answered),
        ),
        outcomes=dict(Counter(verdict.outcome for verdict in verdicts)),
        by_num_steps=_grouped((verdict.num_steps, verdict) for verdict in verdicts),
        by_operation=_grouped((name, verdict) for verdict in verdicts for name in verdict.operations),
        by_evidence=_grouped((verdict.evidence, verdict) for verdict in verdicts),
        by_question_type=_grouped((verdict.question_type, verdict) for verdict in verdicts),
    )


def _rates(verdicts: Sequence[Verdict]) -> Rates:
    flags = {"execution_accuracy": "exe_correct", "program_accuracy": "program_correct", "invalid_rate": "invalid"}
    return Rates(num_predictions=len(verdicts), **_fractions(verdicts, len(verdicts), **flags))


def _fractions(verdicts: Iterable[Verdict], number: int, **flags: str) -> dict[str, Any]:
    """The share of ``number`` questions whose verdict has a flag, and its interval, by the name of the share."""
    hits = {name: sum(getattr(verdict, flag) for verdict in verdicts) for name, flag in flags.items()}
    intervals = {f"{name}_interval": wilson(count, number) for name, count in hits.items()}
    return {name: count / number for name, count in hits.items()} | intervals


def _grouped(pairs: Iterable[tuple[_Key, Verdict]]) -> dict[_Key, Rates]:
    groups: dict[_Key, list[Verdict]] = {}
    for key, verdict in pairs:
        groups.setdefault(key, []).append(verdict)
    return {key: _rates(groups[key]) for key in sorted(groups)}
