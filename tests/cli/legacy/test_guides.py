"""Every command of the two guides runs as it stands there, but for the model's name."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path

import click
import pytest

from fintune.cli.legacy import finance, finqa
from fintune.data.synthetic import generate
from fintune.export.gguf import llama_cpp_checkout
from support.command import Done, fintune
from support.guide_commands import FINANCE, FINQA, PYTHON, as_meant, as_pasted, found_in
from support.paths import ROOT
from support.tiny import make_tiny_model

pytest.importorskip("torch")

GUIDES = ROOT.parent / "shared" / "guides"


def test_guides_hold_no_other_command():
    if not GUIDES.is_dir():
        pytest.skip("the guides are not beside this checkout")
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(GUIDES.glob("0*.txt"))]
    found = {command for text in texts for command in found_in(text)}
    assert found == {" ".join(as_meant(text)) for text in (*FINANCE.values(), *FINQA.values())}
    assert all(any(line in text for text in texts) for line in PYTHON)


def command_of(name: str) -> click.Command:
    """The command that a script hands to the command line."""
    commands: list[click.Command] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fintune.cli.main.main", lambda command, _name: commands.append(command))
        runpy.run_path(str(ROOT / name), run_name="__main__")
    return commands[0]


def script(words: list[str], folder: Path) -> Done:
    """Run ``python SCRIPT ...`` in this process, in a folder."""
    assert words[0] == "python"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return fintune(*words[2:], command=command_of(words[1]))


class FakeWandb:
    """As much of wandb as training uses."""

    Error = RuntimeError

    def __init__(self) -> None:
        self.logged = {}

    def Settings(self, **settings):  # noqa: N802
        return settings

    def init(self, **_):
        return self

    def log(self, figures, step):
        self.logged[step] = figures

    def finish(self):
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("guide") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The layout of the FinQA guide, with generated pages."""
    root = tmp_path_factory.mktemp("finqa")
    (root / "data").mkdir()
    records = [
        record.model_dump(mode="json")
        for record in generate(6, pages_per_company=1, questions_per_page=1, seed=3, size="small")
    ]
    for name, part in (("train", records[:4]), ("test", records[4:])):
        (root / "data" / f"FinQA_{name}.json").write_text(json.dumps(part), encoding="utf-8")
    return root


def test_finqa_guide_runs(folder, model, monkeypatch):
    import trl

    assert trl.SFTTrainer  # what it imports must not meet the stand-in
    wandb, pushed = FakeWandb(), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("fintune.training.callbacks.check_reporters", lambda _names: None)
    monkeypatch.setattr(finqa, "check_reporters", lambda _names: None)
    monkeypatch.setattr(finqa, "full_repo_name", lambda name: f"ann/{name}")
    monkeypatch.setattr(finqa, "push_files", lambda repo, *_, **__: pushed.append(repo) or f"pushed to {repo}")
    adapter = folder / "models" / "llama-3b-finqa-dora-adapter"
    for name in ("preprocess", "train", "predict, merged", "predict, adapter", "score"):
        if name == "predict, adapter":  # the guide has the adapter lie beside the model that came of it
            adapter.symlink_to(folder / "models" / "llama-3b-finqa-dora")
        words = [str(model) if word.startswith("meta-llama/") else word for word in as_meant(FINQA[name])]
        done = script(words, folder)
        assert done.status == 0, f"{name}: {done.err}"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["use_dora"], config["r"], config["lora_alpha"], config["lora_dropout"]) == (True, 16, 32, 0.05)
    manifest = json.loads((adapter / "run" / "train" / "manifest.json").read_text())
    options = manifest["key"]["options"]
    assert (options["model.quantization"], options["train.dtype"]) == ("nf4", "bfloat16")
    assert pushed == ["ann/llama-3b-finqa-dora"]
    assert wandb.logged
    with (folder / "outputs" / "metrics.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2
    for name in ("merged", "adapter"):
        assert len(json.loads((folder / "outputs" / f"predictions_{name}.json").read_text())) == 2


def test_pasted_comment_stops_the_command(folder, monkeypatch):
    monkeypatch.setattr(finqa, "_data", lambda *_: pytest.fail("training started with a part of the flags"))
    first, rest = as_pasted(FINQA["train"])
    done = script(first, folder)
    assert (done.status, rest[0]) == (2, "--lora_r")
    assert "remove the comment" in done.err
    # Every other command of the guides is one command to a shell, too.
    others = [text for text in (*FINANCE.values(), *FINQA.values()) if text is not FINQA["train"]]
    assert all(len(as_pasted(text)) == 1 and as_pasted(text)[0] == as_meant(text) for text in others)


@pytest.mark.parametrize("name", ["quick start", "places", "hyperparameters", "resume"])
def test_finance_guide_is_understood(name, tmp_path, model, monkeypatch):
    looked_at: list[Path] = []
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "trader_dpo_data.jsonl").write_text(
        '{"prompt": "a?", "chosen": "b", "rejected": "c"}\n', encoding="utf-8"
    )
    monkeypatch.setattr(llama_cpp_checkout, "check_checkout", lambda folder, _kinds: looked_at.append(folder))
    monkeypatch.setattr(finance, "GUIDE_MODEL", "none such")
    monkeypatch.setattr("fintune.util.hub._resolves", lambda _: True)
    words = [str(model) if word.startswith("DSR1/") else word for word in as_meant(FINANCE[name])]
    if "--model_name" not in words:
        words += ["--model_name", str(model)]
    done = script([*words, "--dry_run"], tmp_path)
    assert done.status == 0, done.err
    words = {line.split()[0]: line.split()[1] for line in done.out.splitlines() if line.strip()}
    assert (words["train"], words["export"]) == ("run", "skipped" if name == "resume" else "run")
    assert looked_at == ([Path("llama.cpp")] if name == "quick start" else [])
    assert [path.name for path in tmp_path.iterdir()] == ["datasets"]


def test_requirements_are_the_pinned_packages():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["-r requirements.lock", "-e ."]
    assert (ROOT / "requirements.lock").is_file()


@pytest.mark.parametrize("name", ["preprocess", "train_dora", "train_peft", "inference_fixed", "score_finqa"])
def test_finqa_page_names_every_flag(name):
    page = (ROOT / "docs" / "guide_finqa.md").read_text(encoding="utf-8")
    names = [option.name for option in command_of(f"scripts/{name}.py").params if isinstance(option, click.Option)]
    assert [flag for flag in names if f"`--{flag}`" not in page] == []


@pytest.mark.parametrize("name", ["train", "train_financial_model"])
def test_finance_page_names_every_flag(name):
    page = (ROOT / "docs" / "finance.md").read_text(encoding="utf-8")
    names = [option.name for option in command_of(f"{name}.py").params if isinstance(option, click.Option)]
    assert [flag for flag in names if f"`--{flag}" not in page] == []
