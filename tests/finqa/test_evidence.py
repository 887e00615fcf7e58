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


def test_derive_takes_the_only_unit() -> None:
    derived = derive(tokenize("subtract(5829, 4.5%), add(#0, -32)"), TABLE, SENTENCES, "?")
    assert dict(derived.units) == {
        "table_1": "( in millions ) the net sales of 2019 is $ 5,829 ; the net sales of 880 is 5735 ;",
        "table_3": "( in millions ) the gross margin of 2019 is 100 ; the gross margin of 880 is -32 ( 32 ) ;",
        "text_1": "the rate was 4.5 % .",
    }
    assert (derived.chosen, derived.missing, derived.complete) == ((), (), True)


def test_derive_prefers_units_of_other_operands() -> None:
    assert keys("subtract(5829, 5735)") == ["table_1"]
    assert keys("divide(7, 41)") == ["text_2"]


def test_derive_prefers_shared_units() -> None:
    assert keys("divide(41, 100)", "what are the costs?") == ["table_2"]
    assert keys("divide(41, 100)", "how many stores are rented in states?") == ["text_2"]


def test_derive_prefers_the_nearest_to_the_question() -> None:
    derived = derive(tokenize("add(100, const_1)"), TABLE, SENTENCES, "what is the gross margin?")
    assert list(derived.units) == ["table_3"]
    assert derived.chosen == ("100",)


def test_derive_takes_the_row_of_a_table_operation() -> None:
    assert keys("table_sum(costs, none), add(#0, const_100)") == ["table_2"]


def test_derive_takes_a_row_below_the_header() -> None:
    assert keys("subtract(5829, 880)") == ["table_1"]
    assert keys("divide(880, const_10)", "what is the gross margin?") == ["table_3"]
    assert list(derive(tokenize("add(880, 880)"), TABLE[:1], [], "?").units) == ["table_0"]


def test_derive_reports_missing_operands() -> None:
    derived = derive(tokenize("add(5829, 777)"), TABLE, SENTENCES, "?")
    assert (list(derived.units), derived.missing, derived.complete) == (["table_1"], ("777",), False)


def test_derive_of_constants_is_not_complete() -> None:
    assert not derive(tokenize("add(const_1, const_2)"), TABLE, SENTENCES, "?").complete


@pytest.mark.parametrize(
    ("derived", "expected"),
    [("ab", "exact"), ("abc", "covers"), ("a", "within"), ("ac", "overlaps"), ("c", "apart"), ("", "apart")],
)
def test_agreement_has_five_values(derived: str, expected: str) -> None:
    assert agreement(derived, "ab") == expected


@needs_shared
def test_derive_agrees_with_dev_annotations() -> None:
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
