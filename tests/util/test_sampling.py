"""Which rows are shown of many."""

from __future__ import annotations

from fintune.util.sampling import describe_row, file_of_row, stratified_indices


def test_stratified_indices_spread_within_each_kind():
    kinds = ["a"] * 100 + ["b"] * 50 + ["c"]
    assert stratified_indices(kinds, 3) == [0, 100, 150]
    assert stratified_indices(kinds, 5) == [0, 50, 100, 125, 150]
    assert stratified_indices(kinds, 0) == []
    assert stratified_indices(kinds, 1000) == list(range(151))
    assert stratified_indices([], 3) == []


def test_stratified_indices_with_more_kinds_than_rows():
    assert stratified_indices([kind for kind in range(10) for _ in range(7)], 2) == [0, 35]


def test_a_conversations_id_names_its_file_and_a_page_none():
    assert file_of_row("rows of: 2024.jsonl:12") == "rows of: 2024.jsonl"
    assert file_of_row("rows.jsonl:7#2") == "rows.jsonl"
    assert {file_of_row("A/2009/page_1.pdf-1"), file_of_row("A/2009/page_1.pdf-1 A/2009/page_1.pdf-2")} == {""}


def test_a_conversation_is_named_as_messages_name_its_row(tmp_path):
    paths = ["data/faq.csv", f"{tmp_path}/", "hub:acme/talks", "b/*.jsonl"]
    assert describe_row("faq.csv:3", paths) == "data/faq.csv, row 3"
    assert describe_row("2/sub/x.jsonl:7#2", paths) == f"{tmp_path}/sub/x.jsonl, row 7"
    assert describe_row("3/acme/talks/train:1", paths) == "hub:acme/talks, split train, row 1"
    assert describe_row("4/b/x.jsonl:9", paths) == "b/x.jsonl, row 9"
    assert describe_row("9/x.jsonl:9", ["9"]) == "9/x.jsonl, row 9"
    assert describe_row("A/2009/page_1.pdf-1", []) == "A/2009/page_1.pdf-1"
