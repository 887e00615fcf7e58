from __future__ import annotations

from fintune.finqa.relevance import rank, words


def test_words_lose_case_endings_and_stop_words_but_keep_numbers() -> None:
    assert words("What were the Liabilities of 2009, growing 1,234.5 taxes?") == [
        "liability",
        "2009",
        "grow",
        "1,234.5",
        "tax",
    ]


def test_a_rare_word_outweighs_one_that_stands_everywhere() -> None:
    lines = ["the company has goodwill here", "the company sold a plant", "the company grew a lot", "the company paid"]
    assert rank("what did the company pay for goodwill", lines, ())[0] == 0


def test_a_year_of_the_question_counts() -> None:
    lines = ["in 2007 cash fell", "in 2008 cash rose", "nothing of note was said"]
    assert rank("cash in 2008", lines, ())[0] == 1


def test_of_two_lines_without_a_word_of_the_question_the_neighbour_of_a_good_one_goes_first() -> None:
    lines = ["far away", "other matters", "near by", "interest expense", "near too", "last of all"]
    assert rank("interest expense", lines, ()) == [3, 2, 4, 0, 1, 5]


def test_table_rows_go_before_sentences_of_the_same_words_and_first_before_all() -> None:
    lines = ["header", "revenue grew", "filler", "revenue grew"]
    assert rank("revenue", lines, {0, 3}, first=[2]) == [2, 3, 0, 1]


def test_a_question_without_any_known_word_leaves_the_order_of_the_page() -> None:
    assert rank("zebra", ["one", "two", "three"], ()) == [0, 1, 2]
    assert rank("zebra", [], ()) == []
