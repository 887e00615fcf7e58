from __future__ import annotations

import re
from typing import Any

import pytest

from fintune.data.finqa_json import read_finqa
from fintune.finqa.cleaning import clean_question
from fintune.finqa.prompt import (
    TooLongError,
    build_messages,
    excerpt,
    page_lines,
    prompt_budget,
    question_line,
    table_lines,
)
from fintune.records import FinQARecord, Message
from support.paths import ROOT

SHARED = ROOT.parent / "shared" / "finqa"


def count(text: str) -> int:
    return len(text.split())


def make(**changes: Any) -> FinQARecord:
    raw = {
        "id": "A/2009/page_1.pdf-1",
        "pre_text": ["the board met in the spring .", "cash rose to $ 7.5 million ."],
        "post_text": ["goodwill fell by 5.5% ( 5.5 % ) to 40 .", "nothing else was said ."],
        "table": [["( in millions )", "2009", "2008"], ["revenue", "$ 12", "-10 ( 10 )"], ["costs", "", "3"]],
        "qa": {"question": "what was the goodwill ?", "program": "add(1, 2)", "exe_ans": 3},
    }
    return FinQARecord.model_validate({**raw, **changes})


def test_build_messages_order() -> None:
    built = build_messages(make(), system="Be brief.", budget=1000, count_tokens=count)
    assert built.messages[0] == Message(role="system", content="Be brief.")
    assert built.messages[1].content == (
        "the board met in the spring .\n"
        "cash rose to $ 7.5 million .\n"
        "\n"
        "( in millions )\n"
        "revenue | 2009: 12 | 2008: -10\n"
        "costs | 2008: 3\n"
        "\n"
        "goodwill fell by 5.5% to 40 .\n"
        "nothing else was said .\n"
        "\n"
        "Question: what was the goodwill ?"
    )
    assert built.num_cut == 0
    assert len(built.kept) == 7


def test_build_messages_without_system_message() -> None:
    built = build_messages(make(), system="", budget=1000, count_tokens=count)
    assert [message.role for message in built.messages] == ["user"]


def test_table_lines_shorten_shared_column_names() -> None:
    table = [["", "december 31 , 2009 ( in millions )", "december 31 , 2008 ( in millions )"], ["cash", "1", "2"]]
    assert table_lines(table) == [
        " | december 31 , 2009 ( in millions ) | december 31 , 2008 ( in millions )",
        "cash | 2009: 1 | 2008: 2",
    ]


def test_table_lines_keep_brackets_whole() -> None:
    table = [["", "volume ( billions )", "cards ( millions )"], ["visa", "1", "2"]]
    assert table_lines(table)[1] == "visa | volume ( billions ): 1 | cards ( millions ): 2"


def test_table_lines_name_a_single_column_once() -> None:
    assert table_lines([["", "amount ( in millions )"], ["net revenue", "$ 536.7"]]) == [
        " | amount ( in millions )",
        "net revenue | 536.7",
    ]


def test_table_lines_lose_no_cell() -> None:
    assert table_lines([["", "high", "high"], ["first", "1", "2", "3"], ["second", "4"], [], ["third"]]) == [
        "",
        "first | high: 1 | high: 2 | 3",
        "second | high: 4",
        "",
        "third",
    ]


def test_table_lines_keep_row_names() -> None:
    name = "$ 5 notes at 6% ( 6 % ) due -3 ( 3 )"
    assert table_lines([["", "2009"], [name, "1"]])[1] == f"{name} | 1"


def test_build_messages_cleans_texts() -> None:
    record = make(pre_text=["the firm 2019s cash rose .", ".", "it is the 201cbank 201d ."], post_text=["."], table=[])
    built = build_messages(record, system="", budget=1000, count_tokens=count)
    assert built.messages[0].content == (
        'the firm\'s cash rose .\nit is the "bank" .\n\nQuestion: what was the goodwill ?'
    )
    assert built.num_cut == 0
    assert [unit.key for unit in built.kept] == ["text_0", "text_1", "text_2", "text_3"]
    assert built.kept[0].text == "the firm 2019s cash rose ."


def test_question_is_cleaned_once() -> None:
    qa = {"question": "what is 201d201d ?", "program": "add(1, 2)", "exe_ans": 3}  # clean, it would be changed again
    record = make(qa=qa)
    line = f"Question: {clean_question(record.qa.question)}"
    assert clean_question(line) != line
    built = build_messages(record, system="", budget=1000, count_tokens=count)
    asked = [built.messages[-1].content, excerpt(record, ["text_0"]), question_line(record.qa.question)]
    assert [text.splitlines()[-1] for text in asked] == [line] * 3


def test_empty_sentences_are_never_cut() -> None:
    record = make(pre_text=["."] * 20, post_text=["the board met in the spring ."], table=[])
    built = build_messages(record, system="", budget=6, count_tokens=lambda text: max(1, len(text.split())))
    assert built.num_cut == 1
    assert len(built.kept) == 20


def test_build_messages_cuts_the_least_relevant() -> None:
    whole = build_messages(make(), system="", budget=1000, count_tokens=count)
    built = build_messages(make(), system="", budget=whole.num_tokens - 4, count_tokens=count)
    assert built.num_cut == 1
    assert "the board met" not in built.messages[-1].content
    assert "goodwill fell" in built.messages[-1].content
    assert [unit.key for unit in built.kept] == ["text_1", "table_0", "table_1", "table_2", "text_2", "text_3"]


def test_build_messages_keeps_every_budget() -> None:
    record = make()
    total = build_messages(record, system="s", budget=1000, count_tokens=count).num_tokens
    least = count("s Question: what was the goodwill ?")
    for budget in range(least, total + 1):
        built = build_messages(record, system="s", budget=budget, count_tokens=count)
        assert built.num_tokens <= budget
        assert built.messages[-1].content.endswith("Question: what was the goodwill ?")
        assert built.num_cut == 7 - len(built.kept)
        keys = {unit.key for unit in built.kept}
        if any(key.startswith("table") for key in keys):
            assert "table_0" in keys


def test_build_messages_refuses_too_long_questions() -> None:
    with pytest.raises(TooLongError, match="needs 6 of 5"):
        build_messages(make(), system="", budget=5, count_tokens=count)


def test_build_messages_counts_the_rendered_prompt() -> None:
    def rendered(messages: Any) -> int:
        # A template whose overhead grows with the number of lines, as no sum over lines can know.
        return sum(count(m.content) + 3 * m.content.count("\n") for m in messages)

    built = build_messages(make(), system="", budget=40, count_tokens=count, count_prompt=rendered)
    assert built.num_tokens == rendered(built.messages) <= 40
    assert built.num_cut > 0


def test_build_messages_ignores_the_answer() -> None:
    other = make(
        qa={
            "question": "what was the goodwill ?",
            "program": "divide(7.5, 40)",
            "exe_ans": 1,
            "gold_inds": {"text_1": ""},
        }
    )
    one, two = (build_messages(r, system="", budget=30, count_tokens=count) for r in (make(), other))
    assert one.num_cut > 0
    assert one == two


def test_prompt_budget_depends_on_long_completions_only() -> None:
    assert prompt_budget(1024) == prompt_budget(1024, 20) == 928
    assert prompt_budget(1024, 100) == 924
    assert prompt_budget(64) == 48


def literals(program: str) -> list[str]:
    args = [arg for step in re.findall(r"\((.*?)\)(?:, |$)", program) for arg in step.split(", ")]
    return [arg for arg in args if not arg.startswith(("#", "const_")) and arg != "none"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no FinQA files beside the repository")
def test_build_messages_keeps_numbers_of_finqa_programs() -> None:
    num_lost = num_all = 0
    for record in read_finqa(SHARED / "dev.json.gz").records:
        table = " ".join(" ".join(row) for row in record.table)
        page = " ".join((*record.pre_text, *record.post_text, table, record.qa.question))
        prompt = " ".join(line for _, line in page_lines(record)) + record.qa.question
        for literal in literals(record.qa.program):
            num_all += 1
            if literal in page and literal not in prompt:
                num_lost += 1
    assert num_all > 1500
    assert num_lost == 0
