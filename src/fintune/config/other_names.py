"""Other names of options: earlier ones, and those of other programs. They are used for hints and never accepted."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

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
"""Present name of an option by its earlier name."""

_OTHER_PROGRAMS: Mapping[str, str] = {
    "base_model": "model.name",
    "bf16": "train.dtype=bfloat16",
    "dataset": "data.sources",
    "evaluation_strategy": "train.eval_strategy",
    "fp16": "train.dtype=float16",
    "load_best_model_at_end": "train.select_checkpoint=best_loss",
    "load_in_4bit": "model.quantization=nf4",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lr": "train.learning_rate",
    "max_seq_length": "prompt.max_length",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "output_dir": "run.dir",
    "random_state": "run.seed",
    "rank": "adapter.r",
    "seed": "run.seed",
    "use_dora": "adapter.kind=dora",
    "use_gradient_checkpointing": "train.gradient_checkpointing",
}
"""Option by the name that transformers, TRL, PEFT or Unsloth give it, as ``option=value`` if the name implies one."""

_FIXED: Mapping[str, str] = {
    "adam_beta1": "it is always 0.9",
    "adam_epsilon": "it is always 1e-8",
    "group_by_length": "batches always hold rows of similar length",
    "packing": "rows are never packed into one, and the fused layers need no padding",
}
"""Why an option of another program does not exist here."""


def other_name(name: str) -> str | None:
    """Return the option that was called so before, or that another program calls so, or None.

    The name is a dotted key such as ``train.epochs``, or a single name such as ``lr``. The result is a dotted key, or
    ``key=value`` if the name implies the value.
    """
    leaf = name.rpartition(".")[2]
    leaves = {old.rpartition(".")[2]: new for old, new in RENAMED.items()}
    return RENAMED.get(name) or _OTHER_PROGRAMS.get(leaf) or leaves.get(name)


def suggest_option(prefix: str, name: str, names: Sequence[str], known: Sequence[str], sections: Sequence[str]) -> str:
    """Return a hint for an unknown option.

    Args:
        prefix: Its section with a dot, such as ``train.``, or "".
        name: Its name in that section.
        names: Names of the options of that section.
        known: Dotted keys of all options.
        sections: Names of all sections.
    """
    key = f"{prefix}{name}"
    if other := other_name(key):
        return f"did you mean {other}?"
    if name in _FIXED:
        return f"{_FIXED[name]}; leave it out"
    initials = [option for option in names if "".join(word[0] for word in option.split("_")) == name]
    near = initials or difflib.get_close_matches(name, names, n=1) or [option for option in names if name in option]
    if near:
        return f"did you mean {prefix}{near[0]}?"
    # The section alone is no likeness: train.zzz is not train.eval.
    leaves = {option.rpartition(".")[2]: option for option in known}
    near = difflib.get_close_matches(key, known if prefix else [*known, *sections], n=1, cutoff=0.8)
    near = near or [leaves[leaf] for leaf in difflib.get_close_matches(name, list(leaves), n=1)]
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"


def suggest_key(name: str, names: Sequence[str]) -> str:
    """Return a hint for an unknown key of an entry of ``data.sources``."""
    renamed = {"shape": "format", "licence": "license"}
    near = [renamed[name]] if name in renamed else difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"
