"""The command line: what a user's mistake prints, and what help costs."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from fintune import __version__
from fintune.cli import main as cli
from fintune.config.yaml_file import packaged_config
from fintune.errors import DataError
from fintune.pipeline.runner import Pipeline
from fintune.util.signals import RESUME_MESSAGE
from support.paths import ROOT

DEMO = str(ROOT / "configs" / "demo.yaml")
HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "numpy", "matplotlib", "huggingface_hub"}


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """`fintune WORDS` in this process, from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def in_process(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["fintune", *words])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return Done(status, out, err)

    return in_process


@pytest.fixture
def mistake(run):
    """The one line that a user's mistake gives."""

    def one_line(*words: str) -> str:
        done = run(*words)
        assert done.status == 2, done.err
        assert done.out == ""
        assert done.err.count("\n") == 1, done.err
        assert done.err.startswith("fintune: ")
        assert "Traceback" not in done.err
        return done.err

    return one_line


@pytest.fixture
def process(tmp_path: Path):
    """`fintune WORDS` as a process of its own."""

    def start(*words: str, **env: str) -> Done:
        words = (sys.executable, "-m", "fintune.cli.main", *words)
        kept = {k: v for k, v in os.environ.items() if k not in {"HF_HUB_OFFLINE", "COLUMNS"}}
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env={**kept, **env})
        return Done(done.returncode, done.stdout, done.stderr)

    return start


def record(record_id: str, **qa: object) -> dict[str, object]:
    return {
        "id": record_id,
        "pre_text": ["cash grew ."],
        "post_text": [],
        "table": [["", "2019"], ["cash", "12"]],
        "qa": {"question": "what is cash?", "program": "add(12, 1)", "exe_ans": 13.0, **qa},
    }


@pytest.fixture
def finqa(tmp_path: Path, tiny_model: Path):
    """A configuration of two small FinQA files; give the content of the training file to change it."""

    def write(train: object = None, *, suffix: str = ".json") -> str:
        rows = [record("A/2019/page_1.pdf-1"), record("A/2019/page_2.pdf-1")]
        content = train if isinstance(train, bytes) else json.dumps(rows if train is None else train).encode()
        (tmp_path / f"train{suffix}").write_bytes(content)
        (tmp_path / "eval.json").write_text(json.dumps(rows))
        config = tmp_path / "mine.yaml"
        config.write_text(
            f"model:\n  name: {tiny_model}\n"
            f"data:\n  source: finqa\n  train: {tmp_path}/train{suffix}\n  eval: {tmp_path}/eval.json\n"
            f"run:\n  dir: {tmp_path}/runs\n"
        )
        return str(config)

    return write


# Help, and what it costs


def test_help_and_version_go_to_standard_output(run) -> None:
    for words in (["--help"], ["-h"], ["run", "--help"], ["config", "--help"], ["config", "show", "-h"]):
        done = run(*words)
        assert (done.status, done.err) == (0, "")
        assert done.out.startswith("Usage: ")
    assert run("--version").out == f"fintune {__version__}\n"


def test_help_lists_every_verb(run) -> None:
    told = run("--help").out
    for name, (_, line) in cli.VERBS.items():
        assert f"  {name} " in told
        assert line in told, name


def test_no_verb_prints_help_with_status_2(run) -> None:
    done = run()
    assert done.status == 2
    assert "Usage: " in done.out


def loaded(*words: str) -> str:
    """Which heavy libraries a fresh Python holds after `fintune WORDS`."""
    program = (
        "import sys, fintune.cli.main\n"
        f"sys.argv = ['fintune', *{list(words)!r}]\n"
        "try: fintune.cli.main.main()\n"
        "except SystemExit as end: status = end.code\n"
        "else: status = 0\n"
        f"sys.stderr.write(' '.join([str(status), *sorted({HEAVY!r} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["config", "show", DEMO], ["config", "reference"]])
def test_help_and_config_load_no_heavy_library(words: list[str]) -> None:
    assert loaded(*words).split() in (["0"], ["None"])


def test_score_loads_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "gold.json").write_text(json.dumps([record("A/2019/page_1.pdf-1")]))
    (tmp_path / "p.jsonl").write_text('{"id": "A/2019/page_1.pdf-1", "program": "add(12, 1)"}\n')
    words = ["score", "--predictions", str(tmp_path / "p.jsonl"), "--gold", str(tmp_path / "gold.json")]
    assert loaded(*words) == "0"


def test_dry_run_loads_no_heavy_library(finqa) -> None:
    assert loaded("run", finqa(), "--dry-run") == "0"


# Mistakes on the command line


@pytest.mark.parametrize("verb", ["run", "train", "plan", "inspect"])
def test_override_instead_of_config_is_quoted(mistake, verb: str) -> None:
    word = "predict.endpoint=http://127.0.0.1:8080/v1#m"
    told = mistake(verb, word)
    assert told.startswith(f"fintune: {word}: no such configuration file: the first argument is the configuration file")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["runn", DEMO], "No such command 'runn'. Did you mean 'run'?; see fintune --help"),
        (["run"], "Missing argument 'CONFIG'; see fintune run --help"),
        (["run", DEMO, "--ski", "train"], "No such option '--ski'"),
        (["run", DEMO, "--skip"], "Option '--skip' requires an argument; see fintune --help"),
        (["inspect", DEMO, "--examples", "-1"], "-1 is not in the range"),
        (["config", "shw"], "Did you mean 'show'?; see fintune config --help"),
        (["train", DEMO, "--skip", "merge"], "No such option '--skip'"),
    ],
)
def test_mistyped_command_is_one_line(mistake, words: list[str], told: str) -> None:
    assert told in mistake(*words)


@pytest.mark.parametrize("verb", ["run", "train", "predict", "inspect", "score"])
def test_missing_config_is_named(mistake, verb: str) -> None:
    assert "fintune: nope.yaml: no such configuration file or run: " in mistake(verb, "nope.yaml")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.epoch=3", "unknown option train.epoch: did you mean train.num_train_epochs?"),
        ("train.num_train_epochs=three", 'train.num_train_epochs: got "three": input should be a valid number'),
        ("train.num_train_epochs", "'train.num_train_epochs': not an override: write dotted.key=value"),
        ("train.num_train_epochs=[1", "the value is not valid YAML"),
        ("adapter.kind=qlora", "input should be 'lora', 'dora' or 'full'"),
        ("run.name=a/b", "run.name: 'a/b' is not a folder name: set run.dir for the path before it"),
        ("export.types=[F16]", "predict.models asks for Q4_K_M, which export.types does not write"),
    ],
)
def test_wrong_override_is_one_line(mistake, override: str, told: str) -> None:
    assert told in mistake("run", DEMO, override)


def test_wrong_line_of_the_file_is_named(mistake, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train:\n  num_train_epochs: 3\n  learning_rat: 1e-4\n")
    assert mistake("config", "show", "mine.yaml") == (
        "fintune: mine.yaml:3: unknown option train.learning_rat: did you mean train.learning_rate?\n"
    )


@pytest.mark.parametrize("flag", ["--skip", "--only", "--redo", "--from"])
def test_unknown_stage_hints_at_a_known_one(mistake, flag: str) -> None:
    assert "'predct' is no stage of this run: did you mean predict?" in mistake("run", DEMO, flag, "predct")


def test_stage_that_needs_another_names_the_commands(mistake, finqa) -> None:
    path = finqa()
    told = mistake("train", path, "run.name=intr")
    assert told.startswith("fintune: nothing is prepared in ")
    assert f"runs/intr: fintune prepare {path} run.name=intr first, or fintune run {path} run.name=intr for" in told


def test_report_without_scores_is_refused(mistake, finqa, tmp_path: Path) -> None:
    assert "report has nothing to read: no stage has a result in" in mistake("report", finqa())
    assert not (tmp_path / "runs").exists()


# Mistakes in data


@pytest.mark.parametrize(
    ("content", "suffix", "told"),
    [
        (b'[{"id": "A", "pre_te', ".json", "truncated JSON: it ends in line 1, inside a value"),
        (b'[{"id": "A",}]', ".json", "not JSON (line 1, column 1"),  # 13, and 12 from Python 3.13
        (b"", ".json", "the file is empty"),
        (b"\xff\xfe\x00", ".json", "not UTF-8 text (byte 0)"),
        (gzip.compress(json.dumps([record("A")] * 99).encode(), mtime=0)[:-20], ".json.gz", "truncated gzip file"),
        (b"[]", ".json", "the list is empty"),
        (b'{"data": 1}', ".json", "row 1"),
    ],
)
def test_unreadable_data_is_named_first(run, finqa, tmp_path: Path, content: bytes, suffix: str, told: str) -> None:
    done = run("inspect", finqa(content, suffix=suffix))
    assert done.status == 2
    assert done.err.startswith(f"fintune: {tmp_path}/train{suffix}: "), done.err
    assert done.err.count("\n") == 1
    assert told in done.err


def test_truncated_data_is_one_line_without_a_result(run, finqa, tmp_path: Path) -> None:
    done = run("prepare", finqa(b'[{"id": "A", "pre_te'))
    assert done.status == 2
    assert done.err.splitlines()[-1] == (
        f"fintune: {tmp_path}/train.json: truncated JSON: it ends in line 1, inside a value: copy or download it again"
    )
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs" / "mine" / "prepare").exists()


def test_strict_names_a_record_by_row_and_id(run, finqa, tmp_path: Path) -> None:
    rows = [record("A/2019/page_1.pdf-1"), record("A/2019/page_7.pdf-3", program="")]
    done = run("prepare", finqa(rows), "data.strict=true")
    assert done.status == 2
    line = done.err.splitlines()[-1]
    assert line.startswith(f"fintune: {tmp_path}/train.json, row 2, id A/2019/page_7.pdf-3: qa.program is missing")
    assert "data.strict: false" in line


def test_missing_data_file_is_named_first(mistake, finqa, tmp_path: Path) -> None:
    config = finqa()
    (tmp_path / "eval.json").unlink()
    for dry in ([], ["--dry-run"]):
        assert "eval.json: no such file: data.eval must name a FinQA JSON file" in mistake("run", config, *dry)
    assert not (tmp_path / "runs").exists()


# Mistakes about models


def test_incomplete_model_is_refused_first(mistake, finqa, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "tokenizer.json").unlink()
    assert "model holds no tokenizer (tokenizer.json)" in mistake("run", finqa(), f"model.name={model}")
    (model / "model.safetensors").unlink()
    assert "model holds no safetensors weights" in mistake("run", finqa(), f"model.name={model}")
    assert "no folder ./modle: " in mistake("run", finqa(), "model.name=./modle")
    assert "no built-in model is named builtin:x: there is" in mistake("run", finqa(), "model.name=builtin:x")
    assert not (tmp_path / "runs").exists()


def test_unknown_hub_id_offline_is_one_line(process, finqa, tmp_path: Path) -> None:
    words = ["run", finqa(), "model.name=nobody/nothing-7b"]
    done = process(*words, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert done.status == 2
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("fintune: there is no folder nobody/nothing-7b here; taken for a hub id, nobody/")
    assert done.err.endswith(": check the path, or connect once, or use builtin:smollm2-135m\n")
    assert not (tmp_path / "runs").exists()


# Mistakes about the machine


def test_full_disk_is_refused_first(mistake, finqa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    told = mistake("run", finqa())
    assert "no space for the run's 17 stages: it needs about" in told
    assert f"in {tmp_path}/runs/mine, 1.0 MB is free: free some, or set run.dir to a folder on another disk" in told
    assert not (tmp_path / "runs").exists()


@contextmanager
def held(path: Path) -> Iterator[None]:
    """A lock that another process holds."""
    path.parent.mkdir(parents=True)
    code = "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): print('held', flush=True); input()"
    words = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        try:
            yield
        finally:
            other.communicate("\n")


def test_run_in_use_is_refused(mistake, finqa, tmp_path: Path) -> None:
    config = finqa()
    with held(tmp_path / "runs" / "mine" / ".lock"):
        assert f"{tmp_path}/runs/mine is in use by another process: wait for it" in mistake("run", config)
    assert [path.name for path in (tmp_path / "runs" / "mine").iterdir()] == [".lock"]


def test_file_instead_of_run_folder_is_named(mistake, finqa, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    told = mistake("run", finqa())
    assert "runs/mine cannot be made: a file is in its place: set run.dir to another folder" in told


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENAMETOOLONG])
def test_file_system_errors_are_one_line(mistake, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "whatever", "runs/x/train.jsonl")

    monkeypatch.setattr("fintune.cli.stages.run_stages", refuse)
    assert mistake("run", DEMO) == f"fintune: runs/x/train.jsonl: {os.strerror(number).lower()}\n"


def test_error_escapes_control_characters(mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise DataError("field \x1b[2J\x9b is none")

    monkeypatch.setattr("fintune.cli.stages.run_stages", refuse)
    assert mistake("run", DEMO) == "fintune: field \\x1b[2J\\x9b is none\n"


def test_bug_keeps_its_traceback(run, monkeypatch: pytest.MonkeyPatch) -> None:
    for bug in (KeyError("x"), FileNotFoundError(errno.ENOENT, "gone")):

        def fail(*_: object, bug: Exception = bug, **__: object) -> None:
            raise bug

        monkeypatch.setattr("fintune.cli.stages.run_stages", fail)
        with pytest.raises(type(bug)):
            run("run", DEMO)


def test_interruption_says_how_to_resume(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "run", interrupted)
        done = run("run", DEMO)
    assert done.status == 130
    assert done.err.strip() == f"fintune: {RESUME_MESSAGE}"
    monkeypatch.setattr("fintune.cli.inspect.inspect_data", interrupted)
    done = run("inspect", DEMO)
    assert (done.status, done.err.strip()) == (130, "fintune: interrupted"), "nothing goes on there"


def test_interruption_keeps_its_own_message(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("interrupted; the same command goes on from step 16")

    monkeypatch.setattr("fintune.cli.stages.run_stages", interrupted)
    assert run("run", DEMO).err.strip() == "fintune: interrupted; the same command goes on from step 16"


@pytest.mark.parametrize(
    ("flags", "written"),
    [
        (("--learning_rate", "1e-4"), "--learning_rate: write train.learning_rate=1e-4"),
        (("--learning-rate=1e-4",), "--learning-rate: write train.learning_rate=1e-4"),
        (("--num_train_epochs", "--dry-run"), "--num_train_epochs: write train.num_train_epochs=VALUE"),
        (("--train.epochs", "2"), "--train.epochs: write train.num_train_epochs=2"),
        (("--load_in_4bit",), "--load_in_4bit: write model.quantization=nf4"),
    ],
)
def test_flag_of_another_program_hints_at_the_override(mistake, flags: tuple[str, ...], written: str) -> None:
    assert mistake("run", DEMO, *flags) == f"fintune: no option {written}\n"


def test_unknown_flag_keeps_its_message(mistake) -> None:
    assert "No such option '--zzz'; see fintune run --help" in mistake("run", DEMO, "--zzz")


def test_help_lists_verbs_in_order_without_truncation(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("--help").out.partition("Commands:\n")[2].splitlines()
    names = [line.split()[0] for line in lines]
    assert names[:6] == ["run", "demo", "init", "inspect", "plan", "prepare"]
    assert sorted(names) == sorted(cli.VERBS)
    assert not [line for line in lines if line.endswith("...")]


def test_closed_pipe_prints_no_error() -> None:
    words = [sys.executable, "-m", "fintune.cli.main", "config", "reference"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert done.stdout is not None
        assert done.stderr is not None
        done.stdout.close()
        assert done.stderr.read() == b""
    assert done.returncode == 1


# score without a configuration


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--predictions", "p.jsonl"],
        ["--gold", "gold.json"],
        ["data.max_eval_samples=3", "--predictions", "p.jsonl", "--gold", "gold.json"],
        ["mine.yaml", "--predictions", "p.jsonl"],
        ["mine.yaml", "--predictions", "p.jsonl", "--gold", "gold.json"],
    ],
)
def test_score_needs_a_config_or_both_files(mistake, words: list[str]) -> None:
    told = mistake("score", *words)
    assert "give a CONFIG, or both --predictions and --gold; see fintune score --help" in told


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "gold.json").write_text(json.dumps([record("A/2019/page_1.pdf-1"), record("A/2019/page_2.pdf-1")]))
    (tmp_path / "p.jsonl").write_text(
        '{"id": "A/2019/page_1.pdf-1", "program": "add(12, 1)"}\n'
        '{"id": "A/2019/page_2.pdf-1", "program": "add(1, 1)"}\n'
    )
    return ["score", "--predictions", "p.jsonl", "--gold", "gold.json"]


def test_score_prints_its_table(run, files: list[str]) -> None:
    done = run(*files)
    assert (done.status, done.err) == (0, "")
    head, execution, program, invalid, number, *views = done.out.splitlines()
    assert head.startswith("p.jsonl")
    assert head.index("predictions") < head.index("whole file")
    assert execution.split()[:3] == ["execution", "accuracy", "50.00%"]
    assert [line.split()[0] for line in (program, invalid, number)] == ["program", "invalid", "n"]
    assert "other views, not official" in views[1]


@pytest.mark.parametrize("gone", ["p.jsonl", "gold.json"])
def test_score_names_a_missing_file(mistake, files: list[str], tmp_path: Path, gone: str) -> None:
    (tmp_path / gone).unlink()
    assert f"fintune: {gone}: no such file: check " in mistake(*files)


def test_score_names_an_unwritable_file(mistake, files: list[str], tmp_path: Path) -> None:
    assert "no/a.csv: its folder does not exist" in mistake(*files, "--csv", "no/a.csv")
    (tmp_path / "taken").mkdir()
    assert "fintune: taken" in mistake(*files, "--csv", "taken")


def test_score_reports_or_refuses_unusable_rows(run, mistake, files: list[str], tmp_path: Path) -> None:
    with (tmp_path / "p.jsonl").open("a") as file:
        file.write('{"id": "B", "program": "add(1, 1)"}\n')
    done = run(*files)
    assert done.status == 0
    told, counted = done.err.splitlines()
    assert told.startswith("fintune: p.jsonl, row 3, id B: ")
    assert counted == "fintune: p.jsonl: not scored: 1 unknown id"
    assert "p.jsonl, row 3, id B: " in mistake(*files, "--strict")


# config


def test_config_show_prints_origins(run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train:\n  num_train_epochs: 2\n")
    done = run("config", "show", "mine.yaml", "adapter.r=8")
    rows = {line.split()[0]: line.rstrip().split(maxsplit=2)[1:] for line in done.out.splitlines()[1:]}
    assert rows["train.num_train_epochs"] == ["2.0", "mine.yaml:2"]
    assert rows["adapter.r"] == ["8", "command line"]
    assert rows["run.name"] == ['"mine"', "mine.yaml, its name"]
    assert rows["adapter.lora_alpha"] == ["32", "default"]


def test_config_reference_prints_the_docs_page(run) -> None:
    assert run("config", "reference").out == (ROOT / "docs" / "options.md").read_text(encoding="utf-8")


def test_dry_run_prints_the_plan_only(run, finqa, tmp_path: Path) -> None:
    done = run("run", finqa(), "--dry-run", "--skip", "score")
    assert (done.status, done.err) == (0, "")
    rows = {line.split()[0]: line.split()[1] for line in done.out.splitlines()}
    assert rows["prepare"] == "run"
    assert rows["score/base"] == "skipped"
    assert not (tmp_path / "runs").exists()


def test_packaged_config_in_a_checkout() -> None:
    assert packaged_config("demo.yaml") == ROOT / "configs" / "demo.yaml"
