"""What a set of FinQA records is made of, generated or real, so that the two can stand side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fintune.finqa.program import tokenize
from fintune.records import FinQARecord


@dataclass(frozen=True)
class Distribution:
    """Counts over records.

    Attributes:
        num_records: Records counted.
        steps: Number of steps as "1", "2", "3", ">=4" to records.
        operations: Operation to uses; a program can use one several times.
        evidence: "table", "text", "both" or "unknown" to records.
        answers: "number" or "yes/no" to records.
    """

    num_records: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    evidence: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)


def distribution(records: Iterable[FinQARecord]) -> Distribution:
    """Count steps, operations, evidence and answers."""
    num_records = 0
    steps, operations, evidence, answers = (Counter[str]() for _ in range(4))
    for record in records:
        num_records += 1
        used = [token[:-1] for token in tokenize(record.qa.program) if token.endswith("(")]
        steps[str(len(used)) if len(used) < 4 else ">=4"] += 1
        operations.update(used)
        evidence[_evidence_kind(record)] += 1
        answers["yes/no" if isinstance(record.qa.exe_ans, str) else "number"] += 1
    return Distribution(num_records, steps, operations, evidence, answers)


def _evidence_kind(record: FinQARecord) -> str:
    kinds = {key.partition("_")[0] for key in record.qa.gold_inds or ()}
    return "both" if len(kinds) == 2 else next(iter(kinds), "unknown")
