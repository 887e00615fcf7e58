"""The only place that puts a trained adapter on a loaded model, and the checks that it belongs there.

::

    model = load_adapter(load_model(ref), Path("runs/x/train/adapter"))
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.errors import ModelError
from fintune.models import adapter_base as adapter_origin
from fintune.models.folder import adapter_base, check_safetensors

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def load_adapter(model: PreTrainedModel, path: Path, *, trainable: bool = False) -> PeftModel:
    """Puts a PEFT adapter (LoRA or DoRA) on a model.

    Args:
        model: Its base; where training changed the size of the vocabulary, its embeddings get that size.
        path: Folder in PEFT's format.
        trainable: Whether it is to be trained on.

    Raises:
        ModelError: No adapter in that folder, or one that was trained on another base.
    """
    from peft import PeftModel

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).is_file():
            raise ModelError(f"{path} holds no adapter: {name} is missing", hint="give a folder in PEFT format")
    check_safetensors(path / "adapter_model.safetensors")
    _fit_vocabulary(model, path)
    _check_adapter_fits(model, path)
    if (Path(model.name_or_path) / "config.json").is_file():
        adapter_origin.check_weights(Path(model.name_or_path), path)
    with quiet_peft():
        adapted: PeftModel = PeftModel.from_pretrained(model, path, is_trainable=trainable)
    return adapted


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silences the one warning that PEFT 0.21 causes in transformers 5.23 whenever it wraps a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _fit_vocabulary(model: PreTrainedModel, path: Path) -> None:
    """Embeddings whose number of rows training changed are saved with the adapter; PEFT fills rows that are there."""
    from safetensors import safe_open

    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is each for each in modules)]
    rows: dict[str, int] = {}
    with safe_open(path / "adapter_model.safetensors", framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - the handle is no mapping
            module = re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.weight$)", "", key)
            module = module.removeprefix("base_model.model.").removesuffix(".weight")
            if module in names:
                rows[module] = tensors.get_slice(key).get_shape()[0]
    here = modules[0].weight.shape[0]
    sizes = set(rows.values())
    if sizes <= {here}:
        return
    is_tied = modules[1] is None or modules[1].weight is modules[0].weight
    if len(sizes) > 1 or (len(rows) < len(names) and not is_tied):
        raise ModelError(
            f"{path} was trained with a vocabulary of {max(sizes)} tokens, {model.name_or_path} has {here}, and only "
            f"{' and '.join(name for name in rows if rows[name] != here)} was saved with it in that size",
            hint="save the adapter with save_embedding_layers=True",
        )
    model.resize_token_embeddings(sizes.pop(), mean_resizing=False)


def _check_adapter_fits(model: PreTrainedModel, path: Path) -> None:
    from safetensors import safe_open

    modules = dict(model.named_modules())
    trained_on = adapter_base(path)
    other = not adapter_origin.is_named(Path(model.name_or_path), trained_on)
    base = f"{path} was trained on {trained_on}, not on {model.name_or_path}" if other else str(path)
    # lora_A is [rank, in], lora_B is [out, rank]; embeddings are stored the other way round and checked by PEFT.
    with safe_open(path / "adapter_model.safetensors", framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - the handle is no mapping
            module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            if part not in ("A.weight", "B.weight"):
                continue
            if module not in modules:
                raise ModelError(f"{base}: it adapts {module}, which this model does not have")
            rows, columns = tensors.get_slice(key).get_shape()
            side, asked = ("in_features", columns) if part.startswith("A") else ("out_features", rows)
            here = getattr(modules[module], side, asked)
            if here != asked:
                raise ModelError(f"{base}: {module} has {here} {side} here and {asked} in the adapter")
