"""FinQA files as dataset folders: written whole or not at all, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fintune.cli.legacy.finqa_data import finqa_file, preprocess, split_folders
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


def test_preprocess_columns(source: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    done = preprocess(source, tmp_path / "out")
    rows = load_from_disk(str(tmp_path / "out"))
    assert len(done.records) == len(rows) == 3
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


def test_preprocess_records_are_a_finqa_file(source: Path, tmp_path: Path) -> None:
    preprocess(source, tmp_path / "out")
    assert read_finqa(tmp_path / "out" / "records.jsonl").records == read_finqa(source).records


def test_preprocess_replaces_its_folder(source: Path, tmp_path: Path) -> None:
    preprocess(source, tmp_path / "out")
    write(source, records(1))
    assert len(preprocess(source, tmp_path / "out").records) == 1
    assert len(read_finqa(tmp_path / "out" / "records.jsonl").records) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gold.json", "out"]


def test_preprocess_keeps_a_foreign_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FintuneError, match="out exists"):
        preprocess(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_preprocess_keeps_a_note_in_its_folder(source: Path, tmp_path: Path) -> None:
    preprocess(source, tmp_path / "out")
    (tmp_path / "out" / "cache-0a1b.arrow").write_text("")
    assert len(preprocess(source, tmp_path / "out").records) == 3
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(FintuneError, match="out exists"):
        preprocess(source, tmp_path / "out")
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"


def test_preprocess_reads_its_own_records(source: Path, tmp_path: Path) -> None:
    before = preprocess(source, tmp_path / "out").records
    assert preprocess(tmp_path / "out" / "records.jsonl", tmp_path / "out").records == before


def test_preprocess_failure_keeps_the_old_dataset(source: Path, tmp_path: Path, monkeypatch) -> None:
    preprocess(source, tmp_path / "out")
    monkeypatch.setattr("fintune.cli.legacy.finqa_data._save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preprocess(source, tmp_path / "out")
    assert len(read_finqa(tmp_path / "out" / "records.jsonl").records) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gold.json", "out"]


def test_preprocess_drops_a_bad_record(source: Path, tmp_path: Path) -> None:
    rows = json.loads(source.read_text())
    del rows[1]["qa"]["exe_ans"]
    source.write_text(json.dumps(rows))
    done = preprocess(source, tmp_path / "out")
    assert len(done.records) == 2
    assert dict(done.dropped) == {"bad exe_ans": 1}
    assert "row 2" in done.problems[0]
    with pytest.raises(DataError, match="row 2"):
        preprocess(source, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_finqa_file_from_columns(source: Path, tmp_path: Path) -> None:
    from datasets import DatasetDict, load_from_disk

    records = preprocess(source, tmp_path / "out").records
    rows = load_from_disk(str(tmp_path / "out"))
    DatasetDict({"train": rows, "dev": rows}).save_to_disk(str(tmp_path / "dict"))
    train, evaluation = split_folders(tmp_path / "dict")
    assert (train.name, evaluation.name) == ("train", "dev")
    copy = finqa_file(train, tmp_path / "copy" / "train.jsonl")
    read = read_finqa(copy).records
    assert [record.qa.exe_ans for record in read] == [record.qa.exe_ans for record in records]
    assert [(item.id, item.table, item.pre_text, item.qa.program) for item in read] == [
        (item.id, item.table, item.pre_text, item.qa.program) for item in records
    ]


def test_finqa_file_of_other_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}).save_to_disk(str(tmp_path / "pairs"))
    assert finqa_file(tmp_path / "pairs", tmp_path / "x.jsonl") is None
    assert not (tmp_path / "x.jsonl").exists()


def test_split_folders_refuses_other_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(DataError, match=name):
            split_folders(tmp_path / name)
