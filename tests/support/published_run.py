"""A finished run of the tiny model, as the stages leave it but made in a second, for what publishes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fintune.config import Config
from fintune.manifest import Key, Manifest, hash_files
from fintune.training import lora
from support.example_run import manifest, predictions, prepare_report, records, write_score

KINDS = ("base", "adapter", "merged", "F16", "Q4_K_M")
TRAIN_OPTIONS: dict[str, Any] = {
    "model.name": "x",
    "model.quantization": "none",
    "adapter.kind": "dora",
    "adapter.r": 4,
    "adapter.lora_alpha": 8,
    "adapter.lora_dropout": 0.0,
    "adapter.init_lora_weights": "default",
    "adapter.target_modules": ["all-linear"],
    "train.learning_rate": 1e-4,
    "train.lr_scheduler_type": "cosine",
    "train.per_device_train_batch_size": 2,
    "train.gradient_accumulation_steps": 4,
    "train.num_train_epochs": 3.0,
    "train.dtype": "auto",
}
TRAIN_FACTS: dict[str, Any] = {
    "num_steps": 120,
    "num_tokens": 1_092_000,
    "num_trainable": 12_345,
    "mean_first_loss": 2.5,
    "mean_last_loss": 0.125,
    "num_mean_losses": 10,
    "train_seconds": 492.0,
    "tokens_per_second": 2219.5,
    "precision": "bfloat16",
}
REPLAY = {
    "num_positions": 321,
    "replayed": {
        "adapter": {"same_best_token_share": 1.0, "mean_kl": 0.0, "perplexity": 1.25},
        "Q4_K_M": {"same_best_token_share": 0.9421, "mean_kl": 0.0123, "perplexity": 1.3},
    },
}


def write_run(config: Config, base: Path) -> None:
    """Every stage that a card tells of, into ``config.folder``.

    Args:
        config: Its folder is written.
        base: The tiny model.
    """
    folder, items = config.folder, records()
    report = prepare_report()
    _write(folder / "prepare" / "report.json", report.model_dump_json())
    lines = [json.dumps({"id": item.id, "messages": [], "completion": "x"}) for item in items]
    _write(folder / "prepare" / "train.jsonl", "\n".join(lines) + "\n")
    options = {
        "data.source": config.data.source,
        "data.train": str(config.data.train),
        "data.eval": str(config.data.eval),
    }
    prepared = finish(folder / "prepare", "prepare", options=options)
    save_adapter(base, str(config.model.name), folder / "train" / "adapter")
    trained = finish(
        folder / "train", "train", options=TRAIN_OPTIONS, facts=TRAIN_FACTS, inputs={"prepare": prepared.digest}
    )
    shutil.copytree(base, folder / "merge")
    (folder / "merge" / "LICENSE").write_text("Test licence", encoding="utf-8")
    merged = finish(folder / "merge", "merge", inputs={"prepare": prepared.digest, "train": trained.digest})
    for kind in ("F16", "Q4_K_M"):
        _write(folder / "export" / f"{config.run.name}-{kind}.gguf", f"GGUF of {kind} " * 2000)
    _write(folder / "export" / "Modelfile", f"FROM ./{config.run.name}-Q4_K_M.gguf\n")
    finish(folder / "export", "export", inputs={"merge": merged.digest})
    _write(folder / "replay" / "replay.json", "{}")
    finish(folder / "replay", "replay", facts=REPLAY)
    for kind in KINDS:
        place = folder / "score" / kind
        place.mkdir(parents=True)
        write_score(place, items, predictions(items, kind))
        finish(place, f"score/{kind}", inputs={"prepare": prepared.digest})


def save_adapter(base: Path, name: str, folder: Path) -> None:
    """A DoRA adapter that changes what the model says, in PEFT's format."""
    import torch

    from fintune.config import AdapterOptions
    from fintune.models import load as models

    model = models.load_model(models.fetch(str(base)), dtype="float32", device="cpu")
    adapted = lora.attach_adapter(model, AdapterOptions(kind="dora", r=4, lora_alpha=8))
    torch.manual_seed(1)
    for weight_name, weight in adapted.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.2)
    folder.parent.mkdir(parents=True)
    lora.save_adapter(adapted, name, None, folder, base=base)


def finish(
    folder: Path,
    step: str,
    *,
    options: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
) -> Manifest:
    """Write the manifest of what lies in a folder."""
    key = Key(step=step, options=options or {}, sources={}, inputs=inputs or {})
    made = manifest(step).model_copy(update={"key": key, "facts": facts or {}, "outputs": hash_files(folder)})
    _write(folder / "manifest.json", made.model_dump_json())
    return made


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
