from __future__ import annotations

import pytest

from fintune.evaluation.audit import FINDINGS, SHARED, audit_split, find_overlaps, near_pairs, question_words
from fintune.records import FinQAQuestion, FinQARecord

TABLE = (
    ("( in millions )", "2019", "2018"),
    ("net sales", "5829", "5735"),
    ("other items", "-32 ( 32 )", "5 %"),
)


def record(
    record_id: str = "ACME/2019/page_1.pdf-1",
    program: str = "subtract(5829, 5735)",
    exe_ans: float | str = 94.0,
    *,
    question: str = "what is the change in net sales?",
    answer: str | None = "94",
    table: tuple[tuple[str, ...], ...] = TABLE,
    gold_inds: dict[str, str] | None = None,
    text: str = "sales grew .",
) -> FinQARecord:
    qa = FinQAQuestion(question=question, program=program, exe_ans=exe_ans, answer=answer, gold_inds=gold_inds)
    return FinQARecord(id=record_id, pre_text=(text,), post_text=(), table=table, qa=qa)


def kinds(one: FinQARecord) -> set[str]:
    return {kind for kind, ids in audit_split([one], {}).findings.items() if ids}


def test_audit_split_finds_nothing_in_a_usual_record() -> None:
    assert kinds(record()) == set()


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        (record(program="add(1e1, 2018)", exe_ans=2028.0, answer="2028"), {"not_in_language"}),
        (record(program="divide(5829, const_0)"), {"does_not_execute", "answer_other_value"}),
        (record(program="add(5829"), {"does_not_execute", "not_in_language", "answer_other_value"}),
        (record(exe_ans=95.0), {"executes_to_other"}),
        (record(program="add(5829, 2018), subtract(5829, 5735)"), {"unused_step"}),
        (record(program="subtract(5829, 5734)", exe_ans=95.0, answer="95"), {"operand_not_on_page"}),
        (record(program="add(5829, 32)", exe_ans=5861.0, answer="5861"), {"operand_sign_dropped"}),
        (
            record(program="table_sum(note, none)", exe_ans=1.0, table=(*TABLE, ("note", "x"))),
            {"does_not_execute", "answer_other_value"},
        ),
        (record(answer=None), set()),
        (record(answer=" "), set()),
        (record(answer="about 94 of 100"), set()),
        (record(answer="-94"), {"answer_other_sign"}),
        (record(answer="0.094"), {"answer_other_scale"}),
        (record(answer="94000 thousand"), {"answer_other_scale"}),
        (record(answer="95.1"), {"answer_other_value"}),
        (record(answer="0"), {"answer_other_value"}),
        (
            record(
                program="divide(5829, 5735), multiply(#0, const_100)",
                exe_ans=101.63906,
                answer="101.6%",
                question="what percent?",
            ),
            {"percent_times_100"},
        ),
        (record(table=(*TABLE, ("costs (a)", "1"))), {"row_name_unwritable"}),
        (record(table=(*TABLE, ("a, b", "1"))), {"row_name_unwritable"}),
        (record(table=(*TABLE, ("net sales", "1"))), {"row_name_twice"}),
        (record(table=(*TABLE, ("", "1"), ("", "2"))), set()),
    ],
)
def test_audit_split_finds_unusual_records(odd: FinQARecord, expected: set[str]) -> None:
    assert kinds(odd) == expected


def test_audit_split_compares_yes_and_no() -> None:
    assert kinds(record(program="greater(5829, 5735)", exe_ans="yes", answer="yes")) == set()
    assert kinds(record(program="greater(5829, 5735)", exe_ans="yes", answer="no")) == {"answer_other_value"}


def test_audit_split_finds_repeated_questions() -> None:
    found = audit_split(
        [
            record("A/1/p.pdf-1"),
            record("A/1/p.pdf-2", question="What is the change in net sales"),
            record("A/2/p.pdf-1"),
            record("B/1/p.pdf-1", question="what is it?"),
            record("B/1/p.pdf-2", question="what is it?", program="add(5829, 5735)", exe_ans=11564.0),
        ],
        {"no id": 2},
    )
    twice = ("A/1/p.pdf-1", "A/1/p.pdf-2", "B/1/p.pdf-1", "B/1/p.pdf-2")
    assert found.findings["question_twice_on_page"] == twice
    assert found.findings["question_on_other_page"] == ("A/1/p.pdf-1", "A/1/p.pdf-2", "A/2/p.pdf-1")
    assert (found.num_records, found.num_pages, found.num_reports, found.num_companies) == (5, 3, 3, 2)
    assert found.dropped == {"no id": 2}
    assert list(found.findings) == list(FINDINGS)


def test_audit_split_compares_derived_evidence() -> None:
    found = audit_split(
        [
            record("a-1", gold_inds={"table_1": "x"}),
            record("a-2", gold_inds={"table_1": "x", "text_0": "y"}),
            record("a-3", gold_inds={"text_0": "y"}, table=(*TABLE, ("net sales again", "5829", "5735"))),
            record("a-4"),
            record("a-5", program="subtract(77, 5735)"),
        ],
        {},
    ).evidence
    assert found.agreement == {"exact": 1, "covers": 0, "within": 1, "overlaps": 0, "apart": 1}
    assert (found.num_annotated, found.num_unambiguous, found.unambiguous["apart"]) == (3, 2, 0)
    assert (found.num_derived, found.num_without) == (1, 1)


def test_find_overlaps_counts_what_is_shared() -> None:
    first = [record("A/1/p.pdf-1"), record("A/1/p.pdf-2", question="a b c d e"), record("B/1/p.pdf-1", text="other")]
    second = [
        record("A/1/p.pdf-1", question="a b c d f", text="x"),
        record("A/2/p.pdf-1", question="what is the change in net sales ?"),
        record("C/2/p.pdf-1", question="a b c d e x", program="add(5829, 5735)", text="x"),
    ]
    (found,) = find_overlaps({"train": first, "dev": second})
    assert list(found.shared) == list(SHARED)
    assert {name: (each.num, each.num_first, each.num_second) for name, each in found.shared.items()} == {
        "id": (1, 1, 1),
        "page": (1, 2, 1),
        "report": (1, 2, 1),
        "company": (1, 2, 2),
        "page_text": (1, 2, 1),
        "question": (1, 2, 1),
        "near_question": (1, 1, 1),
    }
    assert found.shared["company"].second_ids == ("A/1/p.pdf-1", "A/2/p.pdf-1")


def test_find_overlaps_compares_every_two_files() -> None:
    found = find_overlaps({name: [record()] for name in ("a", "b", "c")})
    assert [(each.first, each.second) for each in found] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_near_pairs_agrees_with_brute_force() -> None:
    import random

    rng = random.Random(0)
    sides = [[rng.choices("abcdefgh", k=rng.randint(0, 7)) for _ in range(60)] for _ in range(2)]
    expected = [
        (k, m)
        for m, b in enumerate(sides[1])
        for k, a in enumerate(sides[0])
        if (set(a) | set(b)) and len(set(a) & set(b)) / len(set(a) | set(b)) >= 0.8 and a != b
    ]
    assert sorted(near_pairs(*sides)) == sorted(expected)
    assert len(expected) > 20


def test_question_words_ignores_case_and_punctuation() -> None:
    assert question_words("What is 5,829.5 % of U.S. sales ?") == ("what", "is", "5,829.5", "of", "u", "s", "sales")
