"""What tests of preference training share: options, what a training left, and a training that is interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fintune.config import Config
from fintune.config.load import load
from fintune.pipeline.stages.train import train
from fintune.training import metrics

torch = pytest.importorskip("torch")


def data_options(model: Path, *sources: Path, objective: str, more: tuple[str, ...] = ()) -> list[str]:
    """Overrides that prepare a quarter of the rows held out."""
    return [
        "data.source=chat",
        f"data.sources={json.dumps([str(source) for source in sources])}",
        "data.eval_share=0.25",
        "prompt.max_length=128",
        f"model.name={model}",
        f"train.objective={objective}",
        *more,
    ]


def training(model: Path, data: Path, objective: str, *more: str) -> Config:
    """Six small steps."""
    steps = (
        "train.dtype=float32",
        "train.per_device_train_batch_size=4",
        "train.max_steps=6",
        "train.learning_rate=2e-3",
    )
    return load(None, data_options(model, data, objective=objective, more=("adapter.r=4", *steps, *more))).config


def lines(folder: Path) -> list[dict[str, float]]:
    """The metrics but for their times."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics.read(folder / "metrics.jsonl")]


def weights(folder: Path):
    """Tensors of the adapter."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def check_that_an_interrupted_run_equals_the_uninterrupted_one(asked: Config, prepared: Path, place: Path, monkeypatch):
    """Interrupt behind the fifth step, go on, compare every figure and weight."""
    whole, cut = place / "whole", place / "cut"
    whole.mkdir()
    cut.mkdir()
    train(asked, {"prepare": prepared}, whole)
    original = metrics.append

    def interrupted(path: Path, line: dict[str, float]) -> None:
        original(path, line)
        if line["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(metrics, "append", interrupted)
        train(asked, {"prepare": prepared}, cut)
    assert not (cut / "adapter").exists()
    train(asked, {"prepare": prepared}, cut)
    assert lines(cut) == lines(whole)
    assert all(torch.equal(weights(cut)[name], weight) for name, weight in weights(whole).items())
