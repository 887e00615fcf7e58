"""The law of conversation data: every text of a row is read, or its row or its column is named as left out."""

from __future__ import annotations

import ast
import functools
import itertools
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fintune.data.formats import NOT_READ, convert_row
from fintune.data.messages import walk_leaves
from fintune.data.readers import BrokenRowError
from fintune.data.tokenize_chat import HIDDEN_THOUGHT, ConversationEncoder
from fintune.errors import DataError
from support.template_families import family_tokenizer

FAMILIES = ("qwen2_5", "qwen3", "gemma3", "deepseek_r1_distill", "phi4", "gptoss")
CELLS = st.sampled_from(("list", "json", "repr"))


class Words:
    """Marked words, each of which occurs once."""

    def __init__(self) -> None:
        self._numbers = itertools.count(101)

    def __call__(self) -> str:
        return f"mark{next(self._numbers)}end"


def as_cell(draw, value: Any) -> Any:
    kind = draw(CELLS)
    return json.dumps(value) if kind == "json" else repr(value) if kind == "repr" else value


@st.composite
def turns(draw, words: Words, *, ends_with: str = "assistant") -> list[dict[str, Any]]:
    names = ("role", "content") if draw(st.booleans()) else ("from", "value")
    number = draw(st.integers(1, 2))
    roles = ["user", "assistant"] * number
    roles = roles[: len(roles) - (ends_with == "user")]
    if draw(st.booleans()):
        roles.insert(0, "system")
    made = []
    for role in roles:
        turn: dict[str, Any] = {names[0]: role, names[1]: words()}
        if draw(st.booleans()) and draw(st.booleans()):
            extras = ["note", "name", "weight", "train", "id", "meta", "parts"]
            extra = draw(st.sampled_from(extras + ["reasoning_content", "thinking"] * (role == "assistant")))
            turn |= {
                "weight": {"weight": draw(st.sampled_from([0, 1, "0"]))},
                "train": {"train": draw(st.booleans())},
                "meta": {"meta": {"by": words(), "at": [words()]}},
                "parts": {names[1]: [{"type": "text", "text": words()}, {"type": "text", "text": words()}]},
            }.get(extra, {extra: words()})
        made.append(turn)
    return made


@st.composite
def rows(draw) -> dict[str, Any]:
    words = Words()
    kind = draw(st.sampled_from(("messages", "conversations", "alpaca", "qa", "prompt", "pair", "lists", "query")))
    row: dict[str, Any] = {}
    if kind in ("messages", "conversations"):
        row[kind] = as_cell(draw, draw(turns(words, ends_with=draw(st.sampled_from(("assistant", "user"))))))
    elif kind == "alpaca":
        row = {"instruction": words(), "input": draw(st.sampled_from(("", None, words()))), "output": words()}
    elif kind == "qa":
        row = {"Question": words(), "Answer": words(), "Context": words()}
    elif kind == "prompt":
        row = {"prompt": as_cell(draw, draw(turns(words, ends_with="user"))), "completion": words()}
    elif kind == "query":
        row = {"query": words(), "response": words()}
    else:
        chosen, rejected = ({"role": "assistant", "content": words()} for _ in range(2))
        lists = kind == "lists"
        row = {"prompt": words(), "chosen": [chosen] if lists else chosen["content"]}
        row["rejected"] = as_cell(draw, [rejected]) if lists else rejected
        row["chosen"] = as_cell(draw, row["chosen"]) if lists else row["chosen"]
    columns = (
        "system",
        "history",
        "label",
        "loss_mask",
        "tools",
        "meta",
        "note",
        "text",
        "thinking",
        "kto_tag",
        "input",
    )
    for column in draw(st.lists(st.sampled_from((*columns, "context", "messages")), max_size=3, unique=True)):
        row[column] = {
            "history": [[words(), words()]],
            "loss_mask": draw(st.sampled_from([[1], [0, 1], 0, 1])),
            "tools": [{"type": "function", "function": {"name": words(), "description": words()}}],
            "meta": {"source": words(), "tags": [words(), {"deep": words()}]},
        }.get(column, words())
    return row


@functools.cache
def encoder(family: str) -> ConversationEncoder:
    return ConversationEncoder(family_tokenizer(family), system="", train_on="all", max_length=4000)


@settings(max_examples=150, deadline=None)
@given(row=rows(), family=st.sampled_from(FAMILIES), objective=st.sampled_from(("sft", "pairs")))
def test_every_text_of_a_row_is_found_again(row, family, objective):
    encode = encoder(family)
    try:
        format_, conversation, columns = convert_row(row, reads_label=False)
        if objective == "pairs" and conversation.rejected is not None:
            done = encode.encode_pair("x", conversation.messages, conversation.rejected)
        else:
            done = encode.encode(
                "x", conversation.messages, untrained=conversation.untrained, rejected=conversation.rejected
            )
    except (BrokenRowError, DataError) as dropped:
        assert str(dropped), "the row has a reason"
        return
    decode = encode._tokenizer.decode
    tokens = "\n".join(decode(list(ids)) for each in done.rows for ids in (each.input_ids, each.rejected_ids or []))
    tokens += done.rejected or ""
    thoughts = "".join(message.reasoning_content or "" for message in conversation.messages)
    for column, value in row.items():
        for path, leaf in walk_leaves(json_of(value), column):
            if not isinstance(leaf, str) or "mark" not in leaf or leaf in tokens:
                continue
            named = columns.get(path) == NOT_READ or columns.get(column) == NOT_READ
            is_trailing = conversation.num_trailing and path.startswith(("messages", "conversations"))
            is_hidden = leaf in thoughts and HIDDEN_THOUGHT in done.notes
            assert named or is_trailing or is_hidden, (path, leaf, columns, format_)


def json_of(value: Any) -> Any:
    """The turns of a cell, where the test wrote them as text."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        try:
            return json.loads(value)
        except ValueError:
            return ast.literal_eval(value)
    return value
