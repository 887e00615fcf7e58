"""LoRA and DoRA adapters through PEFT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.errors import ConfigError
from fintune.options import AdapterOptions
from fintune.tuning.quiet import quiet_libraries

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


def attach(model: PreTrainedModel, options: AdapterOptions) -> PeftModel:
    """Put a fresh adapter on a model; its weights are float32, in which small updates are not rounded away.

    Under autocast the products are taken in the type of the base weights, as PEFT would not do by itself: it casts the
    activations up to the adapter's type, which costs a third of the speed on a CPU.

    Args:
        model: The base model, frozen from here on.
        options: Kind, rank, scale, dropout and targets.

    Raises:
        ConfigError: A target that the model does not have, with those that it has.
    """
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = list(options.targets)
    if targets == ["all-linear"]:
        targets = "all-linear"
    else:
        check_targets(model, options.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        use_dora=options.kind == "dora",
    )
    with quiet_libraries():
        adapted: PeftModel = get_peft_model(model, config)
    return adapted


def compute_in_base_type(model: nn.Module) -> None:
    """Let autocast choose the type of the adapter's products; call only where training runs under autocast."""
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def store_frozen_weights(model: PeftModel, dtype: str) -> int:
    """Keep the weights of adapted linear layers in the type that autocast takes their products in.

    The numbers are those that autocast would make of them in every step; they are made once. Embeddings, norms and a
    tied head keep their type. DoRA's norms are taken from the weights, so its layers are left as they are.

    Args:
        model: From :func:`attach`, with float32 weights.
        dtype: Name of the torch type.

    Returns:
        Number of weights that changed their type.
    """
    import torch
    from peft.tuners.lora import Linear

    num_stored = 0
    for layer in model.modules():
        if isinstance(layer, Linear) and not any(layer.use_dora.values()):
            weight = layer.get_base_layer().weight
            weight.data = weight.data.to(getattr(torch, dtype))
            num_stored += 1
    return num_stored


def check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    """Refuse a target that matches no linear layer.

    Raises:
        ConfigError: With the names that there are.
    """
    known = linear_names(model)
    for target in targets:
        if target not in known:
            raise ConfigError(
                f"adapter.targets: the model has no linear layer {target!r}",
                hint=f"it has {', '.join(sorted(known))}; or use all-linear",
            )


def linear_names(model: nn.Module) -> set[str]:
    """Last names of the linear layers but the output head: ``q_proj``, ``down_proj`` ..."""
    from torch import nn

    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def num_saved(folder: Path) -> int:
    """Numbers in a saved adapter."""
    from math import prod

    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        return sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118 - no mapping


def save(model: PeftModel, base_name: str, revision: str | None, folder: Path) -> None:
    """Write the adapter in PEFT's format; the folder appears at once, with everything in it.

    Args:
        model: The trained model.
        base_name: Name of the base model as the user wrote it, for ``base_model_name_or_path``.
        revision: Its revision on the hub.
        folder: Where to; an older one is replaced.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base_name, revision
    # Without an explicit "no", PEFT looks the base model up on the hub to see whether its vocabulary grew.
    with quiet_libraries():
        model.save_pretrained(str(beside), save_embedding_layers=False)
    (beside / "README.md").unlink(missing_ok=True)  # an empty form; the run's own card says more
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)
