"""Names that an option had before, or that other programs give it; used for hints only, never accepted."""

from __future__ import annotations

from collections.abc import Mapping

RENAMED: Mapping[str, str] = {
    "adapter.alpha": "adapter.lora_alpha",
    "adapter.dropout": "adapter.lora_dropout",
    "adapter.init": "adapter.init_lora_weights",
    "adapter.rslora": "adapter.use_rslora",
    "adapter.targets": "adapter.target_modules",
    "data.max_eval": "data.max_eval_samples",
    "data.max_train": "data.max_train_samples",
    "export.importance": "export.imatrix",
    "model.load": "model.quantization",
    "predict.num_shots": "predict.num_fewshot",
    "predict.precision": "predict.dtype",
    "publish.licence": "publish.license",
    "publish.what": "publish.artifacts",
    "train.accumulation": "train.gradient_accumulation_steps",
    "train.batch_size": "train.per_device_train_batch_size",
    "train.checkpoint_steps": "train.save_steps",
    "train.chosen_weight": "train.rpo_alpha",
    "train.desired_weight": "train.desirable_weight",
    "train.epochs": "train.num_train_epochs",
    "train.eval_examples": "train.max_eval_samples",
    "train.keep": "train.select_checkpoint",
    "train.log_steps": "train.logging_steps",
    "train.num_checkpoints": "train.save_total_limit",
    "train.optimizer": "train.optim",
    "train.patience": "train.early_stopping_patience",
    "train.precision": "train.dtype",
    "train.schedule": "train.lr_scheduler_type",
    "train.undesired_weight": "train.undesirable_weight",
}
"""Earlier name of an option to its name now."""

RENAMED_IN_SOURCES: Mapping[str, str] = {"shape": "format", "licence": "license"}
"""The same for the keys of an entry of ``data.sources``."""


def renamed(name: str) -> str | None:
    """Return the present name of an option that was renamed, or None.

    Args:
        name: A dotted key such as ``train.epochs``, or its last part alone.
    """
    if name in RENAMED or "." in name:
        return RENAMED.get(name)
    leaves = {old.rpartition(".")[2]: new for old, new in RENAMED.items()}
    return leaves.get(name)
