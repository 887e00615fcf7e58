from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fintune.config import Config
from fintune.pipeline.stages.score import score
from support.scored_files import PROGRAMS, run_row, text_row, write_gold


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    return write_gold(tmp_path)


def test_score_stage_writes_both_files(tmp_path: Path, gold: Path) -> None:
    folder = tmp_path / "score"
    folder.mkdir()
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(run_row(name)) + "\n" for name in PROGRAMS))
    facts = score(Config(), {"prepare": tmp_path, "predict/base": tmp_path}, folder, kind="base")
    assert (facts["num_predictions"], facts["execution_accuracy"]) == (3, 1.0)
    assert sorted(path.name for path in folder.iterdir()) == ["score.csv", "score.json"]


def test_score_stage_summary_has_no_program_rate(tmp_path: Path, gold: Path) -> None:
    for name in ("predict", "prepare", "score"):
        (tmp_path / name).mkdir()
    shutil.copy(gold, tmp_path / "prepare" / "gold.json")
    rows = [text_row("a"), {"id": "b", "program": ""}, {"id": "c", "program": ""}]
    (tmp_path / "predict" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"predict/base": tmp_path / "predict", "prepare": tmp_path / "prepare"}
    facts = score(Config(), inputs, tmp_path / "score", kind="base")
    assert facts["summary"].endswith(", invalid 0.00%, no program 66.67% of 3")


def test_score_stage_summary_has_the_warning_of_prepare(tmp_path: Path, gold: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"eval_warning": "2 questions are trained on"}))
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(run_row(name)) + "\n" for name in PROGRAMS))
    facts = score(Config(), {"prepare": tmp_path, "predict/base": tmp_path}, tmp_path, kind="base")
    assert "2 questions are trained on" in facts["summary"]
