"""What docs/finance.md quotes is what the program says: every trouble of its table is brought about."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fintune.cli.legacy import finance as cli_finance
from support.checkout_stand_in import make_checkout
from support.command import fintune
from support.paths import ROOT
from support.tiny import make_tiny_model

torch = pytest.importorskip("torch")

PAGE = ROOT / "docs" / "finance.md"
ROWS = {
    cells[0].strip(): re.search(r"`(.+)`", cells[1])[1]
    for line in PAGE.read_text(encoding="utf-8").split("## Troubleshooting")[1].splitlines()
    if line.startswith("| ") and (cells := line.strip("| ").split(" | ")) and "`" in line
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("docs") / "model")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    rows = "".join(f'{{"prompt": "size {n}?", "chosen": "{n} bp", "rejected": "all"}}\n' for n in range(8))
    (tmp_path / "datasets" / "trader_dpo_data.jsonl").write_text(rows, encoding="utf-8")
    return tmp_path


def told(model: Path, *words: str, investopedia: str = "none") -> str:
    fixed = ("--model_name", str(model), "--investopedia", investopedia)
    done = fintune(*fixed, *words, command=cli_finance.pipeline_command())
    assert done.status == 2, done.err
    return done.err.splitlines()[-1].removeprefix("fintune: ")


def tools(folder: Path, *, converter: str | None = None, quantizer: str | None = None) -> tuple[str, str]:
    """The flags that name a checkout with these tools."""
    return "--llama_cpp_path", make_checkout(folder, converter=converter, quantizer=quantizer).name


def out_of_memory(here: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB.")

    monkeypatch.setattr("fintune.pipeline.stages.train._train", fail)
    return told(model)


def failed_download(here: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def fail(*_: object) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr("fintune.data.hub._load_once", fail)
    monkeypatch.setattr("fintune.data.hub.read_licence", lambda *_: "")
    monkeypatch.setattr("fintune.data.hub.PAUSES", (0.0, 0.0, 0.0))
    return told(model, investopedia="hub:FinLang/x")


def changed_flag(here: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    words = ("--skip_merge", "--skip_quantization", "--max_seq_length", "256", "--extra_train_args", "--max_steps=1")
    fixed = ("--model_name", str(model), "--investopedia", "none", *words)
    done = fintune(*fixed, command=cli_finance.pipeline_command())
    assert done.status == 0, done.err
    return told(model, *words, "--learning_rate", "2e-5")


def file_in_the_way(here: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (here / "mine.gguf").write_text("mine", encoding="utf-8")
    return told(model, "--gguf_q4_path", "mine.gguf")


USAGE = "print('usage')"
TROUBLES = {
    "CUDA out of memory": out_of_memory,
    "no checkout": lambda here, model, _: told(model, "--llama_cpp_path", "nowhere"),
    "convert script missing": lambda here, model, _: told(model, *tools(here / "a")),
    "convert script does not run": lambda here, model, _: told(
        model, *tools(here / "b", converter="import nothing_such", quantizer=f"#!{sys.executable}\n{USAGE}")
    ),
    "llama-quantize not found": lambda here, model, _: told(model, *tools(here / "c", converter=USAGE)),
    "llama-quantize does not run": lambda here, model, _: told(
        model, *tools(here / "d", converter=USAGE, quantizer="#!/nowhere/such\n")
    ),
    "dataset download fails": failed_download,
    "a changed flag": changed_flag,
    "a file in the way": file_in_the_way,
    "nothing to rerun on": lambda here, model, _: told(model, "--skip_dataset_prep"),
    "no data": lambda here, model, _: told(model, "--dataset_folder", "nowhere"),
}


def test_the_table_and_this_test_hold_the_same_troubles():
    assert set(ROWS) == set(TROUBLES)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_trouble_is_told_in_the_words_of_the_page(trouble, here, model, monkeypatch):
    pattern = ".+".join(re.escape(part) for part in ROWS[trouble].split("..."))
    said = TROUBLES[trouble](here, model, monkeypatch)
    assert re.fullmatch(pattern, said), said


def test_the_page_names_every_flag_of_both_commands_with_its_default():
    text = PAGE.read_text(encoding="utf-8")
    for command in (cli_finance.pipeline_command(), cli_finance.train_command()):
        for option in command.params:
            assert f"`--{option.name}" in text, option.name
