from __future__ import annotations

import pytest

from fintune.finqa.text_similarity import SimilarTexts, content_words, rank_lines

QUESTIONS = [
    "what is the growth rate in net revenue from 2008 to 2009?",
    "what is the total of lease payments due in 2012?",
    "what is the growth rate in operating expenses from 2010 to 2011?",
    "",
]


def test_content_words_drop_endings_and_stop_words() -> None:
    assert content_words("What were the Liabilities of 2009, growing 1,234.5 taxes?") == [
        "liability",
        "2009",
        "grow",
        "1,234.5",
        "tax",
    ]


def test_rank_lines_prefers_rare_words() -> None:
    lines = ["the company has goodwill here", "the company sold a plant", "the company grew a lot", "the company paid"]
    assert rank_lines("what did the company pay for goodwill", lines, ())[0] == 0


def test_rank_lines_counts_years() -> None:
    lines = ["in 2007 cash fell", "in 2008 cash rose", "nothing of note was said"]
    assert rank_lines("cash in 2008", lines, ())[0] == 1


def test_rank_lines_prefers_neighbours_of_good_lines() -> None:
    lines = ["far away", "other matters", "near by", "interest expense", "near too", "last of all"]
    assert rank_lines("interest expense", lines, ()) == [3, 2, 4, 0, 1, 5]


def test_rank_lines_prefers_rows_and_first() -> None:
    lines = ["header", "revenue grew", "filler", "revenue grew"]
    assert rank_lines("revenue", lines, {0, 3}, first=[2]) == [2, 3, 0, 1]


def test_rank_lines_keeps_the_order_without_a_match() -> None:
    assert rank_lines("zebra", ["one", "two", "three"], ()) == [0, 1, 2]
    assert rank_lines("zebra", [], ()) == []


def test_nearest_of_itself_has_cosine_one():
    similar = SimilarTexts(QUESTIONS)
    for place, text in enumerate(QUESTIONS[:3]):
        nearest, cosine = next(similar.nearest(text))
        assert (nearest, cosine) == (place, pytest.approx(1))


def test_nearest_prefers_rare_words():
    texts = ["growth of revenue", "growth of expenses", "growth of income", "goodwill impairment"]
    assert next(SimilarTexts(texts).nearest("growth of goodwill"))[0] == 3


def test_nearest_needs_a_shared_word():
    assert list(SimilarTexts(QUESTIONS).nearest("goodwill impairment")) == []
    assert list(SimilarTexts([]).nearest("growth")) == []


def test_nearest_keeps_the_order_of_equals():
    assert [place for place, _ in SimilarTexts(["net income", "other", "net income"]).nearest("net income")] == [0, 2]


def test_nearest_ignores_word_forms():
    assert next(SimilarTexts(["leases paid", "lease payments"]).nearest("lease payment"))[0] == 1
