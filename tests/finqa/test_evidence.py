from __future__ import annotations

from collections import Counter

import pytest

from fintune.finqa.evidence import agreement, derive
from fintune.finqa.program import tokenize
from support.official import needs_shared, split

TABLE = [
    ["( in millions )", "2019", "880"],
    ["net sales", "$ 5,829", "5735"],
    ["costs", "100", "41"],
    ["gross margin", "100", "-32 ( 32 )"],
]
SENTENCES = ["sales grew to 5735 .", "the rate was 4.5 % .", "41 stores stand in 7 states , 100 of them rented ."]


def keys(program: str, question: str = "what is it?") -> list[str]:
    return list(derive(tokenize(program), TABLE, SENTENCES, question).units)


def test_an_operand_in_one_place_names_it() -> None:
    found = derive(tokenize("subtract(5829, 4.5%), add(#0, -32)"), TABLE, SENTENCES, "?")
    assert dict(found.units) == {
        "table_1": "( in millions ) the net sales of 2019 is $ 5,829 ; the net sales of 880 is 5735 ;",
        "table_3": "( in millions ) the gross margin of 2019 is 100 ; the gross margin of 880 is -32 ( 32 ) ;",
        "text_1": "the rate was 4.5 % .",
    }
    assert (found.chosen, found.missing, found.complete) == ((), (), True)


def test_of_several_places_one_that_is_needed_anyway_is_taken() -> None:
    assert keys("subtract(5829, 5735)") == ["table_1"]
    assert keys("divide(7, 41)") == ["text_2"]


def test_of_several_places_one_that_operands_share_is_taken() -> None:
    assert keys("divide(41, 100)", "what are the costs?") == ["table_2"]
    assert keys("divide(41, 100)", "how many stores are rented in states?") == ["text_2"]


def test_of_equal_places_the_nearest_to_the_question_is_taken() -> None:
    found = derive(tokenize("add(100, const_1)"), TABLE, SENTENCES, "what is the gross margin?")
    assert list(found.units) == ["table_3"]
    assert found.chosen == ("100",)


def test_a_table_operation_needs_its_row() -> None:
    assert keys("table_sum(costs, none), add(#0, const_100)") == ["table_2"]


def test_an_operand_in_the_header_belongs_to_a_row_below() -> None:
    assert keys("subtract(5829, 880)") == ["table_1"]
    assert keys("divide(880, const_10)", "what is the gross margin?") == ["table_3"]
    assert list(derive(tokenize("add(880, 880)"), TABLE[:1], [], "?").units) == ["table_0"]


def test_an_operand_that_is_nowhere_is_told() -> None:
    found = derive(tokenize("add(5829, 777)"), TABLE, SENTENCES, "?")
    assert (list(found.units), found.missing, found.complete) == (["table_1"], ("777",), False)


def test_a_program_of_constants_has_no_evidence() -> None:
    assert not derive(tokenize("add(const_1, const_2)"), TABLE, SENTENCES, "?").complete


@pytest.mark.parametrize(
    ("derived", "expected"),
    [("ab", "exact"), ("abc", "covers"), ("a", "within"), ("ac", "overlaps"), ("c", "apart"), ("", "apart")],
)
def test_agreement_is_told_in_five_words(derived: str, expected: str) -> None:
    assert agreement(derived, "ab") == expected


@needs_shared
def test_on_dev_nineteen_of_twenty_derivations_hold_nothing_foreign() -> None:
    counts: Counter[str] = Counter()
    for record in split("dev"):
        if gold := record["qa"]["gold_inds"]:
            sentences = [*record["pre_text"], *record["post_text"]]
            question = record["qa"]["question"]
            counts[
                agreement(derive(tokenize(record["qa"]["program"]), record["table"], sentences, question).units, gold)
            ] += 1
    assert counts.total() == 866
    assert counts["exact"] + counts["covers"] >= 0.78 * 866
    assert counts["exact"] + counts["within"] >= 0.95 * 866
