from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fintune.config import Config
from fintune.errors import ArtifactError
from fintune.pipeline.stages.report import collect, report
from support.browser import needs_chromium, opened
from support.example_run import records, write_run

CONFIG = Config.model_validate({"run": {"name": "demo"}})


@pytest.fixture
def inputs(tmp_path) -> dict[str, Path]:
    return write_run(tmp_path / "run", CONFIG, records(6))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "report").mkdir()
    return tmp_path / "report"


def test_one_file_is_written_and_the_facts_tell_its_size(inputs, folder):
    facts = report(CONFIG, inputs, folder)
    assert [path.name for path in folder.iterdir()] == ["index.html"]
    assert facts["page_bytes"] == (folder / "index.html").stat().st_size
    assert facts["num_kinds"] == 5
    assert facts["num_examples"] == 6


def test_figures_come_from_the_score_and_sizes_from_the_files(inputs):
    page = collect(CONFIG, inputs)
    by_kind = {results.kind: results for results in page.scored}
    assert list(by_kind) == ["base", "adapter", "merged", "F16", "Q4_K_M"]
    assert [by_kind[kind].weights_bytes for kind in by_kind] == [None, 19_500, 269_000, 270_000, 105_000]
    assert by_kind["adapter"].seconds == pytest.approx(6 * 0.31)
    assert page.token_names[7] == " t7"
    assert page.num_cut["ACME2/2010/page_1.pdf-1"] == 2


@pytest.mark.parametrize(
    "steps", [[], ["prepare"], ["train"], ["prepare", "predict/base"], ["prepare", "predict/F16", "score/F16"]]
)
def test_any_subset_of_stages_makes_a_page(inputs, folder, steps):
    report(CONFIG, {step: inputs[step] for step in steps}, folder)
    assert (folder / "index.html").read_text(encoding="utf-8").rstrip().endswith("</html>")


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ("prepare", "report.json"),
        ("prepare", "gold.json"),
        ("prepare", "eval.jsonl"),
        ("train", "metrics.jsonl"),
        ("predict/F16", "predictions.jsonl"),
        ("score/F16", "score.json"),
        ("score/F16", "score.csv"),
        ("merge", "manifest.json"),
    ],
)
def test_a_broken_file_names_its_path_and_the_step_to_redo(inputs, folder, step, name):
    path = inputs[step] / name
    path.write_bytes(b'{"torn": \xff')
    with pytest.raises(ArtifactError) as caught:
        report(CONFIG, inputs, folder)
    assert str(path) in str(caught.value)
    assert f"--redo {step} " in str(caught.value)
    assert not list(folder.iterdir())


def test_a_missing_file_of_a_finished_stage_is_named(inputs, folder):
    (inputs["train"] / "metrics.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl"):
        report(CONFIG, inputs, folder)


def test_the_same_run_gives_the_same_page(inputs, folder):
    report(CONFIG, inputs, folder)
    first = (folder / "index.html").read_bytes()
    report(CONFIG, inputs, folder)
    assert (folder / "index.html").read_bytes() == first


def test_importing_the_stage_loads_nothing_heavy():
    heavy = ("torch", "transformers", "datasets", "matplotlib")
    code = f"import sys, fintune.pipeline.stages.report; sys.exit(any(name in sys.modules for name in {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0


@needs_chromium
def test_browser_opens_an_example_without_an_error(inputs, folder, tmp_path):
    report(CONFIG, inputs, folder)
    shown = opened(folder / "index.html", "example:ACME1/2010/page_1.pdf-1", tmp_path / "profile")
    assert "1 of 6 examples" in shown
    assert re.search(r'<td class="used( read)?"[^>]*>\$ 141</td>', shown)
    assert "names no evidence" in shown
    assert '<td class="mono num">34</td>' in shown
