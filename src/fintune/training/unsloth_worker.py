"""The process that trains with Unsloth, ``python -m fintune.training.unsloth_worker JOB``.

Unsloth makes the model and its adapter. Order of the examples, masks, loop, log and checkpoints are those of
:func:`fintune.training.sft.train_model`. The files are described in ``fintune.training.unsloth``.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from fintune.config import Config
from fintune.errors import FintuneError
from fintune.training import distributed
from fintune.training.memory.model import GIB, LINEAR_LAYERS
from fintune.training.unsloth import VERSIONS_FILE
from fintune.util.memory import advice_on_memory
from fintune.util.sampling import draw_indices

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
"""Extras under which Unsloth's metadata lists its requirements."""


def run_worker() -> None:
    """Check or train; write the error that stopped it for the process that started this one."""
    if sys.argv[1] == "--check":
        sys.stdout.write(json.dumps({"versions": versions(), "problem": environment_problem()}) + "\n")
        return
    job_file = Path(sys.argv[1])
    distributed.exit_with_parent()
    try:
        run_job(json.loads(job_file.read_text(encoding="utf-8")))
    except FintuneError as error:
        distributed.write_error(job_file, 0, error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def versions() -> dict[str, str]:
    """Return the installed versions of the libraries that matter here."""
    installed = {}
    for name in _LIBRARIES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def environment_problem() -> str:
    """Return why Unsloth cannot work here; an empty string if it can."""
    installed = versions()
    if "unsloth" not in installed:
        return "unsloth is not installed"
    unmet = _unmet_requirements(installed)
    if unmet:
        return f"unsloth {installed['unsloth']} does not support {', '.join(unmet)}"
    return "" if _has_cuda() else "there is no CUDA GPU"


def _unmet_requirements(installed: dict[str, str]) -> list[str]:
    """Return the installed versions that Unsloth's own metadata rules out, each with the required ones."""
    from packaging.requirements import Requirement

    unmet: dict[str, str] = {}
    for package in ("unsloth", "unsloth_zoo"):
        for line in (metadata.requires(package) or []) if package in installed else []:
            required = Requirement(line)
            name = required.name.replace("-", "_").lower()
            applies = required.marker is None or any(required.marker.evaluate({"extra": extra}) for extra in _EXTRAS)
            if name in installed and applies and not required.specifier.contains(installed[name], prereleases=True):
                unmet[name] = f"{name} {installed[name]} (it requires {required.specifier})"
    return list(unmet.values())


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def run_job(job: dict[str, Any]) -> None:
    """Train as the job says.

    Raises:
        FintuneError: As :func:`fintune.training.sft.train_model`.
        ResourceError: Out of memory.
    """
    import unsloth  # noqa: F401, I001 - before the libraries that it changes
    import torch
    from datasets import load_from_disk

    from fintune.models import load as models
    from fintune.training import lora, sft
    from fintune.training.evaluate import Evaluation

    config = Config.model_validate(job["config"])
    folder = Path(job["folder"])
    rows, eval_rows = load_from_disk(job["tokens"]), load_from_disk(job["eval_tokens"])
    eval_rows = eval_rows.select(draw_indices(len(eval_rows), config.train.max_eval_samples, config.run.seed))
    # Unsloth recomputes activations by default.
    recomputes = config.train.gradient_checkpointing is not False
    hint = "lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps"
    hint += "" if recomputes else ", or leave train.gradient_checkpointing empty"
    with advice_on_memory(hint, during="training with Unsloth"):
        longest = max(len(ids) for split in (rows, eval_rows) for ids in split["input_ids"])
        model = _load_model(config, job["model"], job["compute"], longest, recomputes=recomputes)
        sft.train_model(
            model,
            models.load_tokenizer(models.fetch(job["model"])),
            rows,
            config.train.model_copy(update={"fused_layers": "never", "gradient_checkpointing": recomputes}),
            compute=job["compute"],
            seed=config.run.seed,
            folder=folder,
            evaluation=Evaluation(eval_rows) if config.train.has_evaluations else None,
        )
    peak = round(torch.cuda.max_memory_allocated() / GIB, 2) if torch.cuda.is_available() else None
    (folder / VERSIONS_FILE).write_text(json.dumps({"versions": versions(), "peak_gib": peak}) + "\n", encoding="utf-8")
    lora.save_adapter(model, config.model.name, config.model.revision, folder / "adapter", base=Path(job["model"]))


def _load_model(config: Config, folder: str, compute: str, longest: int, *, recomputes: bool) -> Any:
    """Load the base model with a new adapter through Unsloth."""
    import torch
    from transformers import set_seed
    from unsloth import FastLanguageModel

    from fintune.training.batches import WIDTH_MULTIPLE

    set_seed(config.run.seed)
    options = config.adapter
    model, _ = FastLanguageModel.from_pretrained(
        model_name=folder,
        # Unsloth truncates longer inputs but not their labels, and batches are padded to a multiple.
        max_seq_length=max(-(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, 64),
        dtype=getattr(torch, compute),
        load_in_4bit=config.model.quantization == "nf4",
        use_exact_model_name=True,
        local_files_only=True,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        bias="none",
        target_modules=list(LINEAR_LAYERS if "all-linear" in options.target_modules else options.target_modules),
        use_gradient_checkpointing="unsloth" if recomputes else False,
        use_rslora=options.use_rslora,
        use_dora=options.kind == "dora",
        random_state=config.run.seed,
    )


if __name__ == "__main__":
    run_worker()
