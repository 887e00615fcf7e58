from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finqa.test_grammar import TABLE, TEXTS
from finqa.test_program import programs
from fintune.finqa.grammar import general, is_complete, restricted, shortest_ending, vocabulary
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
def test_a_text_is_ended_in_the_shortest_way(text, end):
    assert shortest_ending(GENERAL, text) == end


def test_the_words_of_a_page_end_a_text_of_the_page():
    assert shortest_ending(PAGE, "subtract(58") == "29, 1)"
    assert shortest_ending(PAGE, "table_sum(net") == " sales, none)"
    assert shortest_ending(PAGE, "subtract(5836") is None


@given(program=programs(), data=st.data())
def test_every_beginning_can_be_ended_to_a_program(program: Program, data: st.DataObject) -> None:
    text = program.text[: data.draw(st.integers(0, len(program.text)))]
    end = shortest_ending(GENERAL, text)
    assert end is not None
    assert parse(text + end)
    assert is_complete(GENERAL, text + end)


def test_a_long_name_is_read_in_a_moment():
    assert shortest_ending(GENERAL, "table_max(" + "net sales,of the " * 200 + "x") == ", none)"
