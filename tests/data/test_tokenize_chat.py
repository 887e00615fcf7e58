"""Conversations of the data as training rows: what is trained, what is cut, templates with thoughts."""

from __future__ import annotations

import pytest

from fintune.data.tokenize_chat import ConversationEncoder
from fintune.errors import DataError
from fintune.finqa.prompt import TooLongError
from fintune.models import chat_template as chat
from fintune.records import Message
from support.template_families import trained_texts
from support.tiny import make_tokenizer

TURNS = [
    Message(role="system", content="You are Dana."),
    Message(role="user", content="What is revenue?"),
    Message(role="assistant", content="revenue is 12"),
    Message(role="user", content="And cash?"),
    Message(role="assistant", content="cash is 34"),
]
# Rewrites earlier turns as DeepSeek-R1's does: a new answer begins inside a thought, an old one has none.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def encoder(tokenizer, **options) -> ConversationEncoder:
    return ConversationEncoder(tokenizer, **{"system": "", "train_on": "all", "max_length": 2000, **options})


def test_conversation_trains_every_answer_and_its_end(tokenizer):
    done = encoder(tokenizer).encode("x", TURNS)
    (row,) = done.rows
    assert trained_texts(tokenizer, row) == ["revenue is 12<|im_end|>", "cash is 34<|im_end|>"]
    assert tokenizer.decode(row.input_ids) == chat.render(tokenizer, TURNS, add_generation_prompt=False).rstrip("\n")
    assert done.example.messages == tuple(TURNS[:4])
    assert done.example.completion == "cash is 34"


def test_the_last_answer_alone_is_trained_where_asked(tokenizer):
    (row,) = encoder(tokenizer, train_on="last").encode("x", TURNS).rows
    assert trained_texts(tokenizer, row) == ["cash is 34<|im_end|>"]


def test_a_turn_that_the_row_excludes_is_read_and_not_trained(tokenizer):
    (row,) = encoder(tokenizer).encode("x", TURNS, untrained={2}).rows
    assert trained_texts(tokenizer, row) == ["cash is 34<|im_end|>"]
    done = encoder(tokenizer, system="Ignored.").encode("x", TURNS, untrained={4})
    assert trained_texts(tokenizer, done.rows[0]) == ["revenue is 12<|im_end|>"]
    assert (done.example.completion, done.example.num_cut) == ("revenue is 12", 2)
    with pytest.raises(DataError, match="none of the assistant's turns"):
        encoder(tokenizer).encode("x", TURNS, untrained={2, 4})


def test_a_system_message_is_added_where_there_is_none(tokenizer):
    done = encoder(tokenizer, system="Be brief.").encode("x", TURNS[1:], untrained={1})
    assert done.example.messages[0] == Message(role="system", content="Be brief.")
    assert trained_texts(tokenizer, done.rows[0]) == ["cash is 34<|im_end|>"], "places count without it"
    assert encoder(tokenizer, system="Be brief.").encode("x", TURNS).example.messages[0] == TURNS[0]


def test_turns_that_do_not_fit_are_left_out_and_counted(tokenizer):
    length = len(chat.encode_example(tokenizer, TURNS[:2], TURNS[2].content).input_ids)
    done = encoder(tokenizer, max_length=length).encode("x", TURNS, rejected=Message(role="assistant", content="no"))
    assert (done.example.completion, done.example.num_cut, done.rejected) == ("revenue is 12", 2, None)
    assert len(done.rows[0].input_ids) == length
    with pytest.raises(TooLongError):
        encoder(tokenizer, max_length=length - 1).encode("x", TURNS)


def test_rewriting_template_gives_row_per_answer(tokenizer):
    tokenizer.chat_template = THINKING
    first, second = encoder(tokenizer).encode("x", TURNS).rows
    assert (first.id, second.id) == ("x", "x/4")
    assert trained_texts(tokenizer, first) == ["\n</think>\n\nrevenue is 12<|im_end|>"]
    assert trained_texts(tokenizer, second) == ["\n</think>\n\ncash is 34<|im_end|>"]
    prompt = chat.encode_prompt(tokenizer, TURNS[:4])
    assert second.input_ids[: len(prompt)] == prompt, "trained behind the very prompt of generation"


def test_thought_continues_the_templates_own(tokenizer):
    tokenizer.chat_template = THINKING
    thought = Message(role="assistant", content="<think>\nadd both\n</think>\n\nit is 46")
    (row,) = encoder(tokenizer).encode("x", [*TURNS[:2], thought]).rows
    assert trained_texts(tokenizer, row) == ["add both\n</think>\n\nit is 46<|im_end|>"]
    assert tokenizer.decode(row.input_ids).count("<think>") == 1


def test_answer_without_prompt_is_refused_if_trained(tokenizer):
    greeted = [Message(role="assistant", content="Hello."), *TURNS[1:3]]
    with pytest.raises(DataError, match="the assistant speaks first") as told:
        encoder(tokenizer).encode("x", greeted)
    assert told.value.hint == "put a user's turn before it, or set data.system"
    (row,) = encoder(tokenizer).encode("x", greeted, untrained={0}).rows
    assert trained_texts(tokenizer, row) == ["revenue is 12<|im_end|>"]
    (row,) = encoder(tokenizer, system="Greet.").encode("x", greeted).rows
    assert trained_texts(tokenizer, row) == ["Hello.<|im_end|>", "revenue is 12<|im_end|>"]


def test_a_text_with_the_token_that_ends_a_turn_is_refused(tokenizer):
    with pytest.raises(DataError, match="ends a turn"):
        encoder(tokenizer).encode("x", [TURNS[1], Message(role="assistant", content="a<|im_end|>b")])
