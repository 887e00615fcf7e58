"""Training in two processes, which on this machine share the processor: the losses of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fintune.config import Config
from fintune.errors import ResourceError
from fintune.pipeline.stages.train import train
from fintune.training import metrics
from support.paths import ROOT
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")

SCRIPT = ROOT / "tests/support/trainings_in_ranks.py"
WAYS = {
    "lora": {"per_device_train_batch_size": 2},
    "fused": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "kind": "dora",
        "fused_layers": "always",
    },
    "qlora": {"per_device_train_batch_size": 2, "quantization": "nf4"},
    "divided": {"per_device_train_batch_size": 2, "kind": "dora", "sharding": "full", "gradient_checkpointing": True},
    "divided bfloat16": {"per_device_train_batch_size": 2, "dtype": "bfloat16", "sharding": "full"},
}
"""In two processes; every one trains on four examples a step."""


def config(model, *, kind="lora", quantization="none", gpus=2, **train):
    common = {"dtype": "float32", "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "threads": 1}
    return Config.model_validate(
        {
            "model": {"name": str(model), "quantization": quantization},
            "adapter": {"kind": kind, "r": 4},
            "train": {**common, "gpus": gpus, "eval_steps": 2, "select_checkpoint": "best_loss", **train},
        }
    )


def figures(folder):
    kept = ("loss", "eval_loss", "grad_norm", "tokens")
    return [[line[key] for key in kept if key in line] for line in metrics.read(folder / "metrics.jsonl")]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def check_alike(own, expected, near=1e-5):
    assert [len(line) for line in figures(own)] == [len(line) for line in figures(expected)]
    for a, b in zip(figures(own), figures(expected), strict=True):
        assert a == pytest.approx(b, rel=near)
    ours, theirs = weights(own), weights(expected)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours) < min(20 * near, 0.3)


@pytest.fixture(scope="module")
def prepare(tiny_model, tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("ranks") / "prepare", tiny_model)


@pytest.fixture(scope="module")
def in_two(tiny_model, prepare, tmp_path_factory):
    """Folders of all ways, trained in one pair of processes."""
    place = tmp_path_factory.mktemp("two")
    orders = []
    for name, options in WAYS.items():
        (place / name).mkdir()
        asked = config(tiny_model, **options).model_dump(mode="json")
        orders.append({"config": asked, "prepare": str(prepare), "folder": str(place / name)})
    (place / "orders.json").write_text(json.dumps(orders))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(place / "orders.json")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_give_the_losses_of_one(tiny_model, prepare, in_two, tmp_path, name):
    options = WAYS[name]
    one = {key: options[key] for key in ("kind", "quantization", "dtype") if key in options}
    train(config(tiny_model, gpus=1, per_device_train_batch_size=4, **one), {"prepare": prepare}, tmp_path)
    check_alike(in_two / name, tmp_path, near=3e-2 if name == "divided bfloat16" else 1e-5)


def test_the_adapter_of_divided_weights_is_plain_peft(tiny_model, in_two):
    from peft import PeftModel

    from fintune.models import load as models
    from fintune.util.console import quiet_libraries

    base = models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")
    with quiet_libraries():
        adapted = PeftModel.from_pretrained(base, in_two / "divided" / "adapter")
    assert any("lora_magnitude_vector" in name for name, _ in adapted.named_parameters())
    assert sorted(path.name for path in (in_two / "divided" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "fintune.json",
    ]


def kill_one_rank(folder, steps):
    """SIGKILL for a process of the training once it has logged some steps."""

    def wait_and_kill():
        while len(metrics.read(folder / "metrics.jsonl")) < steps:
            time.sleep(0.02)
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                settings = (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                b"fintune.pipeline.train_worker" in words
                and str(folder).encode() in b"".join(words)
                and b"RANK=1" in settings
            ):
                os.kill(int(path.name), signal.SIGKILL)

    threading.Thread(target=wait_and_kill, daemon=True).start()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found below /proc")
def test_killed_process_ends_all_and_training_resumes(tiny_model, prepare, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    plain = {"max_steps": 16, "eval_steps": None, "select_checkpoint": "last", "learning_rate": 1e-3}
    asked = config(tiny_model, per_device_train_batch_size=2, **plain)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    cut.mkdir()
    whole.mkdir()
    kill_one_rank(cut, 6)
    with pytest.raises(ResourceError, match=r"process 1 of 2 was ended by SIGKILL, and the others with it: .*resume"):
        train(asked, {"prepare": prepare}, cut)
    seen = len(metrics.read(cut / "metrics.jsonl"))
    assert 6 <= seen < 16
    assert not (cut / "adapter").exists()
    facts = train(asked, {"prepare": prepare}, cut)
    assert signal.getsignal(signal.SIGINT) is before, "the stages behind the training are interrupted as ever"
    assert facts["num_steps"] == 16
    train(config(tiny_model, gpus=1, per_device_train_batch_size=4, **plain), {"prepare": prepare}, whole)
    check_alike(cut, whole, near=1e-4)
    assert sorted(path.name for path in cut.iterdir()) == ["adapter", "metrics.jsonl"]
