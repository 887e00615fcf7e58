"""Rows of every shape become conversations; broken ones say which field, why and what to do."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from fintune.data.formats import convert_row, is_row
from fintune.data.readers import BrokenRowError

PERSONA = "You are Dana, a rates trader."
ASK, ANSWER = "What moves the curve?", "Supply and the next meeting."


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def said(row: Any, **options: Any) -> list[tuple[str, str]]:
    return [(each.role, each.content) for each in convert_row(row, **options)[1].messages]


QA = [("user", ASK), ("assistant", ANSWER)]


@pytest.mark.parametrize(
    ("row", "shape", "turns"),
    [
        (
            {"messages": [turn("system", PERSONA), turn("user", ASK), turn("assistant", ANSWER)]},
            "messages",
            [("system", PERSONA), *QA],
        ),
        ({"prompt": ASK, "chosen": ANSWER, "rejected": "Buy."}, "preference", QA),
        (
            {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]},
            "sharegpt",
            QA,
        ),
        ({"instruction": ASK, "input": "", "output": ANSWER}, "alpaca", QA),
        (
            {"instruction": ASK, "input": "In 2020.", "output": ANSWER},
            "alpaca",
            [("user", f"{ASK}\n\nIn 2020."), QA[1]],
        ),
        (
            {"Topic": "Bonds", "Title": "Curve", "Context": "C.", "Question": ASK, "Answer": ANSWER},
            "question_answer",
            [("user", f"Context: C.\n\nQuestion: {ASK}"), QA[1]],
        ),
        ({"Topic": "B", "Title": "C", "Context": None, "Question": ASK, "Answer": ANSWER}, "question_answer", QA),
        ({"prompt": ASK, "completion": ANSWER}, "prompt_completion", QA),
        ({"prompt": ASK, "response": ANSWER}, "prompt_completion", QA),
        ({"prompt": [turn("user", ASK)], "completion": [turn("assistant", ANSWER)]}, "prompt_completion", QA),
        ({"conversations": [turn("user", ASK), turn("assistant", ANSWER)]}, "messages", QA),
        ({"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}, "messages", None),
        ({"chosen": [turn("user", ASK), turn("assistant", ANSWER)], "rejected": [turn("assistant", "B")]}, None, QA),
        # Columns of another shape that a table has left empty in this row.
        ({"messages": None, "instruction": ASK, "output": ANSWER, "prompt": "", "chosen": ""}, "alpaca", QA),
        ({"question": ASK, "answer": 42}, "question_answer", [QA[0], ("assistant", "42")]),
        ({"messages": [turn("user", [{"type": "text", "text": ASK}]), turn("assistant", ANSWER)]}, "messages", QA),
    ],
)
def test_a_row_is_known_by_its_fields_and_becomes_turns(row, shape, turns):
    assert convert_row(row)[0] == (shape or "preference")
    if turns is not None:
        assert said(row) == turns


def test_a_preference_keeps_the_rejected_answer():
    assert convert_row({"prompt": ASK, "chosen": ANSWER, "rejected": "Buy."})[1].rejected.content == "Buy."


@pytest.mark.parametrize(
    ("prompt", "content"),
    [
        ({"question": ASK}, ASK),
        ({"instruction": ASK, "input": "the page"}, f"{ASK}\n\nthe page"),
        ({"prompt": [turn("user", ASK)]}, ASK),
    ],
)
def test_the_prompt_of_a_preference_has_several_names(prompt, content):
    shape, found, _ = convert_row({**prompt, "system": PERSONA, "chosen": ANSWER, "rejected": "Buy."})
    assert shape == "preference"
    assert [each.content for each in found.messages] == [PERSONA, content, ANSWER]


def test_whole_conversations_are_a_pair_only_behind_one_prompt():
    better, worse = [turn("user", ASK), turn("assistant", ANSWER)], [turn("user", ASK), turn("assistant", "Buy.")]
    found = convert_row({"chosen": better, "rejected": worse})[1]
    assert ([each.content for each in found.messages], found.rejected.content) == ([ASK, ANSWER], "Buy.")
    with pytest.raises(BrokenRowError, match="differ from those of chosen") as raised:
        convert_row({"chosen": better, "rejected": [turn("user", "Other?"), turn("assistant", "Buy.")]})
    assert (raised.value.reason, raised.value.field) == ("not one prompt", "rejected")


TURNS = [turn("user", ASK), turn("assistant", ANSWER)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "completion": ANSWER},
        {"prompt": ASK, "response": ANSWER},
        {"prompt": [turn("user", ASK)], "completion": [turn("assistant", ANSWER)]},
        {"messages": TURNS},
        {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]},
    ],
)
@pytest.mark.parametrize(
    ("written", "label"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        (1.0, True),
        ("true", True),
        ("False", False),
        (" TRUE ", True),
        ("0", False),
        ("1.0", True),
    ],
)
def test_label_spellings_make_unpaired_preference(row, written, label):
    shape, found, _ = convert_row({**row, "label": written})
    assert (shape, found.label, found.rejected) == ("unpaired_preference", label, None)
    assert [(each.role, each.content) for each in found.messages] == QA


def test_unpaired_answer_from_mapped_columns():
    row = {"Frage": ASK, "antwort": {"text": ANSWER}, "gut": "false", "label": "bonds"}
    columns = {"prompt": "Frage", "completion": "antwort.text", "label": "gut"}
    shape, found, _ = convert_row(row, columns=columns)
    assert (shape, found.label) == ("unpaired_preference", False)
    asked = {"instruction": ASK, "input": "the page", "completion": ANSWER, "label": 1}
    named = convert_row(asked, "unpaired_preference")[1]
    assert (named.messages[0].content, named.label) == (f"{ASK}\n\nthe page", True)


def test_named_format_without_label_suggests_column():
    with pytest.raises(BrokenRowError, match="not in the row") as caught:
        convert_row({"prompt": ASK, "completion": ANSWER, "good": True}, "unpaired_preference")
    assert (caught.value.field, "columns: {label:" in str(caught.value.hint)) == ("label", True)


def test_empty_label_is_broken_only_if_labels_are_trained():
    row = {"prompt": ASK, "completion": ANSWER, "label": ""}
    assert convert_row(row)[0] == "prompt_completion"
    with pytest.raises(BrokenRowError, match="missing or empty") as caught:
        convert_row(row, is_labelled=True)
    assert (caught.value.reason, caught.value.field) == ("no label", "label")
    other = {"instruction": ASK, "output": ANSWER, "prompt": None, "completion": None, "label": None}
    assert convert_row(other, is_labelled=True)[0] == "alpaca"


def test_named_format_ignores_label_column():
    row = {"prompt": ASK, "completion": ANSWER, "label": "bonds"}
    assert convert_row(row, "prompt_completion")[1].label is None


CALL = {"type": "function", "function": {"name": "balance", "arguments": {"of": "ACME"}}}
TEXT_CALL = {"function": {"name": "balance", "arguments": '{"of": "ACME"}'}}
TOOL = {"type": "function", "function": {"name": "balance", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        (
            {
                "messages": [
                    TURNS[0],
                    turn("assistant", "") | {"tool_calls": [TEXT_CALL]},
                    turn("tool", "0 USD"),
                    TURNS[1],
                ]
            },
            ["user", "assistant", "tool", "assistant"],
        ),
        (
            {"messages": [TURNS[0], turn("assistant", None) | {"function_call": CALL["function"]}]},
            ["user", "assistant"],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": ASK},
                    {"from": "function_call", "value": '{"name": "balance", "arguments": {"of": "ACME"}}'},
                    {"from": "observation", "value": '{"usd": 0}'},
                    {"from": "gpt", "value": ANSWER},
                ]
            },
            ["user", "assistant", "tool", "assistant"],
        ),
        (
            {"prompt": ASK, "completion": [turn("assistant", None) | {"tool_calls": json.dumps([CALL])}]},
            ["user", "assistant"],
        ),
    ],
)
def test_tool_calls_of_every_spelling_become_one_form(row, roles):
    found = convert_row(row | {"tools": json.dumps([TOOL["function"] | {"description": None}])})
    assert [message.role for message in found.conversation.messages] == roles
    assert found.conversation.messages[1].tool_calls == (CALL,)
    assert found.conversation.messages[0].tools == (TOOL,)
    assert "not read" not in found.columns.values()


def test_a_rejected_answer_may_call_a_tool():
    worse = turn("assistant", None) | {"tool_calls": [CALL]}
    found = convert_row({"prompt": [TURNS[0]], "chosen": [TURNS[1]], "rejected": [worse], "tools": [TOOL]}).conversation
    assert (found.rejected.tool_calls, found.messages[0].tools) == ((CALL,), (TOOL,))


def test_a_tool_call_without_name_is_a_broken_row():
    with pytest.raises(BrokenRowError) as caught:
        convert_row({"messages": [TURNS[0], turn("assistant", "x") | {"tool_calls": [{"id": "1"}]}]})
    assert (caught.value.reason, caught.value.field) == ("bad tool call", "messages[1].tool_calls")


@pytest.mark.parametrize("empty", [None, [], "", "[]", " ", "null", {"name": None, "arguments": None}])
def test_a_column_of_tools_that_is_empty_in_a_row_breaks_nothing(empty):
    turns = [TURNS[0], TURNS[1] | {"tool_calls": empty, "function_call": empty}]
    assert said({"messages": turns, "tools": empty}) == QA


def test_a_column_called_tools_beside_plain_texts_is_passed_over():
    assert said({"question": ASK, "answer": ANSWER, "tools": "Hammer, saw"}) == QA
    assert said({"prompt": ASK, "completion": ANSWER, "tools": ["hammer"]}) == QA


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_in_a_field_are_kept_with_their_turn(name):
    turns = [TURNS[0] | {name: None}, TURNS[1] | {name: "Hm."}, TURNS[0], TURNS[1] | {name: "Well."}]
    for written in (turns, json.dumps(turns), repr(turns)):
        found = convert_row({"messages": written}).conversation
        assert [message.reasoning_content for message in found.messages] == [None, "Hm.", None, "Well."]
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": ANSWER}]
    found = convert_row({"messages": [TURNS[0], turn("assistant", parts)]}).conversation
    assert (found.messages[1].reasoning_content, found.messages[1].content) == ("Hm.", ANSWER)


def test_turns_behind_the_last_answer_are_left_out_and_counted():
    _, found, _ = convert_row({"messages": [turn("user", ASK), turn("assistant", ANSWER), turn("user", "Thanks")]})
    assert [each.role for each in found.messages] == ["user", "assistant"]
    assert found.num_trailing == 1


def test_a_part_without_text_adds_nothing():
    parts = [{"type": "text", "text": None}, {"type": "text"}, {"type": "text", "text": ASK}]
    _, found, _ = convert_row({"messages": [turn("user", parts), turn("assistant", ANSWER)]})
    assert found.messages[0].content == ASK


def test_an_integer_beyond_every_float_is_its_digits():
    _, found, _ = convert_row({"question": 10**400, "answer": "x"})
    assert found.messages[0].content == "1" + "0" * 400


def test_a_turn_of_weight_zero_is_not_trained():
    turns = [turn("user", ASK), turn("assistant", "no") | {"weight": 0}, turn("user", "?"), turn("assistant", ANSWER)]
    assert convert_row({"messages": turns})[1].untrained == {1}
    turns = [
        {"from": "human", "value": ASK},
        {"from": "gpt", "value": "no", "weight": 0},
        {"from": "gpt", "value": "x"},
    ]
    assert convert_row({"system": PERSONA, "conversations": turns})[1].untrained == {2}, "behind the system turn"


def test_columns_of_other_names_are_mapped_and_go_into_objects():
    row = {"Frage": ASK, "qa": {"antwort": ANSWER}}
    assert said(row, columns={"question": "Frage", "answer": "qa.antwort"}) == QA


def test_missing_mapped_column_suggests_near_name():
    with pytest.raises(BrokenRowError) as caught:
        convert_row({"Frage": ASK, "Antwort": ANSWER}, columns={"question": "Frage", "answer": "Antwrt"})
    assert (caught.value.field, caught.value.hint) == ("Antwrt", "did you mean Antwort?")


def test_mapped_column_matches_in_any_case():
    columns = {"question": "frage", "answer": "qa.antwort"}
    assert said({"Frage": ASK, "QA": {"Antwort": ANSWER}}, columns=columns) == QA
    assert is_row({"Frage": ASK, "QA": {}}, columns)
    assert said({"frage": ASK, "Frage": "other", "antwort": ANSWER}, columns=columns | {"answer": "antwort"}) == QA
    with pytest.raises(BrokenRowError) as caught:
        convert_row({"Frage": ASK, "FRAGE": ASK, "antwort": ANSWER}, columns=columns)
    assert (caught.value.field, caught.value.hint) == ("frage", "did you mean Frage or FRAGE?")


@pytest.mark.parametrize("row", [{"Frage": "a", "Antwort": "b"}, {"question": "a", "reply": "b"}])
def test_unknown_format_names_fields_as_written(row):
    with pytest.raises(BrokenRowError, match=f"^the fields {', '.join(row)} are no known format$"):
        convert_row(row)


def test_an_empty_field_is_named_as_the_row_writes_it():
    with pytest.raises(BrokenRowError) as caught:
        convert_row({"Frage": ASK, "QA": {"antwort": ""}}, columns={"question": "frage", "answer": "QA.antwort"})
    assert caught.value.field == "QA.antwort"
    with pytest.raises(BrokenRowError) as caught:
        convert_row({"Frage": "", "Antwort": ANSWER}, columns={"question": "frage", "answer": "antwort"})
    assert caught.value.field == "Frage"


@pytest.mark.parametrize("empty", [None, "", []])
def test_empty_field_yields_to_alias_unless_mapped(empty):
    _, found, _ = convert_row({"prompt": ASK, "completion": empty, "response": ANSWER})
    assert found.messages[1].content == ANSWER
    _, found, _ = convert_row({"prompt": ASK, "completion": ANSWER, "response": empty})
    assert found.messages[1].content == ANSWER
    with pytest.raises(BrokenRowError) as caught:
        convert_row({"prompt": ASK, "text": empty, "response": ANSWER}, columns={"completion": "text"})
    assert caught.value.field == "text"


def test_a_shape_that_is_named_wins_over_the_fields():
    row = {"prompt": ASK, "completion": ANSWER, "question": "other", "answer": "other"}
    assert said(row, format_="question_answer") == [("user", "other"), ("assistant", "other")]
    with pytest.raises(BrokenRowError, match="missing or empty") as caught:
        convert_row(row, format_="alpaca")
    assert caught.value.field == "instruction"


@pytest.mark.parametrize(
    ("row", "options", "field", "others"),
    [
        ({"A": ASK, "B": ANSWER}, {"format_": "question_answer"}, "question", "A, B"),
        ({"A": ASK, "B": ANSWER}, {"format_": "question_answer", "columns": {"question": "A"}}, "answer", "B"),
        ({"Ask": ASK, "chosen": ANSWER, "rejected": "no", "label": 1}, {"format_": "preference"}, "prompt", "Ask"),
    ],
)
def test_missing_field_of_named_format_lists_columns(row, options, field, others):
    with pytest.raises(BrokenRowError) as caught:
        convert_row(row, **options)
    assert (caught.value.field, caught.value.why) == (field, f"not in the row, which has {others}")
    assert caught.value.hint.endswith(f"or name its column, as columns: {{{field}: {others.split(', ')[0]}}}")


@pytest.mark.parametrize(
    ("row", "shape", "field"),
    [
        ({"question": ASK}, "question_answer", "answer"),
        ({"Question": "", "answer": ANSWER, "id": 1}, "question_answer", "Question"),
    ],
)
def test_empty_field_suggests_no_other_column(row, shape, field):
    with pytest.raises(BrokenRowError, match="missing") as caught:
        convert_row(row, format_=shape)
    assert caught.value.field == field


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": DEEP}, "bad turns"),
        ({"conversations": DEEP}, "bad turns"),
        ({"prompt": ASK, "chosen": [TURNS[1]], "rejected": [DEEP]}, "bad turns"),
        (
            {
                "messages": [turn("user", ASK), turn("assistant", ANSWER)],
                "tools": functools.reduce(lambda value, _: {"a": value}, range(900), 1),
            },
            "too deep",
        ),
    ],
)
def test_what_is_nested_without_end_is_a_broken_row(row, reason):
    with pytest.raises(BrokenRowError) as caught:
        convert_row(row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("row", "reason", "field", "hint"),
    [
        ({"messages": [turn("user", ASK)]}, "no answer", "", "the last turn must be the answer"),
        ({"messages": [turn("assistant", ANSWER)]}, "no question", "", "add the question"),
        ({"messages": [turn("usr", ASK), turn("assistant", "x")]}, "bad role", "messages[0].role", "mean 'user'"),
        ({"messages": [turn("moderator", ASK), turn("assistant", "x")]}, "bad role", "messages[0].role", "known roles"),
        ({"messages": [turn("user", " "), turn("assistant", "x")]}, "no content", "messages[0].content", "fill it"),
        ({"messages": [turn("user", ASK), turn("system", "x")]}, "bad role", "messages[1]", "to the front"),
        ({"messages": [{"role": "user"}, turn("assistant", "x")]}, "no content", "messages[0].content", "fill it"),
        ({"messages": [{"text": "x"}]}, "bad role", "messages[0]", "write role and content"),
        ({"messages": "hello"}, "bad turns", "messages", 'write [{"role"'),
        ({"messages": [turn("user", {"a": 1}), turn("assistant", "x")]}, "not text", "messages[0].content", "as text"),
        (
            {"messages": [turn("user", [{"type": "text", "text": [1]}]), turn("assistant", "x")]},
            "not text",
            "messages[0].content[0].text",
            "write it as text",
        ),
        (
            {"messages": [turn("user", [{"type": "text", "text": None}]), turn("assistant", "x")]},
            "no content",
            "messages[0].content",
            "fill it",
        ),
        (
            {"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]},
            "no value",
            "conversations[0].value",
            "",
        ),
        ({"prompt": ASK, "chosen": ANSWER, "rejected": ANSWER}, "no preference", "rejected", "remove the row"),
        ({"prompt": ASK, "chosen": ANSWER}, "unknown format", "", "rejected is missing"),
        ({"prompt": "", "chosen": ANSWER, "rejected": "x"}, "no question", "prompt", "fill it"),
        ({"Question": ASK, "Answer": "", "Context": "c"}, "no answer", "Answer", "fill it or remove the row"),
        ({"Question": None, "Answer": ANSWER, "Context": "c"}, "no question", "Question", "fill it"),
        ({"instruction": ASK, "output": float("nan")}, "no answer", "output", "fill it"),
        ({"prompt": ASK, "completion": "cut \ud83d"}, "not text", "completion", "cut inside an emoji"),
        ({"prompt": ASK, "completion": {"a": 1}}, "not text", "completion", "write it as text"),
        ({"prompt": ASK, "completion": ANSWER, "label": "ture"}, "bad label", "label", "did you mean true?"),
        ({"prompt": ASK, "completion": ANSWER, "label": "up"}, "bad label", "label", "format: prompt_completion"),
        ({"prompt": ASK, "completion": ANSWER, "label": "👍"}, "bad label", "label", "write true for a desired"),
        ({"prompt": ASK, "completion": ANSWER, "label": -1}, "bad label", "label", "write true for a desired"),
        ({"prompt": ASK, "completion": ANSWER, "label": 4.5}, "bad label", "label", "of a rating by a threshold"),
        ({"prompt": ASK, "completion": ANSWER, "label": 10**400}, "bad label", "label", "of a rating by a threshold"),
        ({"prompt": ASK, "completion": ANSWER, "label": [True]}, "bad label", "label", "write true"),
        ({"prompt": ASK, "completion": " ", "label": False}, "no answer", "completion", "fill it"),
        ({"messages": [*TURNS[:1], TURNS[1] | {"weight": 0}], "label": True}, "no answer", "label", "remove the"),
        ({"text": "once upon a time"}, "unknown format", "", "write prompt and completion"),
        ({"pre_text": [], "qa": {}}, "unknown format", "", "data.source: finqa"),
        ({"frage": ASK}, "unknown format", "", "columns: {question"),
        ({"Conversation": [turn("usr", ASK)]}, "bad role", "Conversation[0].role", "mean 'user'"),
        ({"messages": [{"from": "usr", "value": ASK}]}, "bad role", "messages[0].from", "mean 'user'"),
        ({"conversations": [turn("usr", ASK)]}, "bad role", "conversations[0].role", "mean 'user'"),
        ({"prompt": ASK, "Response": ""}, "no answer", "Response", "fill it"),
        (["a"], "not an object", "", None),
        (None, "not an object", "", None),
    ],
)
def test_a_broken_row_says_the_field_the_reason_and_what_to_do(row, reason, field, hint):
    with pytest.raises(BrokenRowError) as caught:
        convert_row(row)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert hint is None or hint in str(caught.value.hint)


@pytest.mark.parametrize("more", [{"content": ["q"]}, {"content": ["q", "a", "b"]}, {"content": ["q", "a"], "n": 3}])
def test_lists_of_turns_by_key_have_one_length(more):
    with pytest.raises(BrokenRowError, match="not a list of turns"):
        convert_row({"messages": {"role": ["user", "assistant"], **more}})
