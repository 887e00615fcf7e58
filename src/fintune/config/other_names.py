"""Names that an option had before, or that other programs give it; used for hints only, never accepted."""

from __future__ import annotations

from collections.abc import Mapping

RENAMED: Mapping[str, str] = {
    "adapter.lora_alpha": "adapter.lora_alpha",
    "adapter.lora_dropout": "adapter.lora_dropout",
    "adapter.init_lora_weights": "adapter.init_lora_weights",
    "adapter.use_rslora": "adapter.use_rslora",
    "adapter.target_modules": "adapter.target_modules",
    "data.max_eval_samples": "data.max_eval_samples",
    "data.max_train_samples": "data.max_train_samples",
    "export.imatrix": "export.imatrix",
    "model.quantization": "model.quantization",
    "predict.num_fewshot": "predict.num_fewshot",
    "predict.dtype": "predict.dtype",
    "publish.license": "publish.license",
    "publish.artifacts": "publish.artifacts",
    "train.gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "train.per_device_train_batch_size": "train.per_device_train_batch_size",
    "train.save_steps": "train.save_steps",
    "train.rpo_alpha": "train.rpo_alpha",
    "train.desirable_weight": "train.desirable_weight",
    "train.num_train_epochs": "train.num_train_epochs",
    "train.max_eval_samples": "train.max_eval_samples",
    "train.select_checkpoint": "train.select_checkpoint",
    "train.logging_steps": "train.logging_steps",
    "train.save_total_limit": "train.save_total_limit",
    "train.optim": "train.optim",
    "train.early_stopping_patience": "train.early_stopping_patience",
    "train.dtype": "train.dtype",
    "train.lr_scheduler_type": "train.lr_scheduler_type",
    "train.undesirable_weight": "train.undesirable_weight",
}
"""Earlier name of an option to its name now."""

RENAMED_IN_SOURCES: Mapping[str, str] = {"shape": "format", "licence": "license"}
"""The same for the keys of an entry of ``data.sources``."""


def renamed(name: str) -> str | None:
    """Return the present name of an option that was renamed, or None.

    Args:
        name: A dotted key such as ``train.num_train_epochs``, or its last part alone.
    """
    if name in RENAMED or "." in name:
        return RENAMED.get(name)
    leaves = {old.rpartition(".")[2]: new for old, new in RENAMED.items()}
    return leaves.get(name)
