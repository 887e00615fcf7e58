"""How well evidence derived from a program's operands stands for the annotated, over the records of one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fintune.finqa.evidence import AGREEMENTS, Agreement, agreement, derive
from fintune.finqa.program import tokenize
from fintune.records import FinQARecord, Record


class EvidenceAudit(Record):
    """Annotated evidence (``gold_inds``), and the one derived from the operands (`fintune.finqa.evidence`).

    Attributes:
        num_annotated: Records with ``gold_inds``.
        agreement: Of these, derived against annotated: exact, covers (all of it and more), within (only of it),
            overlaps, apart.
        num_unambiguous: Of these, those whose operands each stand in one place.
        unambiguous: Their agreement.
        num_derived: Records without ``gold_inds`` for which evidence of every operand was found.
        num_without: Records without either.
    """

    num_annotated: int
    agreement: dict[Agreement, int]
    num_unambiguous: int
    unambiguous: dict[Agreement, int]
    num_derived: int
    num_without: int


def audit_evidence(records: Sequence[FinQARecord]) -> EvidenceAudit:
    """Derive the evidence of every record and hold it against ``gold_inds``, where there is one."""
    found: Counter[Agreement] = Counter()
    clear: Counter[Agreement] = Counter()
    num_derived = num_without = 0
    for record in records:
        sentences = record.pre_text + record.post_text
        derived = derive(tokenize(record.qa.program), record.table, sentences, record.qa.question)
        if not record.qa.gold_inds:
            num_derived += derived.complete
            num_without += not derived.complete
            continue
        how = agreement(derived.units, record.qa.gold_inds)
        found[how] += 1
        clear[how] += not derived.chosen
    return EvidenceAudit(
        num_annotated=found.total(),
        agreement={kind: found[kind] for kind in AGREEMENTS},
        num_unambiguous=clear.total(),
        unambiguous={kind: clear[kind] for kind in AGREEMENTS},
        num_derived=num_derived,
        num_without=num_without,
    )
