"""Where results go: refused before any work where that loses something, laid out so that nothing old is left."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest

from fintune.cli.legacy import finance as cli_finance
from fintune.cli.legacy import output_checks as cli_finance_places
from fintune.cli.legacy import outputs as cli_finance_files
from fintune.cli.legacy.output_checks import Place
from fintune.cli.legacy.outputs import lay_out, lay_out_adapter, modelfile, place
from fintune.cli.legacy.owned_files import NAME, Record
from fintune.config.load import load
from fintune.errors import ArtifactError, ConfigError, ResourceError
from fintune.manifest import Key, Manifest
from support.command import fintune

ONE = {"config.json": "one", "model.safetensors": "weights", "chat_template.jinja": "template"}
SHARDS = {"config.json": "two", "model-1-of-2.safetensors": "w", "model-2-of-2.safetensors": "w"} | {
    "model.safetensors.index.json": "index"
}


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**files, "manifest.json": "{}"}.items():
        (folder / name).write_text(text)
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != NAME}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "datasets", {})
    (tmp_path / "datasets" / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return tmp_path


@pytest.mark.parametrize("link", [True, False])
def test_a_folder_holds_one_result_whatever_lay_there_before(tmp_path, link):
    target = tmp_path / "merged"
    lay_out(write(tmp_path / "one", ONE), target, kind="merged", link=link)
    (target / "notes.txt").write_text("mine")
    shutil.rmtree(tmp_path / "one")
    lay_out(write(tmp_path / "two", SHARDS), target, kind="merged", link=link)
    assert texts(target) == {**SHARDS, "notes.txt": "mine"}
    lay_out(write(tmp_path / "three", ONE), target, kind="merged", link=link)
    assert texts(target) == {**ONE, "notes.txt": "mine"}


def test_what_the_user_put_in_the_place_of_a_file_is_kept(tmp_path):
    target = tmp_path / "merged"
    lay_out(write(tmp_path / "one", ONE), target, kind="merged", link=True)
    (target / "chat_template.jinja").unlink()
    (target / "chat_template.jinja").write_text("mine")
    lay_out(write(tmp_path / "two", SHARDS), target, kind="merged", link=True)
    assert texts(target) == {**SHARDS, "chat_template.jinja": "mine"}
    with pytest.raises(ArtifactError, match=r"chat_template.jinja is in the way: .* move it elsewhere"):
        lay_out(write(tmp_path / "one", ONE), target, kind="merged", link=True)
    assert texts(target)["chat_template.jinja"] == "mine"


def laid_out_and_copied(tmp_path: Path) -> Path:
    write(tmp_path / "made", {"tokenizer.json": "ours", "vocab.json": "ours"})
    for name in ("vocab.json", "tokenizer.json"):
        place(tmp_path / "made" / name, tmp_path / "one" / name, kind="tokenizer", made_from="x", link=False)
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    for path in (tmp_path / "two").iterdir():
        os.utime(path, ns=(1, 1))
    return tmp_path / "two"


def test_a_folder_copied_without_its_times_is_still_ours_and_what_was_changed_there_is_not(tmp_path):
    copy = laid_out_and_copied(tmp_path)
    assert Record(copy).is_whole("tokenizer", "x", "tokenizer.json")
    (copy / "vocab.json").write_text("mine")
    assert Record(copy).owned("tokenizer") == [copy / "tokenizer.json"]
    place(tmp_path / "made" / "tokenizer.json", copy / "tokenizer.json", kind="tokenizer", link=False)
    with pytest.raises(ArtifactError, match=r"vocab.json is in the way"):
        place(tmp_path / "made" / "vocab.json", copy / "vocab.json", kind="tokenizer", link=False)


def test_large_files_and_those_of_an_older_record_are_told_by_their_times(tmp_path, monkeypatch):
    monkeypatch.setattr("fintune.cli.legacy.owned_files.HASHED_BYTES", 4)
    copy = laid_out_and_copied(tmp_path)
    monkeypatch.undo()
    assert '"digests":[]' in (copy / NAME).read_text()
    for folder in (copy, tmp_path / "one"):  # as it was written before there were digests
        (folder / NAME).write_text((folder / NAME).read_text().replace(',"digests":[]', ""))
    assert not Record(copy).owned("tokenizer")
    assert Record(tmp_path / "one").is_whole("tokenizer", "x", "tokenizer.json")


@pytest.mark.parametrize("number", range(1, 8))
def test_a_folder_that_is_being_changed_holds_no_config_and_is_completed(tmp_path, monkeypatch, number):
    target, calls = tmp_path / "merged", []
    lay_out(write(tmp_path / "one", ONE), target, kind="merged", link=True)
    write(tmp_path / "two", SHARDS)
    real = Path.replace

    def stop(path: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(path, to)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        lay_out(tmp_path / "two", target, kind="merged", link=True)
    monkeypatch.undo()
    assert number == 1 or not (target / "config.json").is_file()
    lay_out(tmp_path / "two", target, kind="merged", link=True)
    assert texts(target) == SHARDS


def test_a_full_disk_names_the_target_and_leaves_no_part_and_no_config(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = write(tmp_path / "one", ONE)
    monkeypatch.setattr(
        cli_finance_files, "_link_or_copy", lambda source, part, link: part.write_text("half") and full()
    )
    with pytest.raises(ResourceError) as caught:
        lay_out(source, tmp_path / "merged", kind="merged", link=True)
    assert str(caught.value).startswith(f"{tmp_path}/merged/chat_template.jinja: cannot be written (No space left")
    assert texts(tmp_path / "merged") == {}


class Tokenizer:
    def __init__(self, files: dict[str, str]) -> None:
        self.files = files

    def save_pretrained(self, folder: Path) -> None:
        write(folder, self.files)
        (folder / "manifest.json").unlink()


def finished_training(run: Path, base: str) -> None:
    key = Key(step="train", options={}, sources={"model.name": base}, inputs={})
    figures = {"outputs": {}, "facts": {}, "versions": {}, "machine": {}}
    text = Manifest(
        **figures, key=key, fingerprint="", commit=None, seed=1, finished="", seconds=1, peak_memory_bytes=1
    )
    write(run / "train" / "adapter", {"adapter_config.json": base})
    (run / "train" / "manifest.json").write_text(text.model_dump_json())


def test_the_tokenizer_beside_the_adapter_is_that_of_its_base(here, monkeypatch):
    pytest.importorskip("transformers")
    config = load(None, ["run.dir=lora", "run.name=run", "model.name=builtin:smollm2-135m"]).config
    loaded: list[str] = []

    def lay_out_of(base: str, files: dict[str, str]) -> dict[str, str]:
        finished_training(config.folder, base)
        monkeypatch.setattr(
            "fintune.models.load.load_tokenizer", lambda *_, **__: loaded.append(base) or Tokenizer(files)
        )
        lay_out_adapter(config, here / "lora")
        return {path.name: path.read_text() for path in (here / "lora").iterdir() if path.is_file()}

    first = {"tokenizer.json": "1", "added_tokens.json": "1"}
    second = {"tokenizer.json": "2", "tokenizer_config.json": "2"}
    assert lay_out_of("base 1", first).items() >= first.items()
    found = lay_out_of("base 2", second)
    assert {name for name in found if name != NAME} == {*second, "adapter_config.json"}
    assert found.items() >= second.items()
    lay_out_of("base 2", second)
    assert loaded == ["base 1", "base 2"], "it is loaded only where it is another"
    (here / "lora" / "tokenizer.json").unlink()
    assert lay_out_of("base 2", second)["tokenizer.json"] == "2"


def test_a_modelfile_that_the_user_changed_stays(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"FROM run.gguf\n# {name}")
    made = tmp_path / "out.gguf.Modelfile"
    for name in ("a", "b"):
        modelfile(tmp_path / name, "run.gguf", tmp_path / "out.gguf")
        assert made.read_text() == f"FROM out.gguf\n# {name}"
    made.write_text("FROM out.gguf\nSYSTEM mine")
    modelfile(tmp_path / "a", "run.gguf", tmp_path / "out.gguf")
    assert made.read_text() == "FROM out.gguf\nSYSTEM mine"
    assert "stays as it is" in capsys.readouterr().err


def told(*words: str) -> str:
    fixed = ("--model_name", "builtin:smollm2-135m", "--investopedia", "none")
    done = fintune(*fixed, *words, "--dry_run", command=cli_finance.pipeline_command())
    assert done.status == 2, done.err
    return done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--model_name base --merged_model_dir ./base/", "--merged_model_dir base: is what --model_name names"),
        ("--model_name base --lora_output_dir base", "--lora_output_dir base: is what --model_name names"),
        ("--merged_model_dir datasets", "is what --dataset_folder names"),
        ("--lora_output_dir datasets/out", "lies in --dataset_folder datasets, whose files are all read as data"),
        ("--merged_model_dir financial_lora/run/merge", "lies in the folder of the run, "),
        ("--merged_model_dir financial_lora", "--lora_output_dir and --merged_model_dir both name financial_lora"),
        ("--gguf_fp16_path a.gguf --gguf_q4_path ./a.gguf", "--gguf_fp16_path and --gguf_q4_path both name a.gguf"),
        ("--gguf_q4_path out --merged_model_dir out/merged", "--gguf_q4_path out: is to be a file, and another output"),
        ("--gguf_q4_path .", "--gguf_q4_path .: is a folder, not a file: name a file in it: ./NAME.gguf"),
        ("--gguf_q4_path base", "--gguf_q4_path base: is a folder, not a file: name a file in it"),
        ("--gguf_q4_path mine.gguf", "--gguf_q4_path mine.gguf: there is a file already, which these commands did not"),
        ("--gguf_fp16_path dangling.gguf", "--gguf_fp16_path dangling.gguf: there is a file already"),
        ("--merged_model_dir mine.gguf", "--merged_model_dir mine.gguf: "),
        ("--gguf_q4_path mine.gguf/x.gguf", "mine.gguf is a file, not a folder"),
        (
            "--merged_model_dir other",
            "--merged_model_dir other: holds chat_template.jinja and 2 more, which these commands did",
        ),
        ("--lora_output_dir theirs", "--lora_output_dir theirs: holds adapter_config.json, which these commands did"),
    ],
)
def test_a_place_that_would_lose_something_is_refused_before_anything_is_done(here, words, expected):
    for name in ("base", "other"):
        write(here / name, ONE)
    write(here / "theirs", {"adapter_config.json": "{}", "run.log": ""})
    (here / "mine.gguf").write_text("mine")
    (here / "dangling.gguf").symlink_to("nowhere")
    before = {path: path.is_file() and path.read_bytes() for path in here.rglob("*")}
    assert expected in told(*words.split())
    assert {path: path.is_file() and path.read_bytes() for path in here.rglob("*")} == before


def test_a_folder_that_may_not_be_written_to_is_refused(here, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "sealed")
    (here / "sealed").mkdir()
    assert "--gguf_q4_path sealed/a/b.gguf: " in told("--gguf_q4_path", "sealed/a/b.gguf")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that refuses only when written to")
def test_a_file_system_that_says_too_late_that_it_refuses_is_tried_out(tmp_path):
    fine = gguf(tmp_path)
    cli_finance_places.try_out([fine])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"--gguf_q4_path /proc/a/b.gguf: /proc cannot be written to"):
        cli_finance_places.try_out([fine, dataclasses.replace(fine, path=Path("/proc/a/b.gguf"))])


def test_what_is_skipped_has_no_place(here):
    words = ("--merged_model_dir", "financial_lora", "--skip_merge", "--gguf_q4_path", "datasets")
    fixed = ("--model_name", "builtin:smollm2-135m", "--investopedia", "none")
    done = fintune(*fixed, *words, "--skip_quantization", "--dry_run", command=cli_finance.pipeline_command())
    assert done.status == 0, done.err


def gguf(tmp_path: Path, size: int = 400) -> Place:
    return Place(
        "--gguf_q4_path", tmp_path / "other" / "a.gguf", "gguf", "export", tmp_path / "run" / "a.gguf", lambda: size
    )


def test_a_link_to_the_run_that_no_record_knows_is_taken_for_ours_and_replaced(tmp_path):
    there = gguf(tmp_path)
    for folder in ("other", "run"):
        (tmp_path / folder).mkdir()
    there.source.write_text("old")
    os.link(there.source, there.path)
    cli_finance_places.check([there], {}, tmp_path / "run")
    assert not (tmp_path / "other" / NAME).exists(), "checking writes nothing"
    cli_finance_places.adopt([there])
    there.source.unlink()
    there.source.write_text("new")
    place(there.source, there.path, kind="gguf")
    assert there.path.read_text() == "new"


def test_another_disk_without_room_is_told_before_any_work(tmp_path, monkeypatch):
    there, run = gguf(tmp_path), tmp_path / "run"
    run.mkdir()
    free, word = 399, "run"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))

    def check() -> None:
        cli_finance_places.check_space([there], lambda: {"export": word}, run)

    check()  # on one disk it is a link
    monkeypatch.setattr(cli_finance_places, "device", lambda path: int("other" in path.parts))
    with pytest.raises(
        ResourceError, match=r"copy as --gguf_q4_path .*a.gguf: it needs about 400 B in .*other, 399 B is free"
    ):
        check()
    free = 400
    check()
    there.source.write_text("x" * 500)
    word = "up to date"
    with pytest.raises(ResourceError, match="500 B"):
        check()
    place(there.source, there.path, kind="gguf", link=False)
    free = 0
    check()  # what is there needs no room
    assert Record(there.path.parent).owns(there.path)
