from __future__ import annotations

import json
from pathlib import Path

import pytest

from fintune.cli.legacy.preprocess import preprocess
from fintune.data.finqa_json import read_finqa
from fintune.errors import DataError, FintuneError
from fintune.records import FinQARecord
from support.example_run import records


def write(path: Path, items: list[FinQARecord]) -> Path:
    path.write_text(json.dumps([item.model_dump(mode="json") for item in items]))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    yes = records(3)[2]
    yes = yes.model_copy(update={"qa": yes.qa.model_copy(update={"program": "greater(2, 1)", "exe_ans": "yes"})})
    return write(tmp_path / "gold.json", [*records(2), yes])


def test_load_from_disk_gives_pages_answers_and_conversations(source: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    done = preprocess(source, tmp_path / "out")
    rows = load_from_disk(str(tmp_path / "out"))
    assert done.num_records == len(rows) == 3
    first, second, third = rows
    item = records(1)[0]
    assert (first["id"], first["question"], first["program"]) == (item.id, item.qa.question, item.qa.program)
    assert [tuple(cells) for cells in first["table"]] == list(item.table)
    assert (tuple(first["pre_text"]), tuple(first["post_text"])) == (item.pre_text, item.post_text)
    assert float(first["exe_ans"]) == item.qa.exe_ans
    assert (first["evidence"], second["evidence"], third["exe_ans"]) == (["table_1"], None, "yes")
    # Derived evidence stands in a column of its own, and only where nothing was annotated.
    assert (first["derived_evidence"], second["derived_evidence"]) == (None, ["table_1"])
    assert [turn["role"] for turn in first["prompt"]] == ["system", "user"]
    assert "revenue | 2010: 130 | 2009: 100" in first["prompt"][-1]["content"]
    assert first["prompt"][-1]["content"].rstrip().endswith(item.qa.question)
    assert first["completion"] == [{"role": "assistant", "content": item.qa.program}]


def test_the_records_beside_are_a_finqa_file(source: Path, tmp_path: Path) -> None:
    preprocess(source, tmp_path / "out")
    assert read_finqa(tmp_path / "out" / "records.jsonl").records == read_finqa(source).records


def test_a_folder_of_ours_is_replaced_and_nothing_else_remains(source: Path, tmp_path: Path) -> None:
    preprocess(source, tmp_path / "out")
    write(source, records(1))
    assert preprocess(source, tmp_path / "out", system="").num_records == 1
    assert len(read_finqa(tmp_path / "out" / "records.jsonl").records) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gold.json", "out"]


def test_a_folder_with_anything_else_is_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FintuneError, match="more than a dataset that this command wrote"):
        preprocess(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_note_that_was_put_into_a_dataset_is_kept(source: Path, tmp_path: Path) -> None:
    preprocess(source, tmp_path / "out")
    (tmp_path / "out" / "cache-0a1b.arrow").write_text("")
    assert preprocess(source, tmp_path / "out").num_records == 3
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(FintuneError, match="holds more than"):
        preprocess(source, tmp_path / "out")
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"


def test_a_file_in_the_folder_that_would_be_replaced_is_refused(source: Path, tmp_path: Path) -> None:
    preprocess(source, tmp_path / "out")
    with pytest.raises(FintuneError, match=r"records\.jsonl: stands in the folder that would be replaced"):
        preprocess(tmp_path / "out" / "records.jsonl", tmp_path / "out")


def test_a_failure_half_way_leaves_the_former_dataset(source: Path, tmp_path: Path, monkeypatch) -> None:
    preprocess(source, tmp_path / "out")
    monkeypatch.setattr("fintune.cli.legacy.preprocess._save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preprocess(source, tmp_path / "out")
    assert len(read_finqa(tmp_path / "out" / "records.jsonl").records) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gold.json", "out"]


def test_a_bad_record_is_left_out_with_its_row_unless_strict(source: Path, tmp_path: Path) -> None:
    rows = json.loads(source.read_text())
    del rows[1]["qa"]["exe_ans"]
    source.write_text(json.dumps(rows))
    done = preprocess(source, tmp_path / "out")
    assert done.num_records == 2
    assert dict(done.dropped) == {"bad exe_ans": 1}
    assert "row 2" in done.problems[0]
    with pytest.raises(DataError, match="row 2"):
        preprocess(source, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()
