"""``fintune train``: an adapter for the base model, from the tokenised examples of ``prepare``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune import models
from fintune.errors import ArtifactError
from fintune.options import Config
from fintune.progress import say
from fintune.tuning import adapter, metrics, sft

if TYPE_CHECKING:
    from datasets import Dataset


def train(config: Config, inputs: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Train; goes on where an interrupted attempt in ``folder`` stopped.

    Args:
        config: The run.
        inputs: Needs ``prepare``.
        folder: Gets ``adapter/`` in PEFT's format, ``metrics.jsonl`` and, while it works, ``checkpoints/``.

    Returns:
        Steps, tokens, first and last loss, seconds, tokens a second, trained parameters, precision.

    Raises:
        FintuneError: Loss or gradient is not finite.
        ModelError: The base model cannot be used.
        ConfigError: A target that the model does not have.
    """
    rows = _rows(inputs["prepare"] / "tokens" / "train")
    # An earlier attempt may have been interrupted between the adapter's appearance and the stage's end.
    if not (folder / "adapter").exists():
        _train(config, rows, folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    lines = metrics.read(folder / "metrics.jsonl")
    last = lines[-1]
    rate = last["tokens"] / max(last["seconds"], 1e-9)
    return {
        "num_examples": len(rows),
        "num_steps": last["step"],
        "num_tokens": last["tokens"],
        "num_trainable": adapter.num_saved(folder / "adapter"),
        "precision": _precision(config).dtype,
        "first_loss": lines[0]["loss"],
        "last_loss": last["loss"],
        "train_seconds": last["seconds"],
        "tokens_per_second": round(rate, 1),
        "summary": f"{last['step']} steps, loss {lines[0]['loss']:.2f} to {last['loss']:.2f}, {rate:.0f} tok/s",
    }


def _train(config: Config, rows: Dataset, folder: Path) -> None:
    import torch
    from transformers import set_seed

    torch.set_num_threads(config.train.threads or os.cpu_count() or 1)
    precision = _precision(config)
    say(f"precision {precision.dtype}: {precision.reason}")
    ref = models.fetch(models.resolve(config.model.name, revision=config.model.revision))
    tokenizer = models.load_tokenizer(ref, trust_remote_code=config.model.trust_remote_code)
    set_seed(config.run.seed)
    # On a processor the weights stay float32 and only products are taken in 16 bits, so that the residual stream is not
    # rounded at every layer: at 135M parameters that decides a seventh of the answers. A GPU's memory and bandwidth
    # want 16-bit weights.
    stored = precision.dtype if torch.cuda.is_available() else "float32"
    base = models.load_model(ref, dtype=stored, trust_remote_code=config.model.trust_remote_code)
    model = adapter.attach(base, config.adapter)
    sft.train(model, tokenizer, rows, config.train, compute=precision.dtype, seed=config.run.seed, folder=folder)
    adapter.save(model, config.model.name, config.model.revision, folder / "adapter")


def _precision(config: Config) -> models.Precision:
    if config.train.precision == "auto":
        return models.detect_precision()
    return models.Precision(config.train.precision, "train.precision says so")


def _rows(folder: Path) -> Dataset:
    from datasets import load_from_disk

    rows = load_from_disk(str(folder))
    if len(rows) == 0:
        raise ArtifactError(f"{folder} holds no example to train on", hint="look at prepare/report.json for the drops")
    return rows
