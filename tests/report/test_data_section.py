"""The part of the page on data: a run on conversations speaks of sources, not of pages."""

from __future__ import annotations

from typing import Any

import pytest

from fintune.config import Config, DataOptions
from fintune.report.run_data import RunData
from fintune.report.run_page import render_run
from fintune.report.sections.data import data_section

LENGTHS = {"mean": 9.0, "p50": 9, "p95": 14, "max": 15, "total": 90, "histogram": [[0, 10, 6], [10, 20, 4]]}


def split(num: int, **others: Any) -> dict[str, Any]:
    return {
        "num_read": num,
        "num_sampled": num,
        "num_examples": num,
        "dropped": {},
        "problems": [],
        "num_cut_examples": 1,
        "num_cut_units": 2,
        "num_units": 40,
        "prompt_tokens": LENGTHS,
        "completion_tokens": LENGTHS,
        "num_rows": num + 1,
        "num_row_tokens": 1234,
        "evidence": {"num_units": 0, "num_kept": 0},
        "steps": {},
        "operations": {},
        **others,
    }


def source(path: str, licence: str, **others: Any) -> dict[str, Any]:
    return {
        "path": path,
        "licence": {"name": licence, "origin": "", "non_commercial": "NC" in licence},
        "num_rows": 20,
        "shapes": {"messages": 12, "question_answer": 3},
        "files": {},
        "dropped": {"exact duplicate": 2, "near duplicate": 1, "bad role": 2},
        "num_train": 14,
        "num_eval": 1,
        "weight": 1.0,
        **others,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "kind": "chat",
        "max_length": 4096,
        "num_shared_pages": 0,
        "train": split(14, dropped={"too long": 1}, problems=["trader.jsonl row 3: too long"]),
        "eval": split(1),
        "finqa_test_steps": {},
        "finqa_test_operations": {},
        "sources": [
            source("datasets", "CC-BY-4.0", weight=2.0, files={"a.jsonl": {"messages": 12}, "b.csv": {}}),
            source("hub:FinLang/x", "CC-BY-NC-4.0"),
        ],
        "unused_rows": ["a.jsonl, row 9: messages[0].role: 'usr' is no role"],
    }


def test_sources_table_has_rows_formats_duplicates_and_licence(report):
    section = data_section(report)
    first, a, b, second = section["sources"].texts()
    assert first[1:5] == ["20", "12 messages, 3 question answer", "3", "2 bad role"]
    assert first[5:7] == ["14 × 2", "1"]
    assert (a[0], a[2], b[2]) == ("a.jsonl", "12 messages", "no usable row")
    assert second[7] == "CC-BY-NC-4.0, not for commercial use"
    assert "hub:FinLang/x (CC-BY-NC-4.0)" in section["restricted"]


def test_chat_counts_are_of_conversations_and_turns(report):
    rows = {name: numbers for name, *numbers in data_section(report)["counts_and_drops"].texts()}
    assert rows["conversations cut to fit"] == ["1", "1"]
    assert rows["turns cut"] == ["2 of 40", "2 of 40"]
    assert rows["dropped: too long"] == ["1", "0"]
    assert rows["token rows"] == ["15", "2"]
    assert not [name for name in rows if "page" in name or "evidence" in name]


def test_page_of_a_chat_run_names_its_sources(report):
    html = render_run(RunData(Config(data=DataOptions(source="chat", sources=("a",))), data=report))
    for words in (
        "Not for commercial use",
        "hub:FinLang/x",
        "12 messages",
        "row 9",
        "14 examples are trained on. 1 are held out",
    ):
        assert words in html
    assert "Steps of the programs" not in html
    assert "No page of the evaluation" not in html
    assert "rows that were dropped later: 1 too long." in html
    report["train"]["dropped"] = {}
    assert "dropped later" not in data_section(report)["words"]


def test_free_sources_are_not_called_restricted(report):
    report["sources"].pop()
    assert data_section(report)["restricted"] == []
