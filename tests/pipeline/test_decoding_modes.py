"""A run that measures a tiny model in two decoding modes: steps, manifests and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fintune.finqa.parse import parse
from fintune.manifest import Manifest
from fintune.pipeline.run_folder import overrides_of
from fintune.records import Prediction
from support.command import Done, fintune
from support.example_run import records

pytest.importorskip("torch")

BOTH = "predict.constrain=[none, page]"
ONLY = [word for verb in ("prepare", "predict", "score") for word in ("--only", verb)]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path):
    config = tmp_path / "modes.yaml"
    config.write_text(
        f"model: {{name: {tiny_model}}}\n"
        "data: {source: 'builtin:statements', statements: {train_companies: 1, eval_companies: 1, "
        "pages_per_company: 1, questions_per_page: 3, size: small}}\n"
        "prompt: {max_length: 512}\n"
        "predict: {models: [base], max_new_tokens: 6, threads: 1}\n"
    )

    def act(*words: object) -> Done:
        return fintune("run", config, f"run.dir={tmp_path / 'runs'}", *words)

    act.folder = tmp_path / "runs" / "modes"
    return act


def manifest(folder: Path, step: str) -> Manifest:
    return Manifest.model_validate_json((folder / step / "manifest.json").read_bytes())


def test_run_adds_a_second_mode_without_rerunning_the_first(run) -> None:
    assert run(*ONLY).status == 0
    before = (run.folder / "predict/base/manifest.json").read_bytes()
    done = run(BOTH, *ONLY)
    assert done.status == 0, done.err
    assert (run.folder / "predict/base/manifest.json").read_bytes() == before
    found = {mode: manifest(run.folder, f"predict/base{mode}") for mode in ("", "+page")}
    assert found["+page"].key.options == {**found[""].key.options, "predict.constrain": "page"}
    assert found["+page"].facts["num_unparsable"] == 0
    lines = (run.folder / "predict/base+page/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        parse(Prediction.model_validate_json(line).program)
    assert manifest(run.folder, "score/base+page").facts["num_predictions"] == 3
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[1][:3] == ["model", "decoding", "n"]
    assert [line[1] for line in lines if line[:1] == ["base"] and line[2] == "3"] == ["none", "page"]
    assert run("predict.constrain=none", *ONLY, "--dry-run").out.count("up to date") == 3
    # The mode of a folder does not depend on the order in which its steps are read.
    assert 'predict.constrain="none"' in overrides_of(run.folder)


def test_run_selects_one_mode_by_its_step_name(run) -> None:
    assert run(BOTH, "--only", "prepare", "--only", "predict/base+page").status == 0
    assert [path.name for path in (run.folder / "predict").iterdir()] == ["base+page"]
    told = run(BOTH, *ONLY, "--redo", "predict/base+page", "--dry-run").out
    assert "predict/base+page  rerun, as asked" in told.replace("   ", "  ")
    told = run(BOTH, *ONLY, "--skip", "predict/base", "--skip", "score/base", "--dry-run").out.splitlines()
    assert sum("up to date" in line for line in told) == 2
    done = run(BOTH, "--only", "predict/base+pgae")
    assert (done.status, "did you mean predict/base+page?" in done.err) == (2, True)


def test_predict_file_uses_the_first_mode(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(json.dumps([each.model_dump(mode="json") for each in records(2)]))
    words = ["--model", tiny_model, "--data", tmp_path / "dev.json", "--out", tmp_path / "out.json"]
    done = fintune("predict", *words, "predict.constrain=[page, none]", "predict.max_new_tokens=6")
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "out.manifest.json").read_text())["options"]["predict"]["constrain"] == "page"
    for row in json.loads((tmp_path / "out.json").read_text()):
        parse(row["program"])


def test_run_stops_if_the_first_mode_changed(run) -> None:
    assert run(BOTH, *ONLY).status == 0
    done = run("predict.constrain=[page, none]", *ONLY)
    assert done.status == 2
    assert 'predict.constrain was "none" and is now "page"' in done.err
