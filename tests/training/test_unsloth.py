"""Unsloth as the trainer, with a stand-in for Unsloth itself: what passes between the processes, and the refusals."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from fintune.config import AdapterOptions, Config, ModelOptions, TrainOptions
from fintune.errors import ConfigError, ResourceError
from fintune.pipeline.stages.train import train
from fintune.training import metrics, unsloth
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")

STAND_IN = """
import os, signal
import torch
from fintune.models import load as models
from fintune.config import AdapterOptions
from fintune.training import lora

class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, dtype, load_in_4bit, use_exact_model_name, local_files_only):
        if os.environ.get("STAND_IN") == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        if os.environ.get("STAND_IN") == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        assert max_seq_length % 32 == 0, "a batch is padded to that, and Unsloth would cut it, but not its labels"
        assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == os.environ["HF_HUB_OFFLINE"] == "1"
        ref = models.fetch(model_name)
        return models.load_model(ref, dtype=str(dtype).removeprefix("torch."), device="cpu"), None

    @staticmethod
    def get_peft_model(model, r, lora_alpha, lora_dropout, bias, target_modules, use_gradient_checkpointing,
                       use_rslora, use_dora, random_state):
        targets = tuple(target_modules)
        options = AdapterOptions(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=targets)
        return lora.attach_adapter(model, options)
"""
PYTHON = """#!{python}
import os
import signal
import sys
import threading
import time
sys.path.insert(0, {place!r})
from fintune.training import unsloth
unsloth._has_cuda = lambda: {cuda}
assert sys.argv[1:3] == ["-m", "fintune.training.unsloth"]
del sys.argv[1:3]
unsloth.run_worker()
"""


def stand_in(place: Path, *, cuda: bool = True, needs: str = "transformers>=5; extra == 'huggingface'") -> Path:
    """A python with a GPU and an Unsloth; gives the place of the former."""
    about = place / "unsloth-2026.10.9.dist-info"
    about.mkdir(parents=True)
    (place / "unsloth.py").write_text(STAND_IN, encoding="utf-8")
    text = "Metadata-Version: 2.1\nName: unsloth\nVersion: 2026.10.9\nProvides-Extra: huggingface\n"
    text += f"Requires-Dist: {needs}\n"
    (about / "METADATA").write_text(text, encoding="utf-8")
    python = place / "python"
    python.write_text(PYTHON.format(python=sys.executable, place=str(place), cuda=cuda), encoding="utf-8")
    python.chmod(0o755)
    return python


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model) -> dict[str, Path]:
    return {"prepare": prepared(tmp_path_factory.mktemp("unsloth") / "prepare", tiny_model)}


def config(model: Path, **options: object) -> Config:
    chosen = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "dtype": "float32",
        "threads": 1,
        **options,
    }
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Config(
        model=ModelOptions(name=str(model)),
        adapter=AdapterOptions(r=4, lora_alpha=8, target_modules=parts),
        train=TrainOptions(**chosen),
    )


def test_unsloth_trains_the_same_rows_in_the_same_order(tiny_model, inputs, tmp_path):
    python = stand_in(tmp_path / "site")
    for name, more in (("own", {}), ("unsloth", {"backend": "unsloth", "backend_python": python})):
        (tmp_path / name).mkdir()
        facts = train(config(tiny_model, eval_steps=2, max_eval_samples=2, **more), inputs, tmp_path / name)
    assert facts["unsloth"]["versions"]["unsloth"] == "2026.10.9"
    lines = [
        [{key: value for key, value in line.items() if key != "seconds"} for line in metrics.read(folder)]
        for folder in (tmp_path / "own" / "metrics.jsonl", tmp_path / "unsloth" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0] if "eval_loss" in line] == [2, 4]
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("own", "unsloth")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert not (tmp_path / "unsloth" / "unsloth").exists()


def test_unsloth_process_error_is_one_line(tiny_model, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(unsloth, "check_environment", lambda _config: None)
    chosen = config(tiny_model, backend="unsloth", backend_python=stand_in(tmp_path / "site"))
    for trouble, told in (
        ("killed", "Unsloth's process was ended by SIGKILL"),
        ("memory", r"out of memory while training with Unsloth \(CUDA out of memory\. Tr.*\): lower train.per_device"),
    ):
        monkeypatch.setenv("STAND_IN", trouble)
        with pytest.raises(ResourceError, match=told):
            train(chosen, inputs, tmp_path)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"cuda": False}, "there is no CUDA GPU: set train.backend to"),
        ({"needs": "transformers<=5.17; extra == 'huggingface'"}, "unsloth 2026.10.9 does not support transformers 5"),
        (None, "unsloth is not installed"),
    ],
)
def test_unsloth_environment_problem_is_refused(tiny_model, tmp_path, there, told):
    python = stand_in(tmp_path / "site", **there) if there is not None else None
    if there is None and _installed():
        pytest.skip("Unsloth is installed here")
    with pytest.raises(ResourceError, match=told):
        unsloth.check_environment(config(tiny_model, backend="unsloth", backend_python=python))


def _installed() -> bool:
    import importlib.util

    return importlib.util.find_spec("unsloth") is not None


def test_unsloth_python_without_fintune_is_refused(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.backend_python: .*nowhere does not exist"):
        unsloth.check_environment(config(tiny_model, backend="unsloth", backend_python=tmp_path / "nowhere"))
    (tmp_path / "broken").write_text("#!/bin/sh\necho no module named fintune >&2\nexit 1\n", encoding="utf-8")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(ResourceError, match=r"broken cannot run fintune \(no module named fintune\)"):
        unsloth.check_environment(config(tiny_model, backend="unsloth", backend_python=tmp_path / "broken"))


def test_unsloth_check_prints_one_line_of_json():
    import subprocess

    command = [sys.executable, "-m", unsloth.WORKER, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["versions"]["torch"]
    assert set(found) == {"versions", "problem"}


def test_unsloth_interruption_is_passed_on_once(tmp_path):
    ready, kept = tmp_path / "ready", tmp_path / "kept"
    code = (
        "import pathlib, signal, sys, time\n"
        "def keep(*_):\n"
        "    pathlib.Path(sys.argv[2]).write_text('step 16'); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, keep)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(60)"
    )

    def interrupt():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        unsloth._wait([sys.executable, "-c", code, str(ready), str(kept)], dict(os.environ))
    assert kept.read_text() == "step 16"
