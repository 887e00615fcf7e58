"""The training scripts with the older flags, from a dataset folder to an adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import click
import pytest

from fintune.cli.legacy import finqa
from fintune.cli.legacy.finqa_data import preprocess
from fintune.data.synthetic import generate
from fintune.errors import ArtifactError, ConfigError, DataError, ResourceError
from fintune.models import adapter as adapters
from fintune.models import load as models
from fintune.pipeline.steps import build_steps
from fintune.publish.push import push_files
from fintune.training import metrics
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
    (finqa.TRAIN_DORA if use_dora else finqa.TRAIN_LORA)(arguments, standalone_mode=False)


def adapter_config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


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
    base = models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")
    adapters.load_adapter(base, tmp_path / "out")
    assert len(metrics.read(tmp_path / "out" / "run" / "train" / "metrics.jsonl")) == 4


def test_flags_become_the_configuration(tiny_model, processed, tmp_path, monkeypatch):
    configs = []
    real = finqa._config
    monkeypatch.setattr(finqa, "_config", lambda *words: configs.append(real(*words)) or configs[-1])
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
    train = configs[-1].train
    assert (train.num_train_epochs, train.learning_rate, train.weight_decay) == (0.5, 3e-4, 0.1)
    assert (train.gradient_checkpointing, train.report_to, train.dtype) == (True, ("tensorboard",), "float32")
    assert (train.save_strategy, train.eval_steps, train.gradient_accumulation_steps) == ("epoch", 1, 2)
    assert (configs[-1].adapter.lora_dropout, configs[-1].run.seed) == (0.05, 5)
    lines = metrics.read(tmp_path / "out" / "run" / "train" / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_loss" in line] == [1]


def test_same_command_resumes_then_does_nothing(tiny_model, processed, tmp_path, monkeypatch):
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


def test_mistakes_leave_nothing(tiny_model, processed, tmp_path):
    for others, message in (({"eval_strategy": "epoch"}, "--eval_strategy epoch"), ({"lora_r": 0}, "--lora_r")):
        with pytest.raises(ConfigError, match=message):
            call(flags(tiny_model, processed / "train", tmp_path / "out", **others))
    with pytest.raises(DataError, match="nothere"):
        call(flags(tiny_model, tmp_path / "nothere", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_foreign_adapter_is_kept(tiny_model, processed, tmp_path, ran):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("mine")
    arguments = flags(tiny_model, processed / "train", tmp_path / "out")
    with pytest.raises(ConfigError, match="--output_dir"):
        call(arguments)
    assert ((tmp_path / "out" / "adapter_config.json").read_text(), ran) == ("mine", [])
    call([*arguments, "--overwrite_output_dir"])
    assert (tmp_path / "out" / "adapter_config.json").read_text() == "2"


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
        finqa, "build_steps", lambda config: [replace(step, run=stand_in(step.name)) for step in real(config)]
    )
    return names


def test_other_settings_are_overwritten_if_asked(tiny_model, processed, tmp_path, ran):
    def arguments(**others):
        return flags(tiny_model, processed / "train", tmp_path / "out", **others)

    call(arguments())
    for others, option in (({"lr": 5e-5}, "train.learning_rate"), ({"max_length": 800}, "prompt.max_length")):
        with pytest.raises(ArtifactError, match=option):
            call(arguments(**others))
    with pytest.raises(ArtifactError, match=r"data\.train"):
        call(flags(tiny_model, processed / "dev", tmp_path / "out"))
    assert ran == ["prepare", "train"]
    call(arguments(lr=5e-5, max_length=800, overwrite_output_dir="true"))
    assert ran == ["prepare", "train"] * 2
    assert (tmp_path / "out" / "adapter_config.json").read_text() == "4"
    call(arguments(lr=5e-5, max_length=800))
    assert len(ran) == 4
    call([*arguments(lr=1e-5, max_length=800), "--redo", "train"])
    assert ran[4:] == ["train"]
    assert (tmp_path / "out" / "adapter_config.json").read_text() == "5"


def test_unreadable_results_are_overwritten_if_asked(tiny_model, processed, tmp_path, ran):
    arguments = flags(tiny_model, processed / "train", tmp_path / "out")
    call(arguments)
    for name in ("prepare", "train"):
        (tmp_path / "out" / "run" / name / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="not a manifest"):
        call(arguments)
    call([*arguments, "--overwrite_output_dir"])
    assert ran == ["prepare", "train"] * 2


def test_missing_reporter_is_refused_first(tiny_model, processed, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "wandb" else real(name))
    with pytest.raises(ResourceError, match="wandb"):
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


def test_refused_token_is_never_shown(tiny_model, processed, tmp_path):
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


def test_missing_token_is_refused(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ResourceError, match="token"):
        full_repo_name("model")


@LIBRARY_WARNS
def test_only_the_adapter_is_pushed(tiny_model, processed, tmp_path, monkeypatch):
    for name in (".env", "private/customers.jsonl", ".adapter_model.safetensors.tmp"):
        beside = tmp_path / "out" / name
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text("nobody else's business")
    with connected(monkeypatch) as hub:
        call(flags(tiny_model, processed / "train", tmp_path / "out", push_to_hub="true"))
        assert hub.repositories["ann/out"].private
        assert set(hub.files("ann/out")) == {"adapter_config.json", "adapter_model.safetensors"}


@LIBRARY_WARNS
def test_every_epoch_is_pushed(tiny_model, processed, tmp_path, monkeypatch):
    more = {"push_to_hub": "true", "hub_strategy": "epoch", "hub_model_id": "ann/each", "epochs": 2}
    with connected(monkeypatch) as hub:
        call(flags(tiny_model, processed / "train", tmp_path / "out", **more))
        commits = hub.repositories["ann/each"].commits["main"]
        assert commits == ["initial commit", "epoch 1, step 4", "end of training", "Upload with fintune"]
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert hub.files("ann/each")[name] == (tmp_path / "out" / name).read_bytes()


def test_failed_push_shows_no_secret(tmp_path, monkeypatch):
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
