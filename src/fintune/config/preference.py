"""Which options go together with preference training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fintune.config.run import Config

BETA = 0.1


def obstacle(config: Config) -> str | None:
    """What of a configuration is not proven with its ``train.objective``, and what to do; None where all is.

    Args:
        config: Any run.
    """
    train, adapter = config.train, config.adapter
    asked = f"train.objective: {train.objective}"
    weighed = next(
        (name for name in ("desirable_weight", "undesirable_weight") if getattr(train, name) is not None), None
    )
    rows = "preference rows (prompt, chosen, rejected)"
    if train.objective == "kto":
        rows += " or labelled answers (prompt, completion, label)"
    if train.objective == "sft":
        if train.beta != BETA:
            return "train.beta has no say in train.objective: sft; set dpo, orpo or kto, or remove it"
        if train.rpo_alpha:
            return "train.rpo_alpha belongs to train.objective: dpo; remove it"
        return f"train.{weighed} belongs to train.objective: kto; remove it" if weighed else None
    found = {
        f"{asked} compares answers, which data.source: {config.data.source} lacks; set data.source: chat and name "
        f"{rows} in data.sources": config.data.source != "chat",
        f"{asked} is unproven with adapter.kind: full, since its reference is the model without the adapter; use lora "
        "or dora": adapter.kind == "full",
        f"{asked} is unproven with adapter.init_lora_weights: {adapter.init_lora_weights}, whose adapter changes the "
        "model before the first step; use default": adapter.init_lora_weights != "default",
        f"{asked} takes no adapter.lora_dropout: model and reference must be the same at first; set it to 0": (
            adapter.lora_dropout > 0
        ),
        f"{asked} is unproven with train.fused_layers: always; set it to auto or never": train.fused_layers == "always",
        f"{asked} is unproven with train.select_checkpoint: best_accuracy, which needs gold programs; use best_loss": (
            train.select_checkpoint == "best_accuracy"
        ),
        f"train.rpo_alpha belongs to train.objective: dpo, not to {train.objective}; remove it": (
            train.rpo_alpha > 0 and train.objective != "dpo"
        ),
        f"train.{weighed} belongs to train.objective: kto, not to {train.objective}; remove it": (
            weighed is not None and train.objective != "kto"
        ),
        f"{asked} compares answers of different prompts in a forward pass; set "
        "train.per_device_train_batch_size to 2 or more": (
            train.objective == "kto" and train.per_device_train_batch_size < 2
        ),
    }
    return next((reason for reason, holds in found.items() if holds), None)
