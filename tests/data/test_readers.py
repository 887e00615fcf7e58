"""Rows of files and folders: every form, and what is wrong with a file or one of its rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fintune.data.files import describe_unread, find_files
from fintune.data.readers import BrokenRowError, Row, read_rows
from fintune.errors import DataError

ROWS = [{"question": f"what is {n}, in\nwords?", "answer": f"{n}"} for n in range(3)]


def values(path: Path) -> list[object]:
    return [row.value for row in read_rows(path)]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", json.dumps(ROWS)),
        ("pretty.json", json.dumps(ROWS, indent=2)),
        ("lines.jsonl", lines(ROWS)),
        ("lines-called.json", lines(ROWS)),
        ("byte-order-mark.jsonl", "\ufeff" + lines(ROWS)),
        ("blank-lines.jsonl", "\n" + lines(ROWS).replace("\n", "\n\n")),
        ("wrapped.json", json.dumps({"version": "1", "data": ROWS}, indent=1)),
        ("wrapped-in-a-line.json", json.dumps({"version": "1", "data": ROWS})),
    ],
)
def test_a_json_file_is_read_whatever_form_it_has(tmp_path, name, text):
    assert values(write(tmp_path / name, text)) == ROWS


@pytest.mark.parametrize(
    "text",
    [
        '[\n{"question": "q", "answer": "a"}\n]',
        '[{"question": "q", "answer": "a"}]',
        '[\n  {"question": "q", "answer": "a"}\n]\n',
    ],
)
def test_a_list_of_one_object_a_line_may_have_one_object(tmp_path, text):
    assert values(write(tmp_path / "a.json", text)) == [{"question": "q", "answer": "a"}]


def test_the_last_object_of_a_list_may_be_a_line(tmp_path):
    assert values(write(tmp_path / "a.json", '[{"a": 1},\n{"a": 2}\n]')) == [{"a": 1}, {"a": 2}]


def test_a_table_without_header_may_begin_with_two_lines(tmp_path):
    rows = read_rows(write(tmp_path / "a.csv", '"a\nb",c\nd,e\n'), has_header=False)
    assert [(row.number, row.value) for row in rows] == [
        (1, {"column1": "a\nb", "column2": "c"}),
        (2, {"column1": "d", "column2": "e"}),
    ]


def test_no_cell_of_a_table_in_json_is_lost(tmp_path):
    broken, row = values(write(tmp_path / "a.json", '{"columns": ["a"], "data": [[1, 2], [3]]}'))
    assert isinstance(broken, BrokenRowError)
    assert row == {"a": 3}
    by_column = write(tmp_path / "b.json", '{"a": {"0": 1}, "b": {"0": 2, "1": 3}}')
    assert values(by_column) == [{"a": 1, "b": 2}, {"a": None, "b": 3}]


def test_one_conversation_alone_in_a_file_is_a_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    for name, text in (("pretty.json", json.dumps(row, indent=2)), ("line.json", json.dumps(row))):
        path = write(tmp_path / name, text)
        assert [each.value for each in read_rows(path, is_row=lambda value: "messages" in value)] == [row]


def test_lines_that_hold_one_list_of_objects_each_are_lines(tmp_path):
    rows = [{"id": number, "dialog": [{"role": "user", "content": "hi"}]} for number in range(2)]
    assert values(write(tmp_path / "x.jsonl", lines(rows))) == rows
    with pytest.raises(DataError, match="truncated in row 2"):
        values(write(tmp_path / "cut.jsonl", lines(rows)[:-9]))


def test_gzip_is_known_by_its_content(tmp_path):
    for name in ("rows.jsonl.gz", "rows.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(lines(ROWS).encode()))
        assert values(tmp_path / name) == ROWS


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_csv_separators_and_line_breaks_in_cells(tmp_path, mark):
    table = write(tmp_path / "t.csv", f'question{mark}answer\n"a{mark}\nb"{mark}1\n"say ""x"""{mark}2\n')
    found = list(read_rows(table))
    assert [row.value for row in found] == [
        {"question": f"a{mark}\nb", "answer": "1"},
        {"question": 'say "x"', "answer": "2"},
    ]
    assert [row.number for row in found] == [2, 3], "as a spreadsheet counts"


def test_blank_lines_before_a_header_are_passed_over_and_counted(tmp_path):
    found = list(read_rows(write(tmp_path / "t.csv", "\n \nquestion,answer\n\na,1\nb\n")))
    assert found[0] == Row(str(tmp_path / "t.csv"), 5, {"question": "a", "answer": "1"})
    assert found[1].number == 6


def test_parquet_and_saved_datasets_give_the_same_rows(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(tmp_path / "splits")
    assert values(tmp_path / "rows.parquet") == ROWS
    assert values(find_files(str(tmp_path / "saved"))[0]) == ROWS
    assert values(tmp_path / "splits") == ROWS
    assert [row.value for row in read_rows(tmp_path / "splits", split="test")] == ROWS[:1]
    with pytest.raises(DataError, match=r"no split 'dev'.*train, test"):
        list(read_rows(tmp_path / "splits", split="dev"))


def test_a_folder_gives_its_data_files_in_order_and_no_others(tmp_path):
    for name in ("b.jsonl", "a.csv", "deep/c.json.gz", "README.md", ".hidden/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [str(path.relative_to(tmp_path)) for path in find_files(str(tmp_path))] == [
        "a.csv",
        "b.jsonl",
        "deep/c.json.gz",
    ]
    assert [path.name for path in find_files(f"{tmp_path}/*.jsonl")] == ["b.jsonl"]


def test_what_a_folder_holds_beside_its_data_is_told(tmp_path):
    for name in ("a.csv", "LICENSE", "README.md", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert describe_unread(str(tmp_path)) == "", "nothing that could be meant as rows"
    known = "(the known suffixes are .json .jsonl .ndjson .csv .tsv .parquet .arrow, also with .gz)"
    (tmp_path / "faq.xlsx").write_bytes(b"x")
    assert describe_unread(str(tmp_path)) == f"1 file not read: faq.xlsx {known}"
    for name in ("readme.txt", "b.docx", "c.pdf", "d.pdf", "e.pdf", "f.pdf"):
        (tmp_path / name).write_bytes(b"x")
    assert describe_unread(str(tmp_path)) == f"7 files not read: b.docx, c.pdf, d.pdf, e.pdf, f.pdf and 2 more {known}"
    assert (
        describe_unread(f"{tmp_path}/*.csv") == describe_unread(f"{tmp_path}/a.csv") == describe_unread("hub:a/b") == ""
    )


def test_a_folder_without_data_names_what_it_holds(tmp_path):
    (tmp_path / "faq.xlsx").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"the folder holds no data file, only faq\.xlsx: the known suffixes are \.json "
    ):
        find_files(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "kind"), [("a.xlsx", "an Excel workbook"), ("a.XLS", "an Excel"), ("a.ods", "a work")]
)
def test_a_workbook_says_how_to_save_it(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=rf"{name}: {kind}.* is not read: save the sheet as CSV UTF-8$"):
        values(tmp_path / name)


@pytest.mark.parametrize("path", ["no-such-file.jsonl", "nothing/*.csv"])
def test_what_is_not_there_is_said_with_its_name(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder") as caught:
        find_files(path)
    assert path in str(caught.value)
    assert f", {tmp_path / path} was tried" in str(caught.value)


def test_a_broken_line_is_told_without_the_parsers_own_line(tmp_path):
    found = list(read_rows(write(tmp_path / "x.jsonl", lines(ROWS[:1]) + '{"a": 1 "b": 2}\n' + lines(ROWS[1:]))))
    assert str(found[1].value) == "not JSON (Expecting ',' delimiter, character 9)"


def test_hub_name_without_prefix_gets_hint():
    with pytest.raises(DataError, match="is written hub:FinLang/some-set"):
        find_files("FinLang/some-set")


def test_a_folder_that_is_not_there_is_no_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        find_files("datasets/")
    assert "no such file or folder: put files there, or set data.sources=YOUR_FILE, " in str(caught.value)
    assert "hub:" not in str(caught.value)


def test_a_broken_line_is_one_broken_row_with_its_number(tmp_path):
    text = lines(ROWS[:1]) + "{oops}\n" + lines(ROWS[1:])
    found = list(read_rows(write(tmp_path / "x.jsonl", text)))
    assert [row.number for row in found] == [1, 2, 3, 4]
    assert isinstance(found[1].value, BrokenRowError)
    assert [row.value for row in found if not isinstance(row.value, BrokenRowError)] == ROWS


def test_a_broken_first_line_does_not_hide_the_others(tmp_path):
    found = [row.value for row in read_rows(write(tmp_path / "x.jsonl", "{oops}\n" + lines(ROWS)))]
    assert isinstance(found[0], BrokenRowError)
    assert found[1:] == ROWS


def test_a_line_that_is_not_utf_8_is_one_broken_row(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines(ROWS[:1]).encode() + b'{"question": "\xff"}\n' + lines(ROWS[1:]).encode())
    reasons = [row.value.reason for row in read_rows(tmp_path / "x.jsonl") if isinstance(row.value, BrokenRowError)]
    assert reasons == ["not UTF-8"]


def test_a_table_row_with_other_cells_than_the_header_is_broken(tmp_path):
    found = list(read_rows(write(tmp_path / "x.csv", "question,answer\nwhat, now?,1\nfine,2\n")))
    assert isinstance(found[0].value, BrokenRowError)
    assert found[0].value.why == "3 cells where the header has 2"
    assert found[1] == Row(str(tmp_path / "x.csv"), 3, {"question": "fine", "answer": "2"})


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("x.jsonl", lines(ROWS).encode()[:-9], "truncated in row 3"),
        ("x.json", json.dumps(ROWS).encode()[:-9], "truncated JSON"),
        ("x.jsonl", gzip.compress(lines(ROWS).encode(), mtime=0)[:-12], "truncated or damaged gzip"),
        ("x.parquet", b"PAR1 and then nothing", "not a whole Parquet file"),
        ("x.csv", b'question,answer\n"never closed,1\n', "not CSV from line 2"),
        ("x.csv", b'\n\nquestion,answer\n"never closed,1\n', "not CSV from line 4"),
        ("x.csv", b"\nquestion,question\n1,2\n", "row 2: two columns are named 'question'"),
        ("x.csv", b"\n \n", "the file is empty"),
        ("x.csv", b"question,question\n1,2\n", "two columns are named 'question'"),
        ("x.jsonl", b"", "the file is empty"),
        ("x.csv", b"", "the file is empty"),
        ("x.json", b"[]", "the list is empty"),
        ("x.json", b'{"a": 1,\n"b": 2}', "one JSON object"),
        ("x.json", b"question: what?", "neither JSON nor JSON lines"),
    ],
)
def test_a_file_that_cannot_be_read_whole_names_itself_and_why(tmp_path, name, data, why):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value)
    assert why in str(caught.value)


LATIN_1 = "not UTF-8 text (line {}, byte {} of it): save it as UTF-8"


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("x.csv", "größe,answer\nwhat,1\n".encode("latin-1"), LATIN_1.format(1, 3)),
        ("x.csv", "question,answer\nkäme was,1\n".encode("latin-1"), LATIN_1.format(2, 2)),
        ("x.csv", b"question,answer\n" + b"what,1\n" * 9000 + b"\xe9,1\n", LATIN_1.format(9002, 1)),
        ("x.tsv", gzip.compress("größe\tanswer\n".encode("latin-1"), mtime=0), LATIN_1.format(1, 3)),
        ("x.json", '[\n{"question": "käme?"}]'.encode("latin-1"), LATIN_1.format(2, 16)),
        *(
            (name, text.encode(code), "not UTF-8 text but UTF-16: save it as UTF-8")
            for name, text in (
                ("x.csv", "\ufeffquestion,answer\nwhat,1\n"),
                ("x.json", "\ufeff" + json.dumps(ROWS)),
                ("x.jsonl", "\ufeff" + lines(ROWS)),
            )
            for code in ("utf-16-le", "utf-16-be")
        ),
    ],
)
def test_other_encoding_names_line_and_hint(tmp_path, name, data, why):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / name))
    assert str(caught.value) == f"{tmp_path / name}: {why}"
