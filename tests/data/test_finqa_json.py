from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fintune.data.finqa_json import read_finqa, read_objects
from fintune.errors import DataError
from support.paths import ROOT

SHARED = ROOT.parent / "shared" / "finqa"


def record(record_id: str = "ACME/2009/page_1.pdf-1", **qa: Any) -> dict[str, Any]:
    return {
        "id": record_id,
        "pre_text": ["revenue grew ."],
        "post_text": ["see note 5 ."],
        "table": [["", "2009", "2008"], ["revenue", "$ 12", "10"]],
        "filename": "ACME/2009/page_1.pdf",
        "qa": {"question": "how much ?", "program": "subtract(12, 10)", "exe_ans": 2.0, **qa},
    }


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_finqa_forms_give_same_records(tmp_path: Path) -> None:
    rows = [record(f"A/{n}") for n in range(3)]
    plain = write(tmp_path / "a.json", rows)
    lines = tmp_path / "b.json"
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    packed = tmp_path / "c.json"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    packed_lines = tmp_path / "d.txt"
    packed_lines.write_bytes(gzip.compress(lines.read_bytes()))
    expected = read_finqa(plain).records
    assert [r.id for r in expected] == ["A/0", "A/1", "A/2"]
    for path in (lines, packed, packed_lines):
        assert read_finqa(path).records == expected


def test_one_record_on_one_line_is_a_file_of_lines(tmp_path: Path) -> None:
    assert len(read_finqa(write(tmp_path / "a.jsonl", record())).records) == 1


def test_finqa_file_with_bom_and_line_separator(tmp_path: Path) -> None:
    row = record()
    row["pre_text"] = ["one\u2028two"]
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_finqa(path).records[0].pre_text == ("one\u2028two",)


def changed(where: tuple[Any, ...], value: object) -> dict[str, Any]:
    row = copy.deepcopy(record("A/bad"))
    node: Any = row
    for part in where[:-1]:
        node = node[part]
    if value is ...:
        del node[where[-1]]
    else:
        node[where[-1]] = value
    return row


BROKEN = [
    (changed(("qa", "program"), ...), "no program", "qa.program"),
    (changed(("qa", "program"), "  "), "no program", "qa.program"),
    (changed(("qa", "program"), None), "no program", "qa.program"),
    (changed(("qa", "program"), ["add("]), "bad program", "qa.program"),
    (changed(("qa", "question"), ""), "no question", "qa.question"),
    (changed(("qa",), None), "no question", "qa is null"),
    (changed(("qa", "exe_ans"), ...), "bad exe_ans", "qa.exe_ans"),
    (changed(("qa", "exe_ans"), True), "bad exe_ans", "qa.exe_ans"),
    (changed(("qa", "exe_ans"), "12"), "bad exe_ans", "'12'"),
    (changed(("qa", "exe_ans"), float("nan")), "bad exe_ans", "nan"),
    (changed(("table",), None), "bad table", "table"),
    (changed(("table", 1, 2), 10), "bad table", "table.1.2"),
    (changed(("post_text",), ...), "bad post_text", "post_text"),
    (changed(("id",), ...), "no id", "no id"),
    ("text", "not an object", "a string"),
]


@pytest.mark.parametrize(("row", "reason", "why"), BROKEN)
def test_broken_record_is_dropped_with_reason_and_row(tmp_path: Path, row: object, reason: str, why: str) -> None:
    path = write(tmp_path / "a.json", [record("A/1"), row, record("A/2")])
    result = read_finqa(path)
    assert [r.id for r in result.records] == ["A/1", "A/2"]
    assert result.dropped == {reason: 1}
    (problem,) = result.problems
    assert str(path) in problem
    assert "row 2" in problem
    assert why in problem
    assert "\n" not in problem


def test_strict_stops_at_the_first_broken_record_with_row_and_id(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [record("A/1"), record("A/2", program=None)])
    with pytest.raises(DataError, match=r"row 2, id A/2: qa\.program is missing") as caught:
        read_finqa(path, strict=True)
    assert (caught.value.row, caught.value.record_id) == (2, "A/2")


def test_a_second_record_of_the_same_id_is_dropped(tmp_path: Path) -> None:
    result = read_finqa(write(tmp_path / "a.json", [record("A/1"), record("A/2"), record("A/1")]))
    assert len(result.records) == 2
    assert result.dropped == {"duplicate id": 1}
    assert "row 1" in result.problems[0]


def test_a_broken_line_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(record('A/1'))}\n{{nothing\n{json.dumps(record('A/2'))}\n", encoding="utf-8")
    result = read_finqa(path)
    assert len(result.records) == 2
    assert result.dropped == {"not JSON": 1}


def test_finqa_file_without_usable_record_names_reasons(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [record("A/1", program=""), record("A/2", program=None)])
    with pytest.raises(DataError, match=r"no program: 2.*row 1, id A/1"):
        read_finqa(path)


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.95, 0.999])
def test_a_truncated_file_names_the_path(tmp_path: Path, keep: float) -> None:
    text = json.dumps([record(f"A/{n}") for n in range(20)])
    plain = tmp_path / "plain.json"
    plain.write_text(text[: int(len(text) * keep)], encoding="utf-8")
    data = gzip.compress(text.encode())
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(data[: int(len(data) * keep)])
    for path in (plain, packed):
        with pytest.raises(DataError, match="truncated") as caught:
            read_finqa(path)
        assert str(path) in str(caught.value)


def test_truncated_lines_are_an_error_even_when_not_strict(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(record('A/1'))}\n{json.dumps(record('A/2'))[:-20]}", encoding="utf-8")
    with pytest.raises(DataError, match="truncated in row 2"):
        read_finqa(path)


def test_damaged_gzip_is_an_error(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(json.dumps([record(f"A/{n}") for n in range(50)]).encode()))
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "a.gz"
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="gzip"):
        read_finqa(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"[]", "the list is empty"),
        (b'{\n"data": []\n}', "not a list"),
        (b"id,program\n", "neither a JSON list"),
        (b"[{]", "line 1, column 3"),
        (b"\xff\xfe[\x00", "not UTF-8"),
        (b"[" * 100_000, "not JSON|truncated"),
    ],
)
def test_what_is_no_finqa_file_is_an_error_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_finqa(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["faq.csv", "FAQ.TSV"])
def test_a_table_is_called_so_and_what_takes_it_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("question,answer\nwhy?,so\n")
    with pytest.raises(DataError, match="a table, where FinQA records") as caught:
        read_finqa(path)
    assert "data.source=chat" in caught.value.hint
    assert "fintune ask MODEL QUESTION --page" in caught.value.hint


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_finqa(tmp_path / "none.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_finqa(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no FinQA files beside the repository")
@pytest.mark.parametrize(("name", "number"), [("dev", 883), ("train", 5743)])
def test_every_record_of_the_real_files_is_read(name: str, number: int) -> None:
    result = read_finqa(SHARED / f"{name}.json.gz", strict=True)
    assert len(result.records) == number
    assert not result.dropped


def test_read_objects_keeps_ignored_keys(tmp_path: Path) -> None:
    whole = record("A") | {"table_ori": [["X"]]}
    rows = [record("A", program=""), whole, record("A"), "no object", {"no": "id"}]
    path = write(tmp_path / "a.json", rows)
    assert [each.id for each in read_finqa(path).records] == ["A"]
    assert read_objects(path) == {"A": whole}
