"""LoRA and DoRA adapters through PEFT, on 16-bit or 4-bit weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.config import AdapterOptions
from fintune.errors import ConfigError
from fintune.models import adapter as adapters
from fintune.util.console import quiet_libraries

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

    targets: str | list[str] = list(options.target_modules)
    if targets == ["all-linear"]:
        targets = "all-linear"
    else:
        check_targets(model, options.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        use_dora=options.kind == "dora",
        use_rslora=options.use_rslora,
        init_lora_weights="pissa" if options.init_lora_weights == "pissa" else True,
    )
    with quiet_libraries():
        adapted: PeftModel = get_peft_model(model, config)
    for module in adapted.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else the first evaluation turns 4-bit weights into an order that the backward pass does not read.
            module.support_avx512bf16_for_cpu = False
    return adapted


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Around the making of a trainer: TRL rounds the adapter of 4-bit weights to bfloat16.

    There a step of 1e-5 leaves a weight above 0.005 where it is.
    """
    before = {}
    if getattr(model, "is_loaded_in_4bit", False):
        before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if name in before:
            weight.data = before[name]


def take_up_quantisation_error(model: PeftModel, folder: Path) -> int:
    """Begin the adapters at the best low-rank image of what 4-bit rounding lost (one pass of LoftQ, arXiv 2310.08659).

    As PEFT's ``replace_lora_weights_loftq``, which needs a GPU and leaves the scale alpha / r out.

    Args:
        model: From :func:`attach`, on 4-bit weights.
        folder: The base model's, with the weights as they were.

    Returns:
        Number of layers.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), path)
    num_layers = 0
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        packed = layer.get_base_layer().weight
        key = f"{name}.weight"
        with safe_open(files[key], framework="pt") as tensors:
            exact = tensors.get_tensor(key).to(packed.device, torch.float32)
        lost = exact - dequantize_4bit(packed.data, packed.quant_state).float()
        left, sizes, right = torch.linalg.svd(lost, full_matrices=False)
        (adapter,) = layer.active_adapters
        rank = layer.r[adapter]
        root = (sizes[:rank] / layer.scaling[adapter]).sqrt()
        first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        first.data.copy_(root[:, None] * right[:rank])
        second.data.copy_(left[:, :rank] * root)
        num_layers += 1
    return num_layers


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
                f"adapter.target_modules: the model has no linear layer {target!r}",
                hint=f"it has {', '.join(sorted(known))}; or use all-linear",
                option="adapter.target_modules",
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


def _subtract(start: Path, folder: Path) -> None:
    """Make a saved adapter the difference to where it began: BA - B'A' = [B, -B'][A; A'], with the same scale.

    PEFT's own conversion loses DoRA's magnitudes. They stay as they are: the sum of base and update is the same matrix.
    """
    import torch
    from safetensors.torch import load_file, save_file

    end, begin = (load_file(path / "adapter_model.safetensors") for path in (folder, start))
    joined = dict(end)
    for name, weight in end.items():
        if name.endswith("lora_A.weight"):
            joined[name] = torch.cat([weight, begin[name]], dim=0)
        elif name.endswith("lora_B.weight"):
            joined[name] = torch.cat([weight, -begin[name]], dim=1)
    save_file(joined, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    growth = 2**0.5 if config["use_rslora"] else 2
    config |= {"r": config["r"] * 2, "lora_alpha": config["lora_alpha"] * growth, "init_lora_weights": True}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_start(model: PeftModel, folder: Path) -> None:
    """Keep an adapter that begins at something, so that :func:`save` can subtract it.

    Args:
        model: Before training.
        folder: Where to; an older one is replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with quiet_libraries():
        model.save_pretrained(str(folder), save_embedding_layers=False)


def _sort_targets(path: Path) -> None:
    """PEFT writes a set in the order of this process; the same training shall give the same file."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save(
    model: PeftModel,
    base_name: str,
    revision: str | None,
    folder: Path,
    *,
    start: Path | None = None,
    base: Path | None = None,
) -> None:
    """Write the adapter in PEFT's format; the folder appears at once, with everything in it.

    Args:
        model: The trained model.
        base_name: Name of the base model as the user wrote it, for ``base_model_name_or_path``.
        revision: Its revision on the hub.
        folder: Where to; an older one is replaced.
        start: From :func:`save_start`. The adapter is written as the difference to it, of twice the rank, for the base
            model as it is stored, whose weights PiSSA and LoftQ changed.
        base: Folder of the base model, whose weights are noted beside the adapter.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base_name, revision
    # Without an explicit "no", PEFT looks the base model up on the hub to see whether its vocabulary grew.
    with quiet_libraries():
        model.save_pretrained(str(beside), save_embedding_layers=False)
    _sort_targets(beside / "adapter_config.json")
    if start is not None:
        _subtract(start, beside)
    if base is not None:
        adapters.record_base(beside, base)
    (beside / "README.md").unlink(missing_ok=True)  # an empty form; the run's own card says more
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)
