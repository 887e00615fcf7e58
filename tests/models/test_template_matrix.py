"""Real chat templates: a row is the template's own rendering, or it is refused with the reason."""

from __future__ import annotations

import functools
import json
import re

import pytest

from fintune.data.formats import convert_row
from fintune.data.tokenize_chat import OTHER_RENDERING, ConversationEncoder
from fintune.errors import DataError
from fintune.models import chat_template as chat
from fintune.records import Message
from support.template_families import FAMILIES, family_tokenizer, trained_texts

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "calc", "arguments": {"program": "add(1, 2)"}}}
TOOL = {"type": "function", "function": {"name": "calc", "description": "Runs a program.", "parameters": {}}}


def user(content: str) -> dict[str, object]:
    return {"role": "user", "content": content}


def answer(content: str, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": content, **more}


CASES = {
    "plain": [user("ask one"), answer("tell one")],
    "system": [{"role": "system", "content": "Say it."}, user("ask one"), answer("tell one")],
    "turns": [user("ask one"), answer("tell one"), user("ask two"), answer("tell two")],
    "thoughts": [
        user("ask one"),
        answer("tell one", reasoning_content="think one"),
        user("ask two"),
        answer("<think>\nthink two\n</think>\n\ntell two"),
    ],
    "mixed": [user("ask one"), answer("tell one"), user("ask two"), answer("tell two", thinking="think two")],
    "tools": [user("ask one"), answer("", tool_calls=[CALL]), {"role": "tool", "content": "3.0"}, answer("tell one")],
}
REFUSED = {
    ("llama3", "tools"): "leaves out the tool call",
    ("deepseek_r1_distill", "tools"): "renders a tool call otherwise",
    ("gemma3", "tools"): "leaves out the tool call",
    ("gptoss", "tools"): "ends this turn with another token",
    ("phi4", "tools"): "leaves out the tool call",
    ("smollm3", "tools"): "leaves out the tool call",
}
OPENS_THOUGHT = "deepseek_r1_distill"
"""Its template removes thoughts from every rendering, so no row with its prompt can be that rendering."""


@functools.cache
def encoder(family: str, train_on: str = "all") -> tuple[object, ConversationEncoder]:
    tokenizer = family_tokenizer(family)
    return tokenizer, ConversationEncoder(tokenizer, system="", train_on=train_on, max_length=4000)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_row_is_the_templates_rendering_or_refused(family, case):
    tokenizer, encode = encoder(family)
    row = {"messages": CASES[case], "tools": [TOOL] if case == "tools" else None}
    messages = convert_row(row).conversation.messages
    if reason := REFUSED.get((family, case)):
        with pytest.raises(DataError, match=reason):
            encode.encode("x", messages)
        return
    done = encode.encode("x", messages)
    assert done.notes == ((OTHER_RENDERING,) if family == OPENS_THOUGHT else ())
    trained = [text for each in done.rows for text in trained_texts(tokenizer, each)]
    answers = [message for message in messages if message.role == "assistant"]
    assert len(trained) == len(answers), "each answer once"
    end = tokenizer.convert_ids_to_tokens(chat.end_of_turn_ids(tokenizer)[0])
    for text, message in zip(trained, answers, strict=True):
        thought, content = chat.split_thought(message)
        assert text.endswith(end) and text.count(end) == 1
        assert content in text and thought in text
        assert "ask" not in text and "3.0" not in text
        assert not message.tool_calls or "calc" in text
    for each in done.rows:
        whole = tokenizer.decode(each.input_ids)
        assert not re.search(r"<think>\s*</think>\s*<think>\s*\S", whole), "an empty thought before a thought"
        if family != OPENS_THOUGHT:
            last = next(
                index for index in range(len(messages), 0, -1) if is_rendering(tokenizer, messages[:index], whole)
            )
            assert messages[last - 1].role == "assistant"


def is_rendering(tokenizer, messages, whole: str) -> bool:
    texts = (chat.render(tokenizer, messages, False, thinking=thinking) for thinking in (False, True))
    return any(text == whole or (text.startswith(whole) and not text[len(whole) :].strip()) for text in texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_assistant_first_is_refused_unless_not_trained(family):
    _, encode = encoder(family)
    row = {"messages": [answer("Welcome."), user("ask one"), answer("tell one")]}
    with pytest.raises(DataError, match=r"speaks first|refuses the turns"):
        encode.encode("x", convert_row(row).conversation.messages)


@pytest.mark.parametrize("family", FAMILIES)
def test_pair_with_one_thought_has_one_prompt(family):
    tokenizer, encode = encoder(family)
    chosen = Message(role="assistant", content="tell one", reasoning_content="think one")
    worse = Message(role="assistant", content="tell two")
    done = encode.encode_pair("x", [Message(role="user", content="ask one"), chosen], worse)
    (row,) = done.rows
    (better,) = trained_texts(tokenizer, row)
    other = tokenizer.decode(row.rejected_ids)
    assert "think one" in better and "tell one" in better
    assert "tell two" in other and "think one" not in other
    example = done.example
    assert chat.encode_example(tokenizer, example.messages, example.answer, thinking=True).input_ids == row.input_ids


def test_examples_are_encoded_again_from_what_is_written():
    for family in FAMILIES:
        tokenizer, encode = encoder(family, "last")
        for case, turns in CASES.items():
            if (family, case) in REFUSED:
                continue
            row = {"messages": turns, "tools": [TOOL] if case == "tools" else None}
            done = encode.encode("x", convert_row(row).conversation.messages)
            read = type(done.example).model_validate_json(done.example.model_dump_json())
            again = chat.encode_example(tokenizer, read.messages, read.answer)
            assert again.input_ids == done.rows[-1].input_ids, (family, case)


def test_tools_that_the_template_never_shows_are_refused():
    _, encode = encoder("gemma3")
    row = {"messages": CASES["plain"], "tools": [TOOL]}
    with pytest.raises(DataError, match="leaves out the tool of turn 1"):
        encode.encode("x", convert_row(row).conversation.messages)


def test_a_run_with_thoughts_is_asked_in_thinking_mode(tmp_path):
    from fintune.config.load import load
    from fintune.data.prepare import prepare_data
    from fintune.data.prepared import write_prepared
    from fintune.inference.open_model import ModelSpec

    tokenizer = family_tokenizer("qwen3")
    for name, case in (("with", "thoughts"), ("without", "turns")):
        rows = [{"messages": [*CASES[case], user(f"ask {n} more"), CASES[case][-1]]} for n in range(3)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = ["data.source=chat", f"data.sources=[{tmp_path / 'rows.jsonl'}]", "data.num_proc=0"]
        done = prepare_data(load(None, options).config, tokenizer)
        folder = tmp_path / name / "prepare"
        folder.mkdir(parents=True)
        write_prepared(folder, done)
        for path in ("merge", "export/x-Q4_K_M.gguf"):
            assert ModelSpec(str(tmp_path / name / path)).thinking == (name == "with")
        assert ModelSpec("base", adapter=tmp_path / name / "train" / "adapter").thinking == (name == "with")
    assert not ModelSpec("base").thinking
