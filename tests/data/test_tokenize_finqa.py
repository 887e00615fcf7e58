from __future__ import annotations

from typing import Any

import pytest

from fintune.data.dataset import group_by_page
from fintune.data.synthetic import generate
from fintune.data.tokenize import DroppedRow, TokenizedExample, TokenRow
from fintune.data.tokenize_finqa import FinqaEncoder
from fintune.errors import ModelError
from fintune.models import chat_template as chat
from fintune.records import FinQARecord
from support.tiny import make_tokenizer

PROGRAM = "subtract(5829, 5735), divide(#0, 5735)"


def make(record_id: str = "A/2009/page_1.pdf-1", num_sentences: int = 3, **qa: Any) -> FinQARecord:
    return FinQARecord.model_validate(
        {
            "id": record_id,
            "pre_text": [f"sentence number {n} tells nothing ." for n in range(num_sentences)],
            "post_text": ["net revenue rose ."],
            "table": [["", "2009", "2008"], ["net revenue", "$ 5829", "$ 5735"]],
            "qa": {"question": "how did net revenue change ?", "program": PROGRAM, "exe_ans": 0.01639, **qa},
        }
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_finqa_encoder_trains_program_and_end_of_turn(tokenizer: Any) -> None:
    encoded = FinqaEncoder(tokenizer, system="Be brief.", max_length=2048).encode(make())
    (row,) = encoded.rows
    trained = [id_ for id_, mask in zip(row.input_ids, row.completion_mask, strict=True) if mask]
    assert tokenizer.decode(trained) == f"{PROGRAM}<|im_end|>"
    prompt = row.input_ids[: encoded.token_counts[0][0]]
    assert prompt == chat.encode_prompt(tokenizer, encoded.example.messages)
    assert encoded.example.completion == PROGRAM
    assert encoded.example.num_cut == 0


def test_long_page_is_cut_and_keeps_relevant_units(tokenizer: Any) -> None:
    record = make(num_sentences=200)
    encoded = FinqaEncoder(tokenizer, system="Be brief.", max_length=512).encode(record)
    assert len(encoded.rows[0].input_ids) <= 512
    assert encoded.token_counts[0][0] > 300
    assert encoded.num_units == 203
    assert encoded.example.num_cut == 203 - len(encoded.kept) > 100
    assert {"table_0", "table_1", "text_200"} <= encoded.kept


def test_two_programs_get_the_same_prompt(tokenizer: Any) -> None:
    encoder = FinqaEncoder(tokenizer, system="", max_length=512)
    one, two = (encoder.encode(make(num_sentences=200, program=p)) for p in (PROGRAM, "add(1, 2)"))
    assert one.example.messages == two.example.messages


@pytest.mark.parametrize(
    ("qa", "category", "reason"),
    [
        ({"question": "why " * 400}, "too long", "the question alone needs"),
        ({"program": "<|im_end|>"}, "not encodable", "<|im_end|>"),
    ],
)
def test_finqa_encoder_drops_with_category(tokenizer: Any, qa: dict[str, str], category: str, reason: str) -> None:
    encoder = FinqaEncoder(tokenizer, system="", max_length=256)
    ((kept, dropped),) = encoder.encode_pages([[make("A/1"), make("A/2", **qa)]])
    assert isinstance(kept, TokenizedExample)
    assert isinstance(dropped, DroppedRow)
    assert (kept.example.id, dropped.id, dropped.category) == ("A/1", "A/2", category)
    assert reason in dropped.reason


MAX_LENGTH = 2000


@pytest.fixture(scope="module")
def records() -> list[FinQARecord]:
    return list(generate(3, pages_per_company=1, questions_per_page=4, seed=3, size="small"))


def encode(tokenizer, records, max_length=MAX_LENGTH, num_questions=1) -> list[TokenizedExample]:
    encoder = FinqaEncoder(tokenizer, system="Write the program.", max_length=max_length, num_questions=num_questions)
    pages = [[records[index] for index in page] for page in group_by_page(records)]
    return [result for page in encoder.encode_pages(pages) for result in page]


def grouped(tokenizer, records, max_length=MAX_LENGTH, num_questions=4) -> list[TokenRow]:
    return [row for result in encode(tokenizer, records, max_length, num_questions) for row in result.rows]


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
    rows = grouped(tokenizer, records)
    end = tokenizer.decode(chat.end_of_turn_ids(tokenizer)[:1])
    assert len(rows) == 3
    for row, first in zip(rows, range(0, 12, 4), strict=True):
        assert trained(tokenizer, row) == [record.qa.program + end for record in records[first : first + 4]]


def test_shared_row_has_page_once_and_all_questions(tokenizer, records):
    row = grouped(tokenizer, records[:4])[0]
    text = tokenizer.decode(row.input_ids)
    header = " ".join(records[0].table[1][0].split())
    assert text.count(f"\n{header} |") == 1
    places = [text.index(f"Question: {record.qa.question.strip()}") for record in records[:4]]
    assert places == sorted(places)


def test_one_question_a_row_gives_the_examples_as_they_are(tokenizer, records):
    rows = grouped(tokenizer, records, num_questions=1)
    assert [row.id for row in rows] == [record.id for record in records]


def test_a_conversation_closes_before_it_grows_over_the_length(tokenizer, records):
    whole = grouped(tokenizer, records[:4])[0]
    rows = grouped(tokenizer, records[:4], max_length=len(whole.input_ids) - 1)
    assert [len(row.id.split()) for row in rows] == [3, 1]
    assert sum(sum(row.completion_mask) for row in rows) == sum(whole.completion_mask)


def test_a_page_that_was_cut_for_its_question_is_not_shared(tokenizer, records):
    longest = max(len(result.rows[0].input_ids) for result in encode(tokenizer, records))
    examples = encode(tokenizer, records, longest - 40, num_questions=4)
    cut = {result.example.id for result in examples if result.example.num_cut}
    rows = [row for result in examples for row in result.rows]
    assert cut
    assert all(len(row.id.split()) == 1 for row in rows if cut & set(row.id.split()))


def test_shared_rows_refuse_rewriting_template(records):
    tokenizer = make_tokenizer()
    # As reasoning models do: an earlier answer is shortened once there is a later turn.
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content[:3] if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(ModelError, match=r"set data\.group_questions to 1"):
        grouped(tokenizer, records[:2], num_questions=2)
