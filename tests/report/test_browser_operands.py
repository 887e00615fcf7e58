from __future__ import annotations

from fintune.finqa.program import tokenize
from fintune.finqa.trace import trace
from fintune.records import FinQARecord
from fintune.report.browser import find_used_parts, find_words, operand_positions

RECORD = FinQARecord.model_validate(
    {
        "id": "A/1/page_1.pdf-1",
        "pre_text": ["sales were $ 50 million .", "in 2010 , 50 people left ."],
        "table": [["", "2010", "2009"], ["sales", "$ 50", "40"], ["target", "50", "-12 ( 12 )"]],
        "post_text": ["nothing ."],
        "qa": {
            "question": "how far from 77 is the target?",
            "program": "subtract(50, 40)",
            "exe_ans": 10.0,
            "gold_inds": {"table_1": "..."},
        },
    }
)


def shown(program: str, record: FinQARecord = RECORD) -> list[list[dict[str, object]]]:
    traced = trace(tokenize(program), record.table, (*record.pre_text, *record.post_text))
    return operand_positions(traced, record, find_used_parts(record))


def test_of_several_places_that_of_the_gold_program_is_meant() -> None:
    assert shown("add(50, 12)") == [[{"t": "50", "c": ((1, 1),)}, {"t": "12", "c": ((2, 2),)}]]


def test_where_gold_reads_none_of_them_all_cells_are_shown() -> None:
    other = RECORD.model_copy(update={"qa": RECORD.qa.model_copy(update={"program": "add(40, 12)"})})
    assert shown("add(50, 12)", other)[0][0] == {"t": "50", "c": ((1, 1), (2, 1))}


def test_a_number_in_sentences_alone_is_shown_by_its_words() -> None:
    item = RECORD.model_copy(update={"table": (("", "x"),)})
    assert shown("add(50, 2010)", item) == [
        [{"t": "50", "x": {"0": (3,), "1": (3,)}}, {"t": "2010", "x": {"1": (1,)}}],
    ]


def test_a_row_constants_steps_the_question_and_what_is_nowhere() -> None:
    steps = shown("table_max(sales, none), add(#0, const_100), divide(77, 3.5), add(x, 1)")
    assert steps == [
        [{"t": "sales", "c": ((1, 1), (1, 2)), "row": 1}],
        [],
        [{"t": "77", "q": 1}, {"t": "3.5"}],
        [],
    ]


def test_words_that_only_contain_a_number_are_not_marked() -> None:
    assert find_words("50 a50 ( 50 ) $ 50% 5050 50-50", {50.0}) == (0, 3, 6)
