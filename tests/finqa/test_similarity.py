from __future__ import annotations

import pytest

from fintune.finqa.similarity import SimilarTexts

QUESTIONS = [
    "what is the growth rate in net revenue from 2008 to 2009?",
    "what is the total of lease payments due in 2012?",
    "what is the growth rate in operating expenses from 2010 to 2011?",
    "",
]


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
