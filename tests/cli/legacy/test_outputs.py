"""Results at the paths of the flags: nothing of the user's is replaced, and nothing old is left."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from fintune.cli.legacy import finance, outputs
from fintune.cli.legacy.outputs import Output, check, replaces
from fintune.errors import ArtifactError, ConfigError, ResourceError
from fintune.pipeline.step import Step
from support.command import fintune

ONE = {"config.json": "one", "model.safetensors": "weights", "chat_template.jinja": "template"}
SHARDS = {"config.json": "two", "model-1-of-2.safetensors": "w", "model-2-of-2.safetensors": "w"} | {
    "model.safetensors.index.json": "index"
}


def write(folder: Path, files: dict[str, str]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in {**files, "manifest.json": "{}"}.items():
        (folder / name).write_text(text)
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def merged(tmp_path: Path, *, is_copy: bool = False) -> Output:
    return Output("--merged_model_dir", tmp_path / "merged", "merge", tmp_path / "run" / "merge", is_copy=is_copy)


def gguf(tmp_path: Path, name: str = "a.gguf") -> Output:
    return Output("--gguf_q4_path", tmp_path / name, "export", tmp_path / "run" / "export" / "a.gguf", is_folder=False)


def remake(output: Output, files: dict[str, str]) -> None:
    """Run the output's stage again: its new result replaces the old one when it is complete."""
    step = Step("merge", (), (), lambda *_: {}, lambda _: {}, lambda _: 0)
    replaces(step, [output]).run(None, {}, None)
    write(output.source, files)


@pytest.mark.parametrize("is_copy", [True, False])
def test_output_holds_one_result(tmp_path, is_copy):
    output = merged(tmp_path, is_copy=is_copy)
    write(output.source, ONE)
    output.write()
    assert texts(output.path) == ONE
    assert (output.path / "config.json").samefile(output.source / "config.json") is not is_copy
    (output.path / "notes.txt").write_text("mine")
    for files in (SHARDS, ONE):
        remake(output, files)
        check([output], tmp_path / "run", tmp_path / "data")
        output.write()
        assert texts(output.path) == {**files, "notes.txt": "mine"}


def test_changed_file_is_kept(tmp_path):
    output = merged(tmp_path, is_copy=True)
    write(output.source, ONE)
    output.write()
    (output.path / "config.json").write_text("mine")
    with pytest.raises(ConfigError, match="--merged_model_dir"):
        check([output], tmp_path / "run", tmp_path / "data")
    remake(output, SHARDS)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        output.write()
    assert (output.path / "config.json").read_text() == "mine"
    output.write(overwrite=True)
    assert texts(output.path) == SHARDS


@pytest.mark.parametrize("number", range(1, 5))
def test_interrupted_write_is_completed(tmp_path, monkeypatch, number):
    output, calls = merged(tmp_path), []
    write(output.source, ONE)
    output.write()
    remake(output, SHARDS)
    real = Path.replace

    def stop(path: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(path, to)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        output.write()
    monkeypatch.undo()
    # Libraries load no folder without this file.
    assert not (output.path / "config.json").exists()
    check([output], tmp_path / "run", tmp_path / "data")
    output.write()
    assert texts(output.path) == SHARDS


def test_full_disk_leaves_no_part(tmp_path, monkeypatch):
    def full(_: Path, part: Path, *, is_copy: bool) -> None:
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    output = merged(tmp_path)
    write(output.source, ONE)
    monkeypatch.setattr(outputs, "_copy_or_link", full)
    with pytest.raises(ResourceError, match=f"{tmp_path}/merged/chat_template.jinja"):
        output.write()
    assert texts(output.path) == {}


def test_other_disk_gets_a_copy(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    output = gguf(tmp_path)
    output.source.parent.mkdir(parents=True)
    output.source.write_text("weights")
    monkeypatch.setattr(os, "link", refuse)
    output.write()
    assert output.path.read_text() == "weights"
    assert not output.path.samefile(output.source)
    check([output], tmp_path / "run", tmp_path / "data")


def test_two_sources_of_one_folder_are_not_foreign(tmp_path):
    adapter = Output("--out", tmp_path / "lora", "train", write(tmp_path / "a", {"adapter_config.json": "{}"}))
    tokenizer = Output("--out", tmp_path / "lora", "train", write(tmp_path / "b", {"tokenizer.json": "{}"}))
    for output in (adapter, tokenizer):
        output.write()
    check([adapter, tokenizer], tmp_path / "run", tmp_path / "data")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--model_name base --merged_model_dir ./base/", "--merged_model_dir base"),
        ("--model_name base --lora_output_dir base", "--lora_output_dir base"),
        ("--merged_model_dir datasets", "--merged_model_dir datasets"),
        ("--lora_output_dir datasets/out", "--lora_output_dir datasets/out"),
        ("--merged_model_dir financial_lora/run/merge", "--merged_model_dir financial_lora/run/merge"),
        ("--gguf_q4_path financial_lora/run/x.gguf", "--gguf_q4_path financial_lora/run/x.gguf"),
        ("--merged_model_dir financial_lora", "--merged_model_dir financial_lora"),
        ("--gguf_fp16_path a.gguf --gguf_q4_path ./a.gguf", "--gguf_fp16_path a.gguf"),
        ("--gguf_q4_path out --merged_model_dir out/merged", "--gguf_q4_path out"),
        ("--gguf_q4_path .", "--gguf_q4_path ."),
        ("--gguf_q4_path base", "--gguf_q4_path base"),
        ("--gguf_q4_path mine.gguf", "--gguf_q4_path mine.gguf"),
        ("--gguf_fp16_path dangling.gguf", "--gguf_fp16_path dangling.gguf"),
        ("--merged_model_dir mine.gguf", "--merged_model_dir mine.gguf"),
        ("--gguf_q4_path mine.gguf/x.gguf", "--gguf_q4_path mine.gguf/x.gguf"),
        ("--merged_model_dir other", "--merged_model_dir other"),
        ("--lora_output_dir theirs", "--lora_output_dir theirs"),
    ],
)
def test_output_that_would_lose_something_is_refused(here, words, flag):
    for name in ("base", "other"):
        write(here / name, ONE)
    write(here / "theirs", {"adapter_config.json": "{}", "run.log": ""})
    (here / "mine.gguf").write_text("mine")
    (here / "dangling.gguf").symlink_to("nowhere")
    before = {path: path.is_file() and path.read_bytes() for path in here.rglob("*")}
    fixed = ("--model_name", "builtin:smollm2-135m", "--investopedia", "none", "--dry_run")
    done = fintune(*fixed, *words.split(), command=finance.PIPELINE)
    assert done.status == 2, done.err
    assert flag in done.err.splitlines()[-1]
    assert {path: path.is_file() and path.read_bytes() for path in here.rglob("*")} == before


def test_sealed_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "sealed")
    (tmp_path / "sealed").mkdir()
    with pytest.raises(ConfigError, match="--gguf_q4_path"):
        check([gguf(tmp_path, "sealed/a/b.gguf")], tmp_path / "run", tmp_path / "data")


def test_skipped_stage_has_no_output(here):
    words = (
        "--merged_model_dir",
        "financial_lora",
        "--skip_merge",
        "--gguf_q4_path",
        "datasets",
        "--skip_quantization",
    )
    fixed = ("--model_name", "builtin:smollm2-135m", "--investopedia", "none", "--dry_run")
    done = fintune(*fixed, *words, command=finance.PIPELINE)
    assert done.status == 0, done.err
