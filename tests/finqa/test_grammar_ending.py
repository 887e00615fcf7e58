from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finqa.test_grammar import TABLE, TEXTS
from finqa.test_program import programs
from fintune.finqa.grammar import general, restricted, shortest_ending, vocabulary
from fintune.finqa.parse import parse
from fintune.finqa.program import Program

GENERAL = general()
PAGE = restricted(vocabulary(TABLE, TEXTS))


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("add(1, 2)", ""),
        ("add(1, 2", ")"),
        ("add(1, 2), divide(#0", ", 1)"),
        ("table_max(a b", ", none)"),
        ("table_max(a,b,, none", ")"),
        ("table_max(a, b", None),
        ("exp(.", "1, 1)"),
        ("greater(const_", "1, 1)"),
        ("add(1,2", None),
        ("add(#0", None),
        (", ".join(["add(1, 2)"] * 7), None),
    ],
)
def test_shortest_ending_completes_a_text(text, end):
    assert shortest_ending(GENERAL, text) == end


def test_shortest_ending_uses_the_words_of_the_page():
    assert shortest_ending(PAGE, "subtract(58") == "29, 1)"
    assert shortest_ending(PAGE, "table_sum(net") == " sales, none)"
    assert shortest_ending(PAGE, "subtract(5836") is None


@given(program=programs(), data=st.data())
def test_shortest_ending_completes_every_beginning(program: Program, data: st.DataObject) -> None:
    text = program.text[: data.draw(st.integers(0, len(program.text)))]
    end = shortest_ending(GENERAL, text)
    assert end is not None
    assert parse(text + end)
    assert shortest_ending(GENERAL, text + end) == ""


def test_shortest_ending_is_fast_for_long_names():
    assert shortest_ending(GENERAL, "table_max(" + "net sales,of the " * 200 + "x") == ", none)"
