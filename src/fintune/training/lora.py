"""LoRA and DoRA adapters through PEFT, on 16-bit or 4-bit weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.config import AdapterOptions
from fintune.errors import ConfigError, ModelError
from fintune.models.adapter import load_adapter, read_adapter_config, record_base
from fintune.models.safetensors_files import read_safetensors_header, weight_files
from fintune.training.checkpoints import replaced_folder
from fintune.util.console import quiet_libraries, say

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


def attach_adapter(model: PreTrainedModel, options: AdapterOptions) -> PeftModel:
    """Put a new adapter on a model and freeze it. The adapter is float32: small updates are not rounded away.

    Raises:
        ConfigError: A target is not a layer of the model; with the names of its layers.
    """
    from peft import LoraConfig, get_peft_model

    layers = _linear_layers(model)
    names = _adaptable_names(model, set(map(_last_name, layers)))
    targets = list(options.target_modules)
    if targets == ["all-linear"]:
        _say_frozen(model, layers, names)
        targets = [layer for layer in layers if _last_name(layer) in names]
    else:
        _check_targets(model, targets, set(map(_last_name, layers)), names)
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
    return adapted


@contextmanager
def adapter_in_float32(model: nn.Module) -> Iterator[None]:
    """Keep the adapter of 4-bit weights in float32 while a trainer is made: TRL rounds it to bfloat16.

    In bfloat16, a step of 1e-5 would not change a weight above 0.005.
    """
    saved = {}
    if getattr(model, "is_loaded_in_4bit", False):
        saved = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if name in saved:
            weight.data = saved[name]


def init_from_quantization_error(model: PeftModel, folder: Path) -> int:
    """Initialise the adapters with the best low-rank approximation of the 4-bit rounding error.

    This is one pass of LoftQ (arXiv 2310.08659). PEFT's ``replace_lora_weights_loftq`` does the same, but needs a GPU
    and leaves out the scale alpha / r.

    Args:
        model: A model from :func:`attach_adapter`, on 4-bit weights.
        folder: Folder of the base model with the exact weights.

    Returns:
        Number of adapted layers.

    Raises:
        ModelError: The weight files have other names than the model.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer
    from safetensors import safe_open

    files = {tensor.name: path for path in weight_files(folder) for tensor in read_safetensors_header(path)}
    num_layers = 0
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        packed, key = layer.get_base_layer().weight, f"{name}.weight"
        if key not in files:
            raise ModelError(
                f"{folder}: no weight file has {key}, which LoftQ needs", hint="set adapter.init_lora_weights: default"
            )
        with safe_open(files[key], framework="pt") as tensors:
            exact = tensors.get_tensor(key).to(packed.device, torch.float32)
        error = exact - dequantize_4bit(packed.data, packed.quant_state).float()  # [out, in]
        left, sizes, right = torch.linalg.svd(error, full_matrices=False)
        (adapter,) = layer.active_adapters
        # A layer has no more directions than its smaller side. The rest of A stays random, and that of B zero.
        rank = min(layer.r[adapter], len(sizes))
        root = (sizes[:rank] / layer.scaling[adapter]).sqrt()
        layer.lora_A[adapter].weight.data[:rank] = root[:, None] * right[:rank]
        layer.lora_B[adapter].weight.data[:, :rank] = left[:, :rank] * root
        num_layers += 1
    return num_layers


def compute_in_base_type(model: nn.Module) -> None:
    """Let autocast choose the type of the adapter's products. Call it only if training runs under autocast.

    By itself, PEFT casts the activations up to the adapter's type, which costs a third of the speed on a CPU.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def store_frozen_weights(model: PeftModel, dtype: str) -> int:
    """Store the weights of adapted linear layers in the type in which autocast computes their products.

    Autocast would cast them to the same numbers in every step. Embeddings, norms and a tied head keep their type.
    DoRA computes its norms from the weights, so DoRA layers keep their type too.

    Args:
        model: A model from :func:`attach_adapter`, with float32 weights.
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


def _check_targets(model: PreTrainedModel, targets: Iterable[str], known: set[str], names: set[str]) -> None:
    for target in targets:
        if target not in names:
            problem = f"the model has no linear layer {target!r}"
            if target in known:
                problem = f"{target} cannot have an adapter in {model.config.model_type}"
            raise ConfigError(
                f"adapter.target_modules: {problem}",
                hint=f"use some of {', '.join(sorted(names))}, or all-linear",
                option="adapter.target_modules",
            )


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the paths of the linear layers (GPT-2's ``Conv1D`` is one) without the output head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _last_name(path: str) -> str:
    return path.rpartition(".")[2]


def _adaptable_names(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Return the names of layers that PEFT adapts as they are.

    PEFT refuses some layers of state-space models. In some mixtures of experts, it takes names like ``gate_proj`` for
    the experts, whose stacked weights have no adapter that can be merged. Only models with weights of three dimensions
    are concerned. A copy without weights is asked, because a refusal leaves adapters behind.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    if all(weight.dim() < 3 for weight in model.parameters()):
        return names

    def accepted(asked: set[str]) -> set[str]:
        with torch.device("meta"), quiet_libraries():
            copy = type(model)(model.config)
            adapted = get_peft_model(copy, LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=sorted(asked)))
        return asked & set(adapted.peft_config["default"].target_modules)

    try:
        return accepted(names)
    except ValueError:
        return {name for name in names if _is_accepted(accepted, name)}


def _is_accepted(accepted: Callable[[set[str]], set[str]], name: str) -> bool:
    try:
        return bool(accepted({name}))
    except ValueError:
        return False


def _say_frozen(model: PreTrainedModel, layers: Iterable[str], names: set[str]) -> None:
    """Say what ``all-linear`` leaves out."""
    left_out = sorted(set(map(_last_name, layers)) - names)
    stacked = sorted(
        {_last_name(name) for name, weight in model.named_parameters() if weight.dim() == 3 and ".experts." in name}
    )
    reasons = [f"{', '.join(left_out)} cannot have an adapter in {model.config.model_type}"] if left_out else []
    reasons += [f"the experts ({', '.join(stacked)}) have no adapter that can be merged"] if stacked else []
    if reasons:
        say(f"adapter: on {', '.join(sorted(names))}; {', and '.join(reasons)}")


def say_unmergeable(model: PeftModel, folder: Path) -> None:
    """Say before training which adapted layers cannot be merged, because the base's files have other names."""
    from peft.tuners.lora import LoraLayer

    stored = {tensor.name for path in weight_files(folder) for tensor in read_safetensors_header(path)}
    layers = {path for path, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    missing = sorted(layer for layer in layers if f"{layer}.weight" not in stored)
    if missing:
        say(
            f"merge: the adapter cannot be merged by fintune, because {folder} stores {missing[0]} and "
            f"{len(missing) - 1} other layers under other names; save_pretrained of transformers renames them"
        )


def save_adapter_start(model: PeftModel, folder: Path) -> None:
    """Save an adapter that does not start at zero before training, so that :func:`save_adapter` can subtract it."""
    shutil.rmtree(folder, ignore_errors=True)
    with quiet_libraries():
        model.save_pretrained(str(folder), save_embedding_layers=False)


def save_adapter(
    model: PeftModel,
    base_name: str,
    revision: str | None,
    folder: Path,
    *,
    start: Path | None = None,
    base: Path | None = None,
) -> None:
    """Write the adapter in PEFT's format. The folder appears when it is complete.

    Args:
        model: The trained model.
        base_name: Name of the base model as the user wrote it, for ``base_model_name_or_path``.
        revision: Revision of the base model on the hub.
        folder: Folder to write. An older one is replaced.
        start: Folder from :func:`save_adapter_start`. The adapter is saved as the difference to it, with twice the
            rank, for the base model as it is stored: PiSSA and LoftQ change the base weights in memory.
        base: Folder of the base model, whose weights' hash is noted beside the adapter.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base_name, revision
    with replaced_folder(folder) as temporary:
        # Without an explicit False, PEFT looks the base model up on the hub to see whether its vocabulary grew.
        with quiet_libraries():
            model.save_pretrained(str(temporary), save_embedding_layers=False)
        _sort_targets(temporary / "adapter_config.json")
        if start is not None:
            _subtract_start(start, temporary)
        if base is not None:
            record_base(temporary, base)
        (temporary / "README.md").unlink(missing_ok=True)  # an empty form; the run's own card says more


def _sort_targets(path: Path) -> None:
    """Sort the target modules. PEFT writes a set in the order of this process, and equal trainings give equal files."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _subtract_start(start: Path, folder: Path) -> None:
    """Replace a saved adapter by the difference to its start: BA - B'A' = [B, -B'][A; A'], with the same scale.

    PEFT's own conversion loses DoRA's magnitudes. They do not change, because the sum of base and update is the same.
    """
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    end, begin = (load_file(each / "adapter_model.safetensors") for each in (folder, start))
    difference = dict(end)
    for name, weight in end.items():
        for suffix, dim, sign in (("lora_A.weight", 0, 1), ("lora_B.weight", 1, -1)):
            if name.endswith(suffix):
                # PiSSA gives a layer no more directions than its smaller side has. The others are zero.
                missing = [*weight.shape]
                missing[dim] = config["r"] - weight.shape[dim]
                zeros = weight.new_zeros(missing)
                difference[name] = torch.cat([weight, zeros, sign * begin[name], zeros], dim)
    save_file(difference, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    growth = 2**0.5 if config["use_rslora"] else 2
    config |= {"r": config["r"] * 2, "lora_alpha": config["lora_alpha"] * growth, "init_lora_weights": True}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -- an adapter that was trained before


def check_continued(options: AdapterOptions) -> None:
    """Check that an adapter to train further is of the kind that the options ask for; loads nothing.

    Raises:
        ModelError: The folder holds no adapter.
        ConfigError: It has another kind, rank or scale; with the overrides to add.
    """
    folder = options.continue_from
    assert folder is not None, "there is an adapter to continue"
    config = read_adapter_config(folder)
    if config.peft_type != "LORA":
        raise ConfigError(
            f"adapter.continue_from: {folder} has the type {config.peft_type}",
            hint="name a LoRA or DoRA adapter",
            option="adapter.continue_from",
        )
    own = {"kind": "dora" if config.use_dora else "lora", "r": config.r, "use_rslora": config.use_rslora}
    if config.lora_alpha == int(config.lora_alpha):  # with use_rslora, one saved by PiSSA has a fraction
        own["lora_alpha"] = int(config.lora_alpha)
    other = [f"adapter.{name}={value}" for name, value in own.items() if getattr(options, name) != value]
    if other:
        raise ConfigError(
            f"adapter.continue_from: {folder} was trained with other options",
            hint=f"set {' '.join(other).lower()}",
            option="adapter.continue_from",
        )


def continue_adapter(model: PreTrainedModel, options: AdapterOptions) -> PeftModel:
    """Put an adapter that was trained before on its base, to train it further; errors as for :func:`check_continued`.

    Raises:
        ModelError: It was trained on another base.
    """
    from peft.tuners.lora import LoraLayer
    from torch import nn

    folder = options.continue_from
    assert folder is not None, "there is an adapter to continue"
    adapted = load_adapter(model, folder, trainable=True)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name in layer.lora_dropout:
            layer.lora_dropout[name] = nn.Dropout(options.lora_dropout) if options.lora_dropout else nn.Identity()
    adapted.peft_config["default"].lora_dropout = options.lora_dropout
    say(f"adapter: {folder} is trained further, on {len(layers)} layers")
    return adapted
