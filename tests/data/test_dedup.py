"""What counts as said twice, exactly or nearly."""

from __future__ import annotations

import random

import pytest

from fintune.data.dedup import NearDuplicates, digest_messages, jaccard
from fintune.records import Message

WORDS = ["".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=3 + n % 7)) for n in range(3000)]


def conversation(question: str, answer: str, system: str = "") -> list[Message]:
    before = [Message(role="system", content=system)] if system else []
    return [*before, Message(role="user", content=question), Message(role="assistant", content=answer)]


def text(draw: random.Random, num_words: int = 120) -> str:
    return " ".join(draw.choices(WORDS, k=num_words))


def changed(draw: random.Random, said: str, num_words: int) -> str:
    words = said.split()
    for place in draw.sample(range(len(words)), num_words):
        words[place] = draw.choice(WORDS)
    return " ".join(words)


def edited(draw: random.Random, said: str, num_words: int) -> str:
    """The same words with commas, and some of them repeated."""
    words = [word + "," if draw.random() < 0.02 else word for word in said.split()]
    return " ".join([*words, *words[:num_words]])


def are_near_duplicates(a: list[Message], b: list[Message], similarity: float) -> bool:
    finder = NearDuplicates(similarity)
    return finder.find(a) is None and finder.find(b) == 0


def test_case_and_white_space_do_not_make_a_conversation_another():
    a, b = conversation("What is  yield?", "Income."), conversation("what is yield?\n", "income.")
    assert digest_messages(a) == digest_messages(b)


@pytest.mark.parametrize(
    "other",
    [
        conversation("What is yield?", "Income!"),
        conversation("What is yield?", "Income.", "You are Dana."),
        conversation("What is", "yield? Income."),
        [Message(role="assistant", content="What is yield?"), Message(role="user", content="Income.")],
    ],
)
def test_another_word_turn_or_role_makes_it_another(other):
    assert digest_messages(conversation("What is yield?", "Income.")) != digest_messages(other)


@pytest.mark.parametrize("similarity", [0.7, 0.9])
def test_what_is_found_is_what_comparing_every_pair_finds(similarity):
    draw = random.Random(5)
    base = [conversation(text(draw), text(draw)) for _ in range(60)]
    copies = [
        conversation(edited(draw, said[0].content, number % 25), changed(draw, said[1].content, number % 25))
        for number, said in enumerate(base)
    ]
    finder = NearDuplicates(similarity)
    assert [finder.find(said) for said in base] == [None] * 60
    expected = [
        number if are_near_duplicates(base[number], said, similarity) else None for number, said in enumerate(copies)
    ]
    assert 10 < sum(number is not None for number in expected) < 55
    assert [finder.find(said) for said in copies] == expected


@pytest.mark.parametrize("similarity", [0.5, 0.9])
def test_many_answers_to_one_question_are_found_as_by_pairs(similarity):
    draw = random.Random(8)
    base = [conversation("Write a headline.", text(draw, draw.randrange(30, 200))) for _ in range(60)]
    said = [*base, *(conversation("Write a headline", changed(draw, each[1].content, 1)) for each in base)]
    finder, kept, expected = NearDuplicates(similarity), [], []
    for each in said:
        same = (n for n, other in enumerate(kept) if jaccard(other[1].content, each[1].content) >= similarity)
        expected.append(next(same, None))
        if expected[-1] is None:
            kept.append(each)
    assert 10 < sum(number is not None for number in expected) < 120
    assert [finder.find(each) for each in said] == expected


def test_conversations_with_other_numbers_are_both_kept():
    draw = random.Random(6)
    question, answer = text(draw), text(draw)
    a, b = (conversation(f"{question} in {year}?", f"{answer} {year}") for year in (2018, 2019))
    assert jaccard(a[0].content, b[0].content) > 0.97
    assert not are_near_duplicates(a, b, 0.9)


def test_questions_about_one_long_context_are_all_kept():
    draw = random.Random(7)
    context = text(draw, 2000)
    finder = NearDuplicates(0.9)
    said = [conversation(f"{context} {text(draw, 5)}", text(draw, 20)) for _ in range(20)]
    assert [finder.find(each) for each in said] == [None] * 20


def test_headlines_below_one_long_instruction_are_all_kept():
    draw = random.Random(9)
    rubric = text(draw, 400)
    finder = NearDuplicates(0.9)
    asked = [f"{rubric}\nName: {WORDS[n]}\n{rubric}\nHeadline: {text(draw, 6)}\nLabel:" for n in range(10)]
    said = [conversation(each, "positive") for each in asked]
    assert [finder.find(each) for each in said] == [None] * 10
    copy = asked[3].replace("\nHeadline", ",\nHeadline") + f"\n{WORDS[3]}"
    assert finder.find(conversation(copy, "Positive.")) is None, "another answer"
    assert finder.find(conversation(copy, "positive")) == 3


def test_short_texts_are_compared_too():
    finder = NearDuplicates(0.9)
    assert finder.find(conversation("a", "b")) is None
    assert finder.find(conversation("A", "b")) == 0
    assert finder.find(conversation("a", "c")) is None


def test_another_persona_is_another_conversation():
    draw = random.Random(8)
    question, answer = text(draw), text(draw)
    finder = NearDuplicates(0.9)
    assert finder.find(conversation(question, answer, "You are Dana.")) is None
    assert finder.find(conversation(question, answer, "You are Max.")) is None
