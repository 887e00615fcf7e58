"""``fintune train``: an adapter for the base model, from the tokenised examples of ``prepare``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import models
from ..errors import ArtifactError
from ..options import Config
from ..progress import console
from ..tuning import adapter, metrics, sft

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
    import torch
    from transformers import set_seed

    torch.set_num_threads(config.train.threads or os.cpu_count() or 1)
    rows = _rows(inputs["prepare"] / "tokens" / "train")
    precision = models.detect_precision()
    dtype = precision.dtype if config.train.precision == "auto" else config.train.precision
    reason = precision.reason if config.train.precision == "auto" else "train.precision says so"
    console.print(f"  precision {dtype}: {reason}")
    ref = models.fetch(models.resolve(config.model.name, revision=config.model.revision))
    tokenizer = models.load_tokenizer(ref, trust_remote_code=config.model.trust_remote_code)
    set_seed(config.run.seed)
    with sft.quiet_libraries():
        base = models.load_model(ref, dtype=dtype, trust_remote_code=config.model.trust_remote_code)
        model = adapter.attach(base, config.adapter)
    sft.train(model, tokenizer, rows, config.train, seed=config.run.seed, folder=folder)
    adapter.save(model, config.model.name, config.model.revision, folder / "adapter")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    lines = metrics.read(folder / "metrics.jsonl")
    last = lines[-1]
    return {
        "num_examples": len(rows),
        "num_steps": last["step"],
        "num_tokens": last["tokens"],
        "num_trainable": adapter.num_trainable(model),
        "precision": dtype,
        "first_loss": lines[0]["loss"],
        "last_loss": last["loss"],
        "train_seconds": last["seconds"],
        "tokens_per_second": round(last["tokens"] / max(last["seconds"], 1e-9), 1),
    }


def _rows(folder: Path) -> Dataset:
    from datasets import load_from_disk

    rows = load_from_disk(str(folder))
    if len(rows) == 0:
        raise ArtifactError(f"{folder} holds no example to train on", hint="look at prepare/report.json for the drops")
    return rows
