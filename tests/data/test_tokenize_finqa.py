from __future__ import annotations

from typing import Any

import pytest

from fintune.data.tokenize_finqa import Encoder
from fintune.errors import DataError
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


def test_the_completion_is_the_program_and_only_it_and_the_end_of_turn_are_trained(tokenizer: Any) -> None:
    encoded = Encoder(tokenizer, system="Be brief.", max_length=2048).encode(make())
    trained = [id_ for id_, mask in zip(encoded.input_ids, encoded.completion_mask, strict=True) if mask]
    assert tokenizer.decode(trained) == f"{PROGRAM}<|im_end|>"
    prompt = encoded.input_ids[: encoded.num_prompt_tokens]
    assert prompt == chat.encode_prompt(tokenizer, encoded.example.messages)
    assert encoded.example.completion == PROGRAM
    assert encoded.example.num_cut == 0


def test_a_long_page_is_cut_to_the_length_and_keeps_what_the_question_names(tokenizer: Any) -> None:
    record = make(num_sentences=200)
    encoded = Encoder(tokenizer, system="Be brief.", max_length=512).encode(record)
    assert len(encoded.input_ids) <= 512
    assert encoded.num_prompt_tokens > 300
    assert encoded.num_units == 203
    assert encoded.example.num_cut == 203 - len(encoded.kept) > 100
    assert {"table_0", "table_1", "text_200"} <= encoded.kept


def test_two_programs_get_the_same_prompt(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, system="", max_length=512)
    one, two = (encoder.encode(make(num_sentences=200, program=p)) for p in (PROGRAM, "add(1, 2)"))
    assert one.example.messages == two.example.messages


def test_a_question_that_does_not_fit_is_dropped_and_counted(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, system="", max_length=256)
    split = encoder.split([make("A/1"), make("A/2", question="why " * 400)], "train")
    assert [each.record.id for each in split.examples] == ["A/1"]
    assert split.dropped == {"too long": 1}
    assert split.problems[0].startswith("train: id A/2: the question alone needs")


def test_a_program_that_holds_the_end_of_turn_is_dropped_and_counted(tokenizer: Any) -> None:
    split = Encoder(tokenizer, system="", max_length=512).split([make("A/1"), make("A/2", program="<|im_end|>")], "x")
    assert split.dropped == {"not encodable": 1}
    assert "<|im_end|>" in split.problems[0]


def test_strict_stops_at_the_first_with_its_id(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="id A/2: the question alone"):
        Encoder(tokenizer, system="", max_length=256).split([make("A/2", question="why " * 400)], "x", strict=True)


def test_nothing_left_is_an_error_that_says_what_to_raise(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"none of 1 eval records.*id A/2.*raise prompt\.max_length"):
        Encoder(tokenizer, system="", max_length=64).split([make("A/2", question="why " * 400)], "eval")
