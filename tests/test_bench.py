"""The programs that measure run, on something tiny: what they write is read, its times are not."""

from __future__ import annotations

import gzip
import json
import runpy
import sys

import pytest

from support.example_run import records
from support.paths import ROOT

torch = pytest.importorskip("torch")

BENCH = ROOT / "bench"


@pytest.fixture
def finqa(tmp_path):
    rows = []
    for number, record in enumerate(records(5)):
        row = record.model_dump(mode="json")
        rows += [row | {"id": f"P{number}/2010/page_1.pdf-{question}"} for question in (1, 2)]
    (tmp_path / "dev.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    return tmp_path


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def predict_speed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["predict_speed.py", *map(str, words)])
    monkeypatch.syspath_prepend(BENCH)
    runpy.run_path(str(BENCH / "predict_speed.py"), run_name="__main__")


def test_predict_speed_resumes_with_the_same_result(finqa, monkeypatch):
    words = ["--finqa", finqa, "--random", "tiny", "--num", 10, "--piece", 4, "--new-tokens", 3, "--loop-num", 2]
    out = finqa / "out.json"
    predict_speed(monkeypatch, *words, "--out", out, "--minutes", 0)
    first = json.loads(out.read_text())
    assert [piece["num_questions"] for piece in first["pieces"]] == [4]
    predict_speed(monkeypatch, *words, "--out", out)
    found = json.loads(out.read_text())
    assert found["pieces"][0] == first["pieces"][0]
    assert [list(piece)[2] for piece in found["pieces"]] == ["engine", "loop", "engine"]
    assert (found["total_num_questions"], found["total_num_loop_questions"]) == (10, 6)
    assert found["total_num_same_completions"] == 6
    assert found["pieces"][1]["engine"]["num_tokens"] == 3 * 4
    assert found["processor_seconds"]["ratio"] > 0


def test_predict_speed_does_not_mix_two_ways_of_measuring(finqa, monkeypatch):
    words = ["--finqa", finqa, "--random", "tiny", "--num", 2, "--new-tokens", 1, "--out", finqa / "out.json"]
    predict_speed(monkeypatch, *words)
    with pytest.raises(SystemExit, match="holds figures of"):
        predict_speed(monkeypatch, *words, "--batch-size", 3)
