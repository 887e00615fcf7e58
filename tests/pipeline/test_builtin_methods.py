"""The built-in model on real FinQA rows with each of the five methods, on a CPU."""

from __future__ import annotations

import pytest

from fintune.config import Config
from fintune.pipeline.stages.prepare import prepare
from fintune.pipeline.stages.train import train
from fintune.training import metrics
from support.paths import ROOT

FINQA = ROOT.parent / "shared" / "finqa"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FINQA / "train.json.gz").is_file(), reason="../shared/finqa holds the official files"),
]


def config(kind: str, load: str) -> Config:
    return Config.model_validate(
        {
            "model": {"quantization": load},
            "data": {
                "source": "finqa",
                "train": FINQA / "train.json.gz",
                "eval": FINQA / "dev.json.gz",
                "max_train_samples": 8,
                "max_eval_samples": 2,
            },
            "prompt": {"max_length": 384},
            "adapter": {"kind": kind},
            "train": {
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "warmup_ratio": 0.0,
                "lr_scheduler_type": "constant_with_warmup",
                "learning_rate": 5e-5 if kind == "full" else 1e-3,
                "eval_steps": 3,
                "threads": 2,
            },
        }
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, builtin_model):
    folder = tmp_path_factory.mktemp("finqa") / "prepare"
    folder.mkdir()
    prepare(config("lora", "none"), {}, folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "load"), [("lora", "none"), ("lora", "nf4"), ("dora", "none"), ("dora", "nf4"), ("full", "none")]
)
def test_each_method_learns_from_finqa(prepared, tmp_path, kind, load):
    facts = train(config(kind, load), {"prepare": prepared}, tmp_path)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == facts["num_steps"] == 3
    assert losses[-1] < losses[0] - 0.3
    assert 0 < facts["eval_loss"] < losses[0]
    (result,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert result.name == ("model" if kind == "full" else "adapter")
