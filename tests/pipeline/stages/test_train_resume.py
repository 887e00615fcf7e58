"""Every kind of training goes on from a checkpoint with the bits of a run that nothing interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from fintune.config import Config
from fintune.pipeline.stages.train import train
from fintune.training import metrics
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")

KINDS = {
    "full, best loss": {
        "adapter": {"kind": "full"},
        "train": {"dtype": "bfloat16", "learning_rate": 1e-3, "eval_steps": 2, "select_checkpoint": "best_loss"},
    },
    "qlora": {"model": {"quantization": "nf4"}},
    "qdora": {"model": {"quantization": "nf4"}, "adapter": {"kind": "dora"}, "train": {"dtype": "bfloat16"}},
    "pissa": {"adapter": {"init_lora_weights": "pissa"}},
    "loftq": {"model": {"quantization": "nf4"}, "adapter": {"init_lora_weights": "loftq"}},
    "best accuracy": {
        "train": {"eval_steps": 2, "select_checkpoint": "best_accuracy", "eval_new_tokens": 2, "max_eval_samples": 2},
    },
    "recomputed, accumulated": {
        "train": {"gradient_checkpointing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    },
}
KILLED = """
import os, signal, sys
from pathlib import Path
from fintune.config import Config
from fintune.pipeline.stages.train import train
from fintune.training import metrics

append = metrics.append


def append_and_die(path, line):
    append(path, line)
    if line["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)


metrics.append = append_and_die
train(Config.model_validate_json(sys.argv[1]), {"prepare": Path(sys.argv[2])}, Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def inputs(tiny_model, tmp_path_factory):
    return {"prepare": prepared(tmp_path_factory.mktemp("resume") / "prepare", tiny_model)}


def config(model, kind) -> Config:
    asked = KINDS[kind]
    common = {"threads": 1, "dtype": "float32", "per_device_train_batch_size": 4, "max_steps": 5, "save_steps": 2}
    return Config.model_validate(
        {
            "model": {"name": str(model), **asked.get("model", {})},
            "adapter": {"r": 4, "lora_dropout": 0.1, **asked.get("adapter", {})},
            "train": {**common, "learning_rate": 1e-2, **asked.get("train", {})},
        }
    )


def lines(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics.read(folder / "metrics.jsonl")]


def check_alike(whole, cut):
    from safetensors.torch import load_file

    assert lines(whole) == lines(cut)
    (path,) = (path.relative_to(whole) for path in whole.glob("*/*model.safetensors"))
    expected, found = load_file(whole / path), load_file(cut / path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def folders(tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    return tmp_path / "whole", tmp_path / "cut"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("full")])
def test_interrupted_run_resumes_to_the_same_bits(tiny_model, inputs, tmp_path, monkeypatch, kind):
    if KINDS[kind].get("model", {}).get("quantization") == "nf4":
        pytest.importorskip("bitsandbytes")
    asked, append = config(tiny_model, kind), metrics.append
    whole, cut = folders(tmp_path)
    train(asked, inputs, whole)

    def append_and_stop(path, line):
        append(path, line)
        if line["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "append", append_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(asked, inputs, cut)
    assert lines(cut)[-1]["step"] == 3
    monkeypatch.setattr(metrics, "append", append)
    train(asked, inputs, cut)
    check_alike(whole, cut)


def test_killed_full_run_resumes_to_the_same_bits(tiny_model, inputs, tmp_path):
    asked = config(tiny_model, "full, best loss")
    whole, cut = folders(tmp_path)
    command = [sys.executable, "-c", KILLED, asked.model_dump_json(), str(inputs["prepare"]), str(cut)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["checkpoint-2"]
    train(asked, inputs, cut)
    train(asked, inputs, whole)
    check_alike(whole, cut)
