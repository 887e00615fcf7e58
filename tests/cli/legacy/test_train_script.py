"""The training scripts with the older flags, from a dataset folder to an adapter."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from fintune.cli.legacy import dataset_folder
from fintune.cli.legacy import finqa as cli_train
from fintune.cli.legacy.finqa_messages import told_in_script
from fintune.cli.legacy.preprocess import preprocess
from fintune.data.synthetic import generate
from fintune.errors import ArtifactError, ConfigError, DataError, FintuneError, ResourceError
from fintune.pipeline import steps
from fintune.pipeline.steps import build_steps
from fintune.publish.push import push_files
from fintune.training import evaluate, metrics
from fintune.util.hub import full_repo_name
from support.model_hub import LIBRARY_WARNS, connected
from support.paths import ROOT

pytest.importorskip("torch")

SCRIPTS = ROOT / "scripts"


@pytest.fixture(scope="module")
def processed(tmp_path_factory) -> Path:
    """Two splits, each as scripts/preprocess.py writes it."""
    folder = tmp_path_factory.mktemp("processed")
    records = list(generate(6, pages_per_company=1, questions_per_page=2, seed=3, size="small"))
    for name, part in (("train", records[:8]), ("dev", records[8:])):
        (folder / f"{name}.json").write_text(json.dumps([record.model_dump(mode="json") for record in part]))
        preprocess(folder / f"{name}.json", folder / "data" / name)
    return folder / "data"


def flags(model: Path, dataset: Path, output: Path, **others: object) -> list[str]:
    chosen = {
        "base_model": model,
        "dataset_dir": dataset,
        "output_dir": output,
        "epochs": 1,
        "per_device_train_batch_size": 2,
        "use_bf16": "false",
        "logging_steps": 1,
        "lora_r": 4,
        "max_length": 900,
        **others,
    }
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]


def call(arguments: list[str], *, use_dora: bool = True) -> None:
    cli_train.command(use_dora=use_dora)(arguments, standalone_mode=False)


def adapter_config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_the_script_writes_an_adapter_where_it_is_looked_for(tiny_model, processed, tmp_path):
    arguments = flags(tiny_model, processed / "train", tmp_path / "out", lora_alpha=8, save_strategy="epoch")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "train_dora.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'out'}: the adapter" in done.stdout
    assert (adapter_config(tmp_path / "out")["use_dora"], adapter_config(tmp_path / "out")["lora_alpha"]) == (True, 8)
    from fintune.models import adapter as adapters
    from fintune.models import load as models

    base = models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")
    adapters.load_adapter(base, tmp_path / "out")
    assert len(metrics.read(tmp_path / "out" / "run" / "train" / "metrics.jsonl")) == 4


@pytest.mark.parametrize(
    ("others", "use_dora", "expected"),
    [
        ({}, True, ("dora", "none")),
        ({}, False, ("lora", "none")),
        ({"use_dora": "false", "use_4bit": "true"}, True, ("lora", "nf4")),
        ({"use_dora": "true", "use_4bit": "true"}, False, ("dora", "nf4")),
    ],
)
def test_flags_choose_the_method(tiny_model, processed, tmp_path, others, use_dora, expected):
    call(flags(tiny_model, processed / "train", tmp_path / "out", **others), use_dora=use_dora)
    manifest = json.loads((tmp_path / "out" / "run" / "train" / "manifest.json").read_text())
    options = manifest["key"]["options"]
    assert (options["adapter.kind"], options["model.quantization"]) == expected
    assert adapter_config(tmp_path / "out")["use_dora"] is (expected[0] == "dora")


def test_every_flag_reaches_its_option(tiny_model, processed, tmp_path, monkeypatch):
    seen = {}
    real = cli_train._config

    def look(given, data, repo, **steps):
        seen["config"] = real(given, data, repo, **steps)
        return seen["config"]

    monkeypatch.setattr(cli_train, "_config", look)
    others = {
        "epochs": 0.5,
        "lr": 3e-4,
        "weight_decay": 0.1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": "true",
        "lora_dropout": 0.05,
        "save_strategy": "epoch",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "report_to": "tensorboard",
        "seed": 5,
    }
    call(flags(tiny_model, processed, tmp_path / "out", **others))
    train = seen["config"].train
    assert (train.num_train_epochs, train.learning_rate, train.weight_decay, train.gradient_accumulation_steps) == (
        0.5,
        3e-4,
        0.1,
        2,
    )
    assert (train.gradient_checkpointing, train.report_to, train.dtype) == (True, ("tensorboard",), "float32")
    assert (train.save_steps, train.eval_steps) == (2, 1)
    assert (seen["config"].adapter.lora_dropout, seen["config"].run.seed) == (0.05, 5)
    lines = metrics.read(tmp_path / "out" / "run" / "train" / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_loss" in line] == [1]


def test_the_same_command_goes_on_and_then_has_nothing_to_do(tiny_model, processed, tmp_path, monkeypatch):
    from fintune.training import lora

    arguments = flags(tiny_model, processed / "train", tmp_path / "out", save_strategy="steps", save_steps=1)
    monkeypatch.setattr(lora, "save_adapter", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(click.Abort):
        call(arguments)
    monkeypatch.undo()
    before = (tmp_path / "out" / "run" / ".work" / "train" / "metrics.jsonl").read_text()
    train = tmp_path / "out" / "run" / "train"
    call(arguments)
    assert (train / "metrics.jsonl").read_text() == before
    stamp = (train / "manifest.json").stat().st_mtime_ns
    call(arguments)
    assert (train / "manifest.json").stat().st_mtime_ns == stamp


def test_a_dataset_dict_without_our_own_file_is_read_by_its_columns(processed, tmp_path):
    from datasets import DatasetDict, load_from_disk
    from datasets.utils.logging import disable_progress_bar

    from fintune.data.finqa_json import read_finqa

    disable_progress_bar()
    saved = DatasetDict({name: load_from_disk(str(processed / name)) for name in ("train", "dev")})
    saved.save_to_disk(str(tmp_path / "dict"))
    train, evaluation = dataset_folder.split_folders(tmp_path / "dict")
    assert (train.name, evaluation.name) == ("train", "dev")
    ours = read_finqa(processed / "train" / "records.jsonl").records
    theirs = read_finqa(dataset_folder.finqa_file(train, tmp_path / "made" / "train.jsonl")).records
    assert [record.qa.exe_ans for record in theirs] == [record.qa.exe_ans for record in ours]
    assert [(r.id, r.table, r.pre_text, r.qa.program) for r in theirs] == [
        (r.id, r.table, r.pre_text, r.qa.program) for r in ours
    ]


def test_rows_that_are_no_finqa_records_are_told_apart(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}).save_to_disk(str(tmp_path / "pairs"))
    assert dataset_folder.finqa_file(tmp_path / "pairs", tmp_path / "x.jsonl") is None
    assert not (tmp_path / "x.jsonl").exists()


def test_mistakes_name_the_flag_or_the_folder(tiny_model, processed, tmp_path):
    with pytest.raises(
        ConfigError, match=r"--eval_strategy epoch: .*train has no evaluation split: give --eval_dataset"
    ):
        call(flags(tiny_model, processed / "train", tmp_path / "out", eval_strategy="epoch"))
    with pytest.raises(DataError, match="nothere: no such folder"):
        call(flags(tiny_model, tmp_path / "nothere", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no saved dataset in it"):
        call(flags(tiny_model, tmp_path / "empty", tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"^--lora_r: got 0: input should be greater than or equal to 1$"):
        call(flags(tiny_model, processed / "train", tmp_path / "out", lora_r=0))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the stages that ran; what they make is a stand-in."""
    names: list[str] = []

    def stand_in(name):
        def run(_, inputs, folder):
            names.append(name)
            (folder / "adapter").mkdir(exist_ok=True)
            (folder / "adapter" / "adapter_config.json").write_text(str(len(names)))
            return {"num_train_rows": 8}

        return run

    real = build_steps
    monkeypatch.setattr(
        steps, "build_steps", lambda config: [replace(step, run=stand_in(step.name)) for step in real(config)]
    )
    return names


def test_a_run_with_other_settings_is_overwritten_where_the_flag_says_so(tiny_model, processed, tmp_path, ran):
    def arguments(**others):
        return flags(tiny_model, processed / "train", tmp_path / "out", **others)

    call(arguments())
    with pytest.raises(ArtifactError) as raised:
        call(arguments(lr=5e-5))
    assert str(raised.value).endswith(
        "made with other settings: --lr was 0.0001 and is now 5e-05: "
        "give --overwrite_output_dir true to begin anew, or another --output_dir"
    )
    with pytest.raises(ArtifactError, match=r"--max_length was 900 and is now 800: give --overwrite_output_dir true"):
        call(arguments(max_length=800))
    with pytest.raises(ArtifactError, match=r"settings: --dataset_dir was .*: give --overwrite_output_dir true"):
        call(flags(tiny_model, processed / "dev", tmp_path / "out"))
    assert ran == ["prepare", "train"]
    call(arguments(lr=5e-5, max_length=800, overwrite_output_dir="true"))
    assert ran == ["prepare", "train"] * 2
    assert (tmp_path / "out" / "adapter_config.json").read_text() == "4"
    call(arguments(lr=5e-5, max_length=800))
    assert len(ran) == 4


def test_results_that_cannot_be_read_are_overwritten_where_the_flag_says_so(tiny_model, processed, tmp_path, ran):
    arguments = flags(tiny_model, processed / "train", tmp_path / "out")
    call(arguments)
    for name in ("prepare", "train"):
        (tmp_path / "out" / "run" / name / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"not a manifest .*: give --overwrite_output_dir true to begin anew$"):
        call(arguments)
    call([*arguments, "--overwrite_output_dir"])
    assert ran == ["prepare", "train"] * 2


def test_no_message_speaks_of_redo_or_of_a_name_of_the_run():
    """Of every module whose errors the script can show, each text that does is told in its flags."""
    source = Path(cli_train.__file__).parents[2]
    names = ("manifest", "util/system", "models/load", "pipeline/runner", "data/prepared")
    files = [source / f"{name}.py" for name in (*names, "pipeline/stages/prepare", "pipeline/stages/train")]
    files += sorted(source.glob("training/*.py"))
    told = []
    for file in files:
        tree = ast.parse(file.read_text())
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "train" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                text = node.value
            else:
                continue
            if "--redo" in text or "run.name" in text or "run.dir" in text or "prepare again" in text:
                with pytest.raises(FintuneError) as raised, told_in_script({}):
                    raise FintuneError("x", hint=text)
                told.append(str(raised.value))
    assert len(told) >= 8
    assert [text for text in told if any(word in text for word in ("redo", "run.", "prepare again"))] == []


@pytest.mark.parametrize(
    ("gpu", "use_bf16", "told"),
    [
        (False, None, "lower --lr, or give --use_bf16 false"),
        (False, True, "lower --lr, or give --use_bf16 false"),
        (False, False, "lower --lr"),
        (True, None, "lower --lr"),
        (True, False, "lower --lr, or give --use_bf16 true"),
    ],
)
def test_a_loss_that_is_not_finite_names_flags_that_help(monkeypatch, gpu, use_bf16, told):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(FintuneError) as raised, told_in_script({"use_bf16": use_bf16}):
        raise evaluate.not_finite("the loss is not finite at step 1", ["a"], SimpleNamespace(bf16=True, fp16=False))
    assert raised.value.hint == told


def test_a_reporter_that_is_not_installed_is_refused_before_anything_is_made(
    tiny_model, processed, tmp_path, monkeypatch
):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "wandb" else real(name))
    with pytest.raises(ResourceError, match=r"^--report_to: wandb is not installed: pip install wandb, or"):
        call(flags(tiny_model, processed / "train", tmp_path / "out", report_to="all"))
    assert not (tmp_path / "out").exists()


SECRET = "hf_" + "secretsecretsecret"


class _Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Authorization"))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_a_refused_token_stops_before_training_and_is_never_shown(tiny_model, processed, tmp_path):
    server = HTTPServer(("127.0.0.1", 0), _Refusing)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = subprocess.run(
            [
                sys.executable,
                str(SCRIPTS / "train_peft.py"),
                *flags(tiny_model, processed / "train", tmp_path / "out", push_to_hub="true"),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": SECRET},
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 2
    assert "the hub refuses the token (status 401)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert server.asked[-1] == f"Bearer {SECRET}"
    assert SECRET not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_token_says_how_to_get_one(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ResourceError, match="needs a token, and there is none: run `hf auth login`"):
        full_repo_name("model")


@LIBRARY_WARNS
def test_what_is_pushed_is_the_adapter_under_the_users_name(tiny_model, processed, tmp_path, monkeypatch):
    for name in (".env", "private/customers.jsonl", ".adapter_model.safetensors.tmp"):
        beside = tmp_path / "out" / name
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text("nobody else's business")
    with connected(monkeypatch) as hub:
        call(flags(tiny_model, processed / "train", tmp_path / "out", push_to_hub="true"))
        assert hub.repositories["ann/out"].private
        assert set(hub.files("ann/out")) == {"adapter_config.json", "adapter_model.safetensors"}


@LIBRARY_WARNS
def test_each_epoch_is_pushed_where_the_flag_asks_for_it(tiny_model, processed, tmp_path, monkeypatch):
    more = {"push_to_hub": "true", "hub_strategy": "epoch", "hub_model_id": "ann/each", "epochs": 2}
    with connected(monkeypatch) as hub:
        call(flags(tiny_model, processed / "train", tmp_path / "out", **more))
        commits = hub.repositories["ann/each"].commits["main"]
        assert commits == ["initial commit", "epoch 1, step 4", "end of training", "Upload with fintune"]
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert hub.files("ann/each")[name] == (tmp_path / "out" / name).read_bytes()


def test_a_push_that_fails_says_where_everything_is_and_not_what_was_sent(tmp_path, monkeypatch):
    import huggingface_hub

    class Api:
        endpoint = ""

        def create_repo(self, *_, **__):
            raise OSError(f"could not send Bearer {SECRET}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(ResourceError) as raised:
        push_files("ann/out", [tmp_path / "adapter_config.json"])
    assert "ann/out was not pushed; everything is in" in str(raised.value)
    assert SECRET not in str(raised.value)
