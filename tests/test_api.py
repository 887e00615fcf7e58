"""The functions of the package that a notebook calls."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fintune
from fintune.errors import ConfigError
from support.paths import ROOT


def test_load_config_takes_a_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text("run:\n  seed: 5\n")
    config = fintune.load_config(file, "adapter.r=4")
    assert (config.run.seed, config.adapter.r, config.run.name) == (5, 4, "small")
    assert fintune.load_config().run.seed == 17
    with pytest.raises(ConfigError):
        fintune.load_config(file, "adapter.rank=4")


def test_run_prepares_and_then_finds_it_up_to_date(tiny_model: Path, tmp_path: Path) -> None:
    from fintune.pipeline.step import Selection

    counts = [f"data.statements.{name}=2" for name in ("train_companies", "eval_companies")]
    config = fintune.load_config(None, f"model.name={tiny_model}", f"run.dir={tmp_path}", "run.name=trial", *counts)
    outcomes = {outcome.step: outcome for outcome in fintune.run(config, Selection(only=("prepare",)))}
    assert outcomes["prepare"].what == "done"
    assert outcomes["train"].what == "skipped"
    assert (tmp_path / "trial" / "prepare" / "manifest.json").is_file()
    again = {outcome.step: outcome for outcome in fintune.run(config, Selection(only=("prepare",)))}
    assert again["prepare"].what == "up to date"
    assert again["prepare"].facts == outcomes["prepare"].facts


def test_importing_fintune_loads_no_library() -> None:
    code = "import sys, fintune; print(*sorted({'pydantic', 'torch', 'rich', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        fintune.nothing  # noqa: B018


def test_every_public_function_is_documented() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    used = set(re.findall(r"\bfintune\.(\w+)\(", text))
    assert set(fintune.__all__) - {"__version__"} <= used
