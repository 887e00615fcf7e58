"""``fintune init`` and ``fintune config``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fintune.config.load import load
from fintune.config.yaml_file import TEMPLATES
from support.command import fintune


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("template", TEMPLATES)
def test_init_writes_a_loadable_file(template: str, folder: Path) -> None:
    done = fintune("init", template)
    assert (done.status, done.err) == (0, "")
    written = folder / f"{template}.yaml"
    assert load(written).config.run.name == template
    assert f"configs/{template}.yaml" not in written.read_text()
    assert f"fintune run {template}.yaml" in written.read_text()


def test_init_never_overwrites(folder: Path) -> None:
    (folder / "mine.yaml").write_text("train: {}\n")
    done = fintune("init", "chat", "--out", "mine.yaml")
    assert (done.status, done.err) == (2, "fintune: mine.yaml already exists: choose another file with --out\n")
    assert (folder / "mine.yaml").read_text() == "train: {}\n"


def test_init_into_a_missing_folder_is_one_line() -> None:
    assert "its folder does not exist" in fintune("init", "chat", "--out", "no/chat.yaml").err


def test_missing_template_hints_at_init(folder: Path) -> None:
    done = fintune("run", "configs/chat.yaml")
    assert "`fintune init chat --out configs/chat.yaml`" in done.err
    assert "fintune init chat|finqa|preference" in fintune("run", "other.yaml").err


def test_config_show_changed_lists_only_changes() -> None:
    lines = fintune("config", "show", "mine.yaml", "adapter.r=8", "adapter.lora_alpha=32").out
    assert lines == ""
    Path("mine.yaml").write_text("train:\n  learning_rate: 1e-5\n")
    done = fintune("config", "show", "--changed", "mine.yaml", "adapter.r=8", "adapter.lora_alpha=32")
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == ["run.name", "adapter.r", "train.learning_rate"]


def test_python_m_fintune_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fintune", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == fintune("--version").out
