"""The process that trains by Unsloth, see `fintune.training.unsloth`.

The command is ``python -m fintune.training.unsloth_worker ORDER``.

Unsloth makes the model and its adapter; order of the examples, masks, loop, log and checkpoints are those of
:func:`fintune.training.sft.train`.
"""

from __future__ import annotations

import json
import random
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import Config
from fintune.errors import FintuneError
from fintune.training import launch
from fintune.training.unsloth import FILE
from fintune.util.memory import advice_on_memory

if TYPE_CHECKING:
    from datasets import Dataset

_LIBRARIES = (
    "unsloth",
    "unsloth_zoo",
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
)
_EXTRAS = ("", "huggingface", "huggingfacenotorch")
"""Under which Unsloth's own requirements stand."""


def main() -> None:
    """Check, or train; leaves what stopped it for the process that started it."""
    if sys.argv[1] == "--check":
        sys.stdout.write(json.dumps({"versions": versions(), "obstacle": obstacle()}) + "\n")
        return
    order = Path(sys.argv[1])
    launch.end_with_parent()
    try:
        run(json.loads(order.read_text(encoding="utf-8")))
    except FintuneError as error:
        launch.write_error(order, 0, error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def versions() -> dict[str, str]:
    """Installed versions of the libraries that matter here."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def obstacle() -> str:
    """Why Unsloth cannot work here, in words; empty where it can."""
    here = versions()
    if "unsloth" not in here:
        return "unsloth is not installed"
    wrong = _unmet(here)
    if wrong:
        return f"unsloth {here['unsloth']} does not take {', '.join(wrong)}"
    return "" if _cuda() else "there is no CUDA GPU"


def _unmet(here: dict[str, str]) -> list[str]:
    """Versions that Unsloth's own metadata rules out, with what they ask for."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    for package in ("unsloth", "unsloth_zoo"):
        for line in (metadata.requires(package) or []) if package in here else []:
            needed = Requirement(line)
            name = needed.name.replace("-", "_").lower()
            applies = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in _EXTRAS)
            if name in here and applies and not needed.specifier.contains(here[name], prereleases=True):
                found[name] = f"{name} {here[name]} (but {needed.specifier})"
    return list(found.values())


def _cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def run(order: dict[str, Any]) -> None:
    """Train by an order.

    Raises:
        FintuneError: As :func:`fintune.training.sft.train`.
        ResourceError: Out of memory.
    """
    import unsloth  # noqa: F401, I001 - before the libraries that it changes
    import torch
    from datasets import load_from_disk

    from fintune.models import load as models
    from fintune.training import adapter, sft
    from fintune.training.evaluate import Evaluation

    config = Config.model_validate(order["config"])
    folder = Path(order["folder"])
    rows = load_from_disk(order["tokens"])
    tokenizer = models.load_tokenizer(models.fetch(order["model"]))
    evaluation = None
    eval_rows = _drawn(load_from_disk(order["eval_tokens"]), config)
    if config.train.eval_steps is not None:
        evaluation = Evaluation(eval_rows)
    hint = "lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps"
    hint += "" if _recomputes(config) else ", or leave train.gradient_checkpointing empty"
    with advice_on_memory(hint, during="training with Unsloth"):
        longest = max(len(ids) for split in (rows, eval_rows) for ids in split["input_ids"])
        model = _model(config, order["model"], order["compute"], longest)
        sft.train(
            model,
            tokenizer,
            rows,
            config.train.model_copy(update={"fused_layers": "never", "gradient_checkpointing": _recomputes(config)}),
            compute=order["compute"],
            seed=config.run.seed,
            folder=folder,
            evaluation=evaluation,
        )
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None
    (folder / FILE).write_text(json.dumps({"versions": versions(), "peak_gib": peak}) + "\n", encoding="utf-8")
    adapter.save(model, config.model.name, config.model.revision, folder / "adapter", base=Path(order["model"]))


def _model(config: Config, folder: str, compute: str, longest: int) -> Any:
    """Base model and fresh adapter as Unsloth makes them."""
    import torch
    from transformers import set_seed
    from unsloth import FastLanguageModel

    from fintune.training.trainers import WIDTHS

    set_seed(config.run.seed)
    options = config.adapter
    model, _ = FastLanguageModel.from_pretrained(
        model_name=folder,
        # Unsloth cuts what is longer, but not its labels, and batches are padded to a multiple.
        max_seq_length=max(-(-longest // WIDTHS) * WIDTHS, 64),
        dtype=getattr(torch, compute),
        load_in_4bit=config.model.quantization == "nf4",
        use_exact_model_name=True,
        local_files_only=True,
    )
    parts = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model,
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        bias="none",
        target_modules=parts if "all-linear" in options.target_modules else list(options.target_modules),
        use_gradient_checkpointing="unsloth" if _recomputes(config) else False,
        use_rslora=options.use_rslora,
        use_dora=options.kind == "dora",
        random_state=config.run.seed,
    )


def _recomputes(config: Config) -> bool:
    """Unsloth's own choice is to recompute."""
    return config.train.gradient_checkpointing is not False


def _drawn(rows: Dataset, config: Config) -> Dataset:
    """The examples that this package's own training would evaluate on."""
    number = config.train.max_eval_samples
    if number is None or number >= len(rows):
        return rows
    return rows.select(sorted(random.Random(config.run.seed).sample(range(len(rows)), number)))  # noqa: S311


if __name__ == "__main__":
    main()
