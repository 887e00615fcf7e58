from __future__ import annotations

import pytest

from fintune.finqa.text_similarity import SimilarTexts, content_words, rank_lines

QUESTIONS = [
    "what is the growth rate in net revenue from 2008 to 2009?",
    "what is the total of lease payments due in 2012?",
    "what is the growth rate in operating expenses from 2010 to 2011?",
    "",
]


def test_words_lose_case_endings_and_stop_words_but_keep_numbers() -> None:
    assert content_words("What were the Liabilities of 2009, growing 1,234.5 taxes?") == [
        "liability",
        "2009",
        "grow",
        "1,234.5",
        "tax",
    ]


def test_a_rare_word_outweighs_one_that_stands_everywhere() -> None:
    lines = ["the company has goodwill here", "the company sold a plant", "the company grew a lot", "the company paid"]
    assert rank_lines("what did the company pay for goodwill", lines, ())[0] == 0


def test_a_year_of_the_question_counts() -> None:
    lines = ["in 2007 cash fell", "in 2008 cash rose", "nothing of note was said"]
    assert rank_lines("cash in 2008", lines, ())[0] == 1


def test_of_two_lines_without_a_word_of_the_question_the_neighbour_of_a_good_one_goes_first() -> None:
    lines = ["far away", "other matters", "near by", "interest expense", "near too", "last of all"]
    assert rank_lines("interest expense", lines, ()) == [3, 2, 4, 0, 1, 5]


def test_table_rows_go_before_sentences_of_the_same_words_and_first_before_all() -> None:
    lines = ["header", "revenue grew", "filler", "revenue grew"]
    assert rank_lines("revenue", lines, {0, 3}, first=[2]) == [2, 3, 0, 1]


def test_a_question_without_any_known_word_leaves_the_order_of_the_page() -> None:
    assert rank_lines("zebra", ["one", "two", "three"], ()) == [0, 1, 2]
    assert rank_lines("zebra", [], ()) == []


def test_a_text_is_nearest_to_itself_with_cosine_one():
    similar = SimilarTexts(QUESTIONS)
    for place, text in enumerate(QUESTIONS[:3]):
        nearest, cosine = next(similar.nearest(text))
        assert (nearest, cosine) == (place, pytest.approx(1))


def test_rare_words_weigh_more_than_common_ones():
    texts = ["growth of revenue", "growth of expenses", "growth of income", "goodwill impairment"]
    assert next(SimilarTexts(texts).nearest("growth of goodwill"))[0] == 3


def test_what_shares_no_word_is_not_similar():
    assert list(SimilarTexts(QUESTIONS).nearest("goodwill impairment")) == []
    assert list(SimilarTexts([]).nearest("growth")) == []


def test_equals_keep_their_order():
    assert [place for place, _ in SimilarTexts(["net income", "other", "net income"]).nearest("net income")] == [0, 2]


def test_word_forms_are_the_same_word():
    assert next(SimilarTexts(["leases paid", "lease payments"]).nearest("lease payment"))[0] == 1
