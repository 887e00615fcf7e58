"""The built-in model once through the whole chain on the official files, with few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fintune.evaluation.agreement import compare_predictions
from fintune.records import Prediction
from support.command import fintune_process
from support.paths import ROOT

REPO = ROOT
FINQA = REPO.parent / "shared" / "finqa"
KINDS = ("base", "adapter", "merged", "F16", "Q4_K_M")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FINQA / "train.json.gz").is_file(), reason="../shared/finqa holds the official files"),
]


def test_the_built_in_model_goes_through_every_stage(builtin_model, tmp_path):
    done = fintune_process(
        *("run", REPO / "configs" / "finqa.yaml", f"run.dir={tmp_path}"),
        *(f"data.train={FINQA / 'train.json.gz'}", f"data.eval={FINQA / 'dev.json.gz'}"),
        *(
            "data.max_train_samples=12",
            "data.max_eval_samples=2",
            "prompt.max_length=384",
            "train.max_steps=3",
            "train.per_device_train_batch_size=4",
        ),
        *("predict.max_new_tokens=40", "replay.num_examples=2"),
    )
    assert done.status == 0, done.err
    run = tmp_path / "finqa"
    rows = [line.split()[:2] for line in done.out.splitlines() if line]
    assert rows[1:-1] == [[kind, "2"] for kind in KINDS]
    assert (run / "report" / "index.html").is_file()

    report = json.loads((run / "prepare" / "report.json").read_text())
    assert report["train"]["num_examples"] == 12
    assert report["train"]["prompt_tokens"]["max"] <= 384
    losses = [json.loads(line)["loss"] for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]

    said = {kind: _predictions(run, kind) for kind in KINDS}
    for one, other in (("adapter", "merged"), ("merged", "F16")):
        agreement = compare_predictions(said[one], said[other])
        assert [each for each in agreement.differences if not each.near_tie] == [], f"{one} and {other}"


def _predictions(run: Path, kind: str) -> list[Prediction]:
    lines = (run / "predict" / kind / "predictions.jsonl").read_text().splitlines()
    return [Prediction.model_validate_json(line) for line in lines]
