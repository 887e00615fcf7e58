from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from fintune import models
from fintune.options import Config
from fintune.stages.train import train
from fintune.tuning import metrics
from prepared_rows import prepared

torch = pytest.importorskip("torch")


def config(model, **options) -> Config:
    return Config.model_validate(
        {
            "model": {"name": str(model)},
            "adapter": {"r": 4, "dropout": 0.1},
            "train": {"precision": "float32", "batch_size": 4, "max_steps": 6, "checkpoint_steps": 2, **options},
        }
    )


@pytest.fixture
def inputs(tmp_path, tiny_model):
    return {"prepare": prepared(tmp_path / "prepare", tiny_model)}


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_the_adapter_loads_with_peft_and_changes_the_model(tiny_model, inputs, tmp_path):
    from peft import PeftModel

    from fintune.tuning.quiet import quiet_libraries

    (tmp_path / "train").mkdir()
    facts = train(config(tiny_model, learning_rate=1e-2), inputs, tmp_path / "train")
    base = models.load_model(models.resolve(str(tiny_model)), dtype="float32", device="cpu")
    ids = torch.arange(5, 25)[None]
    before = base(ids).logits.detach().clone()
    with quiet_libraries():
        adapted = PeftModel.from_pretrained(base, tmp_path / "train" / "adapter")
    assert float((adapted(ids).logits - before).abs().max()) > 1e-4
    written = json.loads((tmp_path / "train/adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tiny_model)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["adapter", "metrics.jsonl"]
    assert facts["num_steps"] == 6
    assert facts["num_trainable"] == sum(w.numel() for w in weights(tmp_path / "train").values())
    assert facts["num_tokens"] == metrics.read(tmp_path / "train/metrics.jsonl")[-1]["tokens"] > 0


def test_an_attempt_that_ended_after_the_adapter_is_only_finished(tiny_model, inputs, tmp_path):
    (tmp_path / "train").mkdir()
    first = train(config(tiny_model), inputs, tmp_path / "train")
    stamp = (tmp_path / "train/adapter/adapter_model.safetensors").stat().st_mtime_ns
    assert train(config(tiny_model), inputs, tmp_path / "train") == first
    assert (tmp_path / "train/adapter/adapter_model.safetensors").stat().st_mtime_ns == stamp


def test_a_killed_run_goes_on_and_equals_the_uninterrupted_one(tiny_model, inputs, tmp_path):
    asked = config(tiny_model, max_steps=60, checkpoint_steps=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    code = (
        "import sys; from pathlib import Path; from fintune.options import Config\n"
        "from fintune.stages.train import train\n"
        "train(Config.model_validate_json(sys.argv[1]), {'prepare': Path(sys.argv[2])}, Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, asked.model_dump_json(), str(inputs["prepare"]), str(cut)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while len(metrics.read(cut / "metrics.jsonl")) < 5 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    assert not (cut / "adapter").exists()
    train(asked, inputs, cut)
    train(asked, inputs, whole)
    resumed, expected = weights(cut), weights(whole)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert [line["loss"] for line in metrics.read(cut / "metrics.jsonl")] == [
        line["loss"] for line in metrics.read(whole / "metrics.jsonl")
    ]
