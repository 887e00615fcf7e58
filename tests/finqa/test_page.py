from __future__ import annotations

import pytest

from fintune.data.finqa_json import read_finqa
from fintune.finqa.page import LEVELS, group_of, page_units, table_row_to_text
from fintune.records import FinQARecord
from support.paths import ROOT

SHARED = ROOT.parent / "shared" / "finqa"


def test_page_units_have_the_keys_of_gold_inds() -> None:
    record = FinQARecord.model_validate(
        {
            "id": "A/2009/page_1.pdf-1",
            "pre_text": ["one .", "two ."],
            "post_text": ["three ."],
            "table": [["", "2009"], ["revenue", "$ 12"]],
            "qa": {"question": "q", "program": "add(1, 2)", "exe_ans": 3},
        }
    )
    units = page_units(record)
    assert [unit.key for unit in units] == ["text_0", "text_1", "table_0", "table_1", "text_2"]
    assert units[4].text == "three ."
    assert units[3].text == "the revenue of 2009 is $ 12 ;"


def test_page_units_without_a_table() -> None:
    qa = {"question": "q", "program": "add(1, 2)", "exe_ans": 3}
    record = FinQARecord.model_validate({"id": "A", "pre_text": [], "post_text": ["a ."], "table": [], "qa": qa})
    assert [unit.key for unit in page_units(record)] == ["text_0"]


def test_table_row_to_text_merges_spaces() -> None:
    header = ("( in millions )", "2009", "2008")
    assert table_row_to_text(header, ("net  sales", "1", "")) == (
        "( in millions ) the net sales of 2009 is 1 ; the net sales of 2008 is ;"
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="no FinQA files beside the repository")
def test_page_units_equal_annotated_evidence() -> None:
    num_equal = num_all = 0
    for record in read_finqa(SHARED / "dev.json.gz").records:
        units = {unit.key: unit.text for unit in page_units(record)}
        for key, text in (record.qa.gold_inds or {}).items():
            assert units[key].replace(" ", "") == text.replace(" ", ""), (record.id, key)
            num_equal += units[key] == text
            num_all += 1
    assert num_all > 1000
    assert num_equal / num_all > 0.95


@pytest.mark.parametrize(
    ("record_id", "groups"),
    [
        ("ETR/2009/page_107.pdf-2", ("ETR/2009/page_107.pdf", "ETR/2009", "ETR")),
        ("A-B/2009/page_1.pdf-D12", ("A-B/2009/page_1.pdf", "A-B/2009", "A-B")),
        ("page-3", ("page", "page", "page")),
        ("ACME/page-3", ("ACME/page", "ACME", "ACME")),
        ("plain", ("plain", "plain", "plain")),
    ],
)
def test_group_of_names_page_report_and_company(record_id: str, groups: tuple[str, ...]) -> None:
    assert tuple(group_of(record_id, level) for level in LEVELS) == groups
