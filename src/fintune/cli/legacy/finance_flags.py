"""The flags of ``train_financial_model.py`` and ``train.py``, with the guide's defaults (docs/finance.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"
"""What the hub calls the guide's model."""
INVESTOPEDIA = "hub:FinLang/investopedia-instruction-tuning-dataset"
INVESTOPEDIA_ROWS = 22_500
_PATH = click.Path(path_type=Path)
_BITS = click.Choice(["auto", "4bit", "16bit"])

_TRAINING: tuple[tuple[str, Any, Any, str], ...] = (
    ("model_name", str, MODEL, "Hub id, local folder or builtin:smollm2-135m."),
    ("dataset_folder", _PATH, Path("datasets"), "Folder of JSON, JSONL, CSV or Parquet conversations of any shape."),
    ("resume_from_checkpoint", str, None, "Go on with the unfinished training in the adapter's folder."),
    ("learning_rate", float, 1e-5, "Peak learning rate, on a cosine schedule."),
    ("num_train_epochs", float, 3.0, "Passes over the data."),
    ("max_seq_length", int, 4096, "Tokens of a conversation; later turns that do not fit are left out."),
    ("gradient_accumulation_steps", int, 8, "Forward passes an optimiser step."),
    ("per_device_train_batch_size", int, 1, "Conversations a forward pass."),
    ("lora_r", int, 32, "Rank of the adapter."),
    ("lora_alpha", int, 64, "Scale of the adapter."),
    ("training_quantization", _BITS, "auto", "Base weights while training; auto is 4bit on a CUDA GPU, else 16bit."),
    ("extra_train_args", str, "", "More options in one string: 'train.weight_decay=0.01' or '--weight_decay 0.01'."),
)
_PIPELINE: tuple[tuple[str, Any, Any, str], ...] = (
    (
        "llama_cpp_path",
        _PATH,
        None,
        "Convert and quantise with this llama.cpp checkout instead of the built-in export.",
    ),
    ("lora_output_dir", _PATH, Path("financial_lora"), "Gets the adapter and tokenizer; the run lies in its run/."),
    ("merged_model_dir", _PATH, Path("merged_financial_fp16"), "Gets the merged 16-bit Hugging Face folder."),
    ("gguf_fp16_path", _PATH, Path("financial_model_fp16.gguf"), "Gets the 16-bit GGUF file."),
    ("gguf_q4_path", _PATH, Path("financial_model_q4_k_m.gguf"), "Gets the quantised GGUF file."),
    ("quantization_target", str, "Q4_K_M", "Type of the quantised file."),
    (
        "merge_device_map",
        str,
        "cpu",
        "Taken for compatibility: merging is done on the CPU, in memory bounded by the largest tensor.",
    ),
    ("investopedia", str, INVESTOPEDIA, "Where Investopedia's rows come from: hub:OWNER/NAME, a file, or none."),
    ("investopedia_rows", int, INVESTOPEDIA_ROWS, "So many of them, drawn by a hash."),
)
_TRAINING_STAGES = ("prepare", "train", "guard")
_STAGES = ("preflight", *_TRAINING_STAGES, "merge", "export", "replay", "report")
SKIPS = {
    "skip_dataset_prep": "prepare",
    "skip_training": "train",
    "skip_merge": "merge",
    "skip_quantization": "export",
}
"""Flags that leave a stage out."""


def _option(name: str, kind: Any, default: Any, meaning: str) -> click.Option:
    return click.Option([f"--{name}"], type=kind, default=default, show_default=default not in (None, ""), help=meaning)


def _common(stages: str) -> list[click.Parameter]:
    return [
        click.Option(["--redo"], multiple=True, metavar="STAGE", help=f"Make a stage anew: {stages}."),
        click.Option(["--strict"], is_flag=True, help="Stop at the first row that cannot be used."),
        click.Option(["--dry_run"], is_flag=True, help="Say what would be done, do nothing."),
    ]


def pipeline_flags() -> list[click.Parameter]:
    """Those of ``train_financial_model.py``."""
    skips = [
        click.Option([f"--{flag}"], is_flag=True, help=f"Leave {stage} as it lies.") for flag, stage in SKIPS.items()
    ]
    return [*(_option(*each) for each in (*_TRAINING, *_PIPELINE)), *skips, *_common(", ".join(_STAGES))]


def train_flags() -> list[click.Parameter]:
    """Those of ``train.py``."""
    output = _option("output_dir", _PATH, Path("financial_lora"), "Gets the adapter; the run lies in its run/.")
    return [*(_option(*each) for each in _TRAINING), output, *_common(", ".join(_TRAINING_STAGES))]
