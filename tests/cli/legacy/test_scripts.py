"""The scripts with the older flags, run as they are documented."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.example_run import records
from support.paths import ROOT

SCRIPTS = ROOT / "scripts"


def run(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    path = tmp_path / "gold.json"
    path.write_text(json.dumps([record.model_dump(mode="json") for record in records(4)]))
    return path


def test_score_finqa_writes_a_row_per_prediction(tmp_path: Path, gold: Path) -> None:
    items = records(4)
    rows = [{"id": item.id, "program": item.qa.program} for item in items[:2]] + [
        {"id": items[2].id, "program": "add("}
    ]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    done = run(
        "score_finqa.py", "--pred_json", tmp_path / "p.json", "--gold_json", gold, "--out_csv", tmp_path / "m.csv"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "66.67%" in done.stdout
    with (tmp_path / "m.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["exe_correct"] for row in written] == ["1", "1", "0"]


def test_score_finqa_loads_no_torch(tmp_path: Path, gold: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps([{"id": records(1)[0].id, "program": "add(1, 2)"}]))
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(SCRIPTS)!r}); "
        f"sys.argv = ['score', '--pred_json', {str(tmp_path / 'p.json')!r}, '--gold_json', {str(gold)!r}]; "
        "runpy.run_module('score_finqa', run_name='__main__'); "
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_preprocess_names_dropped_rows(tmp_path: Path, gold: Path) -> None:
    rows = json.loads(gold.read_text())
    rows[1]["qa"]["program"] = ""
    gold.write_text(json.dumps(rows))
    done = run("preprocess.py", "--input_json", gold, "--output_dataset", tmp_path / "data" / "train")
    assert done.returncode == 0
    assert "3 records, left out 1 no program" in done.stdout
    assert f"{gold}, row 2, id {rows[1]['id']}: qa.program" in done.stderr
    assert (tmp_path / "data" / "train" / "dataset_info.json").is_file()
    strict = run("preprocess.py", "--input_json", gold, "--output_dataset", tmp_path / "other", "--strict")
    assert strict.returncode == 2
    assert "row 2" in strict.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("score_finqa.py", ["--pred_json", "no.json", "--gold_json", "GOLD"], "no.json: no such file"),
        ("score_finqa.py", ["--pred_json", "GOLD", "--gold_json", "no.json"], "no.json: no such file"),
        ("score_finqa.py", ["--gold_json", "GOLD"], "--pred_json"),
        ("preprocess.py", ["--input_json", "no.json", "--output_dataset", "DIR"], "no.json: no such file"),
        ("preprocess.py", ["--input_json", "GOLD", "--output_dataset", "GOLD"], "gold.json exists"),
        ("preprocess.py", ["--input_json", "GOLD"], "--output_dataset"),
    ],
)
def test_mistake_is_one_line_with_status_2(
    tmp_path: Path, gold: Path, name: str, words: list[str], message: str
) -> None:
    places = {"GOLD": str(gold), "DIR": str(tmp_path / "out")}
    done = run(name, *(places.get(word, word) for word in words))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["gold.json"]
