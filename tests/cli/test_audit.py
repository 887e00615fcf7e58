from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fintune.cli.audit import audit_files
from fintune.data.finqa_json import read_finqa
from fintune.errors import DataError, FintuneError
from fintune.evaluation.audit import FINDINGS
from fintune.finqa.page import group_of
from support.paths import ROOT

SHARED = ROOT.parent / "shared" / "finqa"


def row(record_id: str, program: str = "add(1, 2)", exe_ans: float = 3.0) -> dict[str, object]:
    qa = {"question": f"what is {record_id}?", "program": program, "exe_ans": exe_ans, "answer": "3"}
    return {"id": record_id, "pre_text": ["1 and 2 é"], "post_text": [], "table": [["a", "b"]], "qa": qa}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    train, dev = tmp_path / "train.json", tmp_path / "dev.jsonl.gz"
    train.write_text(json.dumps([row("A/1/p-1"), row("A/1/p-2"), row("B/1/p-1"), {"id": "no"}]))
    with gzip.open(dev, "wt") as file:
        file.writelines(json.dumps(each) + "\n" for each in [row("A/1/p-3", exe_ans=4.0), row("C/1/p-1")])
    return [train, dev]


def cli(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fintune.cli.main", "audit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _read(path: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def test_audit_counts_by_file_name(files: list[Path]) -> None:
    done = audit_files(files)
    assert {name: each.num_records for name, each in done.audit.splits.items()} == {"train": 3, "dev": 2}
    assert done.audit.splits["dev"].findings["executes_to_other"] == ("A/1/p-3",)
    assert done.audit.splits["train"].dropped == {"no question": 1}
    assert "train.json, row 4, id no" in done.problems[0]
    (overlap,) = done.audit.overlaps
    assert (overlap.first, overlap.second, overlap.shared["page"].num_second) == ("train", "dev", 1)


def test_audit_prints_tables_and_writes_json(files: list[Path], tmp_path: Path) -> None:
    done = cli(*files, "--json", tmp_path / "audit.json")
    assert done.returncode == 0, done.stderr
    for said in (*FINDINGS.values(), "train and dev share", "A/1/p-3", "dropped: no question"):
        assert said in done.stdout
    assert "row 4" in done.stderr
    told = json.loads((tmp_path / "audit.json").read_text())
    assert told["splits"]["dev"]["findings"]["executes_to_other"] == ["A/1/p-3"]
    assert told["overlaps"][0]["shared"]["report"]["second_ids"] == ["A/1/p-3"]
    assert set(told["kinds"]) == set(told["splits"]["train"]["findings"])


def test_audit_splits_share_nothing(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "splits"
    done = cli(*files, "--write-splits", folder, "--by", "company")
    assert done.returncode == 0, done.stderr
    assert "from another file" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["dev.json", "splits.json", "train.json"]
    new = {name: read_finqa(folder / f"{name}.json", strict=True).records for name in ("train", "dev")}
    assert {name: len(records) for name, records in new.items()} == {"train": 4, "dev": 1}
    groups = [{group_of(each.id, "company") for each in records} for records in new.values()]
    assert not groups[0] & groups[1]
    old = {each.id: each for path in files for each in read_finqa(path).records}
    assert {each.id: each for records in new.values() for each in records} == old
    told = json.loads((folder / "splits.json").read_text())
    assert told["by"] == "company"
    assert told["splits"]["train"]["num_records"] == len(new["train"])


def test_audit_splits_keep_unknown_keys(files: list[Path], tmp_path: Path) -> None:
    rows = json.loads(files[0].read_text())
    rows[0] |= {"table_ori": [["A"]], "filename": "A/1/p"}
    rows[0]["qa"]["steps"] = [{"op": "add1-1", "res": "3"}]
    files[0].write_text(json.dumps(rows))
    audit_files(files, write_splits=tmp_path / "new")
    written = {each["id"]: each for name in ("train", "dev") for each in _read(tmp_path / "new" / f"{name}.json")}
    assert written["A/1/p-1"] == rows[0]


def test_audit_splits_three_files_near_their_sizes(tmp_path: Path) -> None:
    paths = []
    for name, number in (("train", 60), ("dev", 20), ("test", 20)):
        # Every company has pages in each file, more of them in the larger ones.
        items = [row(f"C{k % 20}/{k}/{name}-{k}") for k in range(number)]
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(items))
    done = cli(*paths, "--write-splits", tmp_path / "new", "--by", "company")
    assert done.returncode == 0, done.stderr
    assert "no two of these files share a company" in done.stdout
    assert {name: len(_read(tmp_path / "new" / f"{name}.json")) for name in ("train", "dev", "test")} == {
        "train": 60,
        "dev": 20,
        "test": 20,
    }


def test_audit_refuses_to_overwrite_an_input(files: list[Path]) -> None:
    with pytest.raises(FintuneError, match="would be overwritten"):
        audit_files(files, json=files[0])


def test_audit_splits_overwrite_nothing(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "dev.json").write_text("mine")
    done = cli(*files, "--write-splits", tmp_path / "new")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "dev.json exists: name another folder" in done.stderr
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dev.json"]
    assert (tmp_path / "new" / "dev.json").read_text() == "mine"


def test_audit_refuses_to_split_one_file(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FintuneError, match="needs several files: name the training"):
        audit_files(files[:1], write_splits=tmp_path / "new")
    assert audit_files(files[:1]).audit.overlaps == ()


def test_audit_refuses_two_files_of_one_name(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "train.json.gz"
    twin.write_bytes(gzip.compress(files[0].read_bytes()))
    with pytest.raises(FintuneError, match="would both be called 'train'"):
        audit_files([files[0], twin])


def test_audit_refuses_an_empty_split(files: list[Path], tmp_path: Path) -> None:
    files[1].write_text(json.dumps([row("A/1/p-9")]))
    files[0].write_text(json.dumps([row("A/1/p-1"), row("A/1/p-2")]))
    with pytest.raises(DataError, match=r"split by report, (train|dev) has no records left"):
        audit_files(files, write_splits=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", ["--json", "--write-splits"])
def test_audit_unwritable_output_is_one_line(files: list[Path], tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" if option == "--write-splits" else tmp_path / "none" / "audit.json"
    done = cli(*files, option, place)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert str(place) in done.stderr


def test_audit_strict_stops_at_a_broken_record(files: list[Path]) -> None:
    with pytest.raises(DataError, match="row 4"):
        audit_files(files, strict=True)


def test_audit_needs_a_file() -> None:
    assert cli().returncode == 2


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/finqa beside the repository")
def test_audit_of_finqa_gives_the_figures_of_the_docs() -> None:
    audit = audit_files([SHARED / "train.json.gz", SHARED / "dev.json.gz"]).audit
    for split in audit.splits.values():
        for kind in ("not_in_language", "does_not_execute", "executes_to_other", "operand_not_on_page"):
            assert split.findings[kind] == ()
    shared = audit.overlaps[0].shared
    assert {name: each.num_second for name, each in shared.items()} == {
        "id": 0,
        "page": 0,
        "report": 766,
        "company": 881,
        "page_text": 0,
        "question": 15,
        "near_question": 91,
    }
