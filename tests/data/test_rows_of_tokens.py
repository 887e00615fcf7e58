"""Several questions about one page as one conversation to train on."""

from __future__ import annotations

import pytest

from fintune.data.rows_of_tokens import grouped
from fintune.data.synthetic import generate
from fintune.data.tokenize_finqa import EncodedRecord, Encoder
from fintune.errors import DataError, ModelError
from fintune.models import chat_template as chat
from fintune.records import FinQARecord, Message
from support.tiny import make_tokenizer

MAX_LENGTH = 2000


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def records() -> list[FinQARecord]:
    return list(generate(3, pages_per_company=1, questions_per_page=4, seed=3, size="small"))


def encode(tokenizer, records, max_length=MAX_LENGTH) -> list[EncodedRecord]:
    return Encoder(tokenizer, system="Write the program.", max_length=max_length).split(records, "train").examples


def trained(tokenizer, row) -> list[str]:
    """The trained spans as text."""
    spans, span = [], []
    for token, is_trained in zip([*row.input_ids, 0], [*row.completion_mask, 0], strict=True):
        if is_trained:
            span.append(token)
        elif span:
            spans.append(tokenizer.decode(span))
            span = []
    return spans


def test_every_program_of_a_page_is_trained_with_its_end_of_turn(tokenizer, records):
    rows = grouped(tokenizer, encode(tokenizer, records), num_questions=4, max_length=MAX_LENGTH)
    end = tokenizer.decode(chat.end_of_turn_ids(tokenizer)[:1])
    assert len(rows) == 3
    for row, first in zip(rows, range(0, 12, 4), strict=True):
        assert trained(tokenizer, row) == [record.qa.program + end for record in records[first : first + 4]]


def test_the_page_stands_once_and_every_question_after_the_answer_before_it(tokenizer, records):
    row = grouped(tokenizer, encode(tokenizer, records[:4]), num_questions=4, max_length=MAX_LENGTH)[0]
    text = tokenizer.decode(row.input_ids)
    header = " ".join(records[0].table[1][0].split())
    assert text.count(f"\n{header} |") == 1
    places = [text.index(f"Question: {record.qa.question.strip()}") for record in records[:4]]
    assert places == sorted(places)


def test_one_question_a_row_gives_the_examples_as_they_are(tokenizer, records):
    examples = encode(tokenizer, records)
    rows = grouped(tokenizer, examples, num_questions=1, max_length=MAX_LENGTH)
    assert [(row.id, row.input_ids) for row in rows] == [(each.example.id, each.input_ids) for each in examples]


def test_a_conversation_closes_before_it_grows_over_the_length(tokenizer, records):
    examples = encode(tokenizer, records[:4])
    whole = grouped(tokenizer, examples, num_questions=4, max_length=MAX_LENGTH)[0]
    rows = grouped(tokenizer, examples, num_questions=4, max_length=len(whole.input_ids) - 1)
    assert [len(row.id.split()) for row in rows] == [3, 1]
    assert sum(sum(row.completion_mask) for row in rows) == sum(whole.completion_mask)


def test_a_page_that_was_cut_for_its_question_is_not_shared(tokenizer, records):
    longest = max(len(each.input_ids) for each in encode(tokenizer, records))
    examples = encode(tokenizer, records, max_length=longest - 40)
    cut = {each.example.id for each in examples if each.example.num_cut}
    rows = grouped(tokenizer, examples, num_questions=4, max_length=MAX_LENGTH)
    assert cut
    assert all(len(row.id.split()) == 1 for row in rows if cut & set(row.id.split()))


def test_a_conversation_must_end_with_the_assistant(tokenizer):
    with pytest.raises(DataError, match="assistant"):
        chat.encode_conversation(tokenizer, [Message(role="user", content="q")])


def test_a_template_that_rewrites_earlier_turns_is_refused_with_what_to_set(records):
    tokenizer = make_tokenizer()
    # As reasoning models do: an earlier answer is shortened once there is a later turn.
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content[:3] if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(ModelError, match=r"set data\.group_questions to 1"):
        grouped(tokenizer, encode(tokenizer, records[:2]), num_questions=2, max_length=MAX_LENGTH)
