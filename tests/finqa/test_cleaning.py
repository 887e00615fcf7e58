from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fintune.data.finqa_json import read_finqa
from fintune.errors import DataError
from fintune.finqa.cleaning import (
    RULES,
    CleaningRule,
    Edit,
    TextKind,
    clean,
    clean_cell,
    clean_question,
    clean_sentence,
    restore,
)
from fintune.finqa.grammar import vocabulary
from fintune.finqa.page import clean_record, restore_record
from fintune.finqa.prompt import table_lines
from fintune.records import FinQARecord
from support.paths import ROOT

SHARED = ROOT.parent / "shared" / "finqa"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="no FinQA files beside the repository")
KINDS: tuple[TextKind, ...] = ("sentence", "cell", "question")
PIECES = (
    *" .,$%()-\\n\n\t5",
    *("201c", "201d", "2013", "2014", "2018 2018", "2019 2019", " 2019s", " 2014as", "20ac5", "25cf", "-32 ( 32 )"),
    *("23.6% ( 23.6 % )", "( 5 ) % (  % )", "firm", " in "),
)


@pytest.fixture(scope="module")
def records() -> list[FinQARecord]:
    return [record for name in ("dev", "train") for record in read_finqa(SHARED / f"{name}.json.gz").records]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rules_do_what_their_examples_show(rule: CleaningRule) -> None:
    before, after = rule.example
    for kind in rule.kinds:
        cleaned, edits = clean(before, kind)
        assert cleaned == after
        assert {edit.rule for edit in edits} == {rule.name}


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join), st.sampled_from(KINDS))
def test_restore_undoes_clean(text: str, kind: TextKind) -> None:
    assert restore(*clean(text, kind)) == text


@settings(deadline=None)
@given(st.text(alphabet=" \t\n\x1c\xa0\u3000ab"))
def test_clean_sentence_merges_white_space(text: str) -> None:
    assert clean_sentence(text) == " ".join(text.split())


def test_restore_refuses_edits_of_another_text() -> None:
    _, edits = clean("the firm 2019s equity")
    with pytest.raises(DataError, match="'apostrophe' did not write"):
        restore("the firms equity", edits)
    with pytest.raises(DataError, match="at 9 of"):
        restore("", [Edit("space", 9, " ", "")])


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (
            "the firm 2019s 201cmake-whole 201d price , in o 2019reilly 2019s view",
            "the firm's \"make-whole\" price , in o'reilly's view",
        ),
        ("( the 201c2016 notes 201d )", '( the "2016 notes" )'),
        ("the 2018 2018soft market , 2019 2019 began", 'the "soft market ," began'),
        ("off 2013balance sheet , see note 7 2014leases", "off \u2013balance sheet , see note 7 \u2014leases"),
    ],
)
def test_clean_sentence_repairs_unicode_escapes(text: str, cleaned: str) -> None:
    assert clean_sentence(text) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "from 2013 to 2014 , 2018 and 2019",
        "net sales 2019 2018 2017",
        "of customers 2019 visa programs",
        "as in 2014what would be due in 2013when it ended",
        "december 31 , 2014and after",
        "on pages 40 201342",
        "sold by pm usa 2022 an increase of 5",
        "2020and 2021",
        "asu 2014-09 , 2015/2014change",
        "201206",
        "2014",
        "2019",
    ],
)
def test_clean_keeps_years_and_numbers(text: str) -> None:
    assert all(clean(text, kind) == (text, ()) for kind in KINDS)


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("$ 5829", "5829"),
        ("-32 ( 32 )", "-32"),
        ("$ -181 ( 181 )", "-181"),
        ("-.3 ( .3 )", "-.3"),
        ("$ 5 to $ 7", "5 to 7"),
        ("5$7", "5 7"),
        ("$", ""),
        ("23.6% ( 23.6 % )", "23.6%"),
        ("( 41 ) % (  % )", "( 41 ) %"),
        ("12 % (  % )", "12 %"),
        ("28% ( 28 % ) to 84% ( 84 % ) ( 61%/60% ( 61%/60 % ) )", "28% to 84% ( 61%/60% )"),
        ("31 to 150 ( 84/78 )", "31 to 150 ( 84/78 )"),
        ("2022 ( 2 )", "2022 ( 2 )"),
        ("-32 ( 31 )", "-32 ( 31 )"),
        ("-", "-"),
        ("", ""),
    ],
)
def test_clean_cell_writes_numbers_as_programs_do(cell: str, number: str) -> None:
    assert clean_cell(cell) == number


def test_clean_sentence_keeps_the_currency() -> None:
    text = "a fall of $ 5 million , or 8% ( 8 % ) , to -3 ( 3 )"
    assert clean_sentence(text) == "a fall of $ 5 million , or 8% , to -3"


@pytest.mark.parametrize("tail", ["", " ", "\n", "\\n", "\\\\n", " \\n\\n "])
def test_clean_question_removes_typed_newlines(tail: str) -> None:
    assert clean_question(f"what is the margin{tail}") == "what is the margin"


def test_clean_record_keeps_the_numbers_of_sentences() -> None:
    record = FinQARecord.model_validate(
        {
            "id": "A/2009/page_1.pdf-1",
            "pre_text": ["cash rose .", "."],
            "post_text": [". ."],
            "table": [["$ 2019s", "$ 2009"], ["citi 2019s  -3 ( 3 )", "-3 ( 3 )"], []],
            "qa": {"question": "what fell?\\n", "program": "add(1, 2)", "exe_ans": 3},
        }
    )
    cleaned, edits = clean_record(record)
    assert cleaned.pre_text == ("cash rose .", "")
    assert cleaned.post_text == (". .",)
    assert cleaned.table == (("$ 2019s", "2009"), ("citi 2019s  -3 ( 3 )", "-3"), ())
    assert cleaned.qa.question == "what fell?"
    assert restore_record(cleaned, edits) == record
    with pytest.raises(DataError, match="edits of 7 texts for a record of 8"):
        restore_record(cleaned, edits[1:])


def literals(program: str) -> Iterator[str]:
    for arguments in re.findall(r"\((.*?)\)(?:, |$)", program):
        yield from (item for item in arguments.split(", ") if re.fullmatch(r"-?[\d.]+%?", item))


def numbers_of(record: FinQARecord) -> frozenset[str]:
    return vocabulary(record.table, (*record.pre_text, *record.post_text, record.qa.question)).numbers


@real
def test_clean_record_is_undone_and_idempotent_on_finqa(records: list[FinQARecord]) -> None:
    assert len(records) >= 3340
    for record in records:
        cleaned, edits = clean_record(record)
        assert restore_record(cleaned, edits) == record
        assert clean_record(cleaned)[0] == cleaned


@real
def test_clean_record_keeps_program_numbers_and_row_names(records: list[FinQARecord]) -> None:
    num_on_page = num_rows = 0
    for record in records:
        cleaned, _ = clean_record(record)
        needed = set(literals(record.qa.program)) & numbers_of(record)
        num_on_page += len(needed)
        assert needed <= numbers_of(cleaned), record.id
        assert [row[:1] for row in cleaned.table] == [row[:1] for row in record.table]
        lines = table_lines(record.table)
        for name in re.findall(r"table_\w+\((.+?), none\)", record.qa.program):
            num_rows += 1
            assert any(line.startswith(f"{name} | ") for line in lines), record.id
    assert num_on_page > 6500
    assert num_rows > 20
