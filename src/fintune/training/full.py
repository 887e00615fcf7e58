"""Full fine-tuning: every weight is trained, and the result is a model folder."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.errors import ModelError
from fintune.models.safetensors_files import read_safetensors_header
from fintune.training.checkpoints import replaced_folder
from fintune.util.console import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_all_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Let every weight be trained; the same object. They are float32: small updates are not rounded away."""
    for weight in model.parameters():
        weight.requires_grad_(True)
    return model


def stored_dtype(folder: Path) -> str:
    """Return the torch name of the type that most numbers of a model folder have.

    Raises:
        ModelError: It is none of float32, bfloat16 and float16.
    """
    sizes: Counter[str] = Counter()
    for path in sorted(folder.glob("model*.safetensors")):
        for tensor in read_safetensors_header(path):
            sizes[tensor.dtype] += prod(tensor.shape)
    most = max(sizes, key=lambda name: sizes[name], default="nothing")
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    if most not in names:
        raise ModelError(f"{folder}: most weights have the type {most}", hint="set merge.dtype")
    return names[most]


def convert_full_model(trained: Path, base: Path, folder: Path, dtype: str) -> int:
    """Write the trained model's weights in another type, with all other files of its folder.

    Args:
        trained: Folder that :func:`save_full_model` wrote.
        base: Model folder that training started from.
        folder: An existing folder to write into.
        dtype: Name of the torch type.

    Returns:
        Number of tensors that differ from the base's in that type.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    target = getattr(torch, dtype)
    base_files: dict[str, Path] = {}
    for path in sorted(base.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            base_files |= dict.fromkeys(tensors.keys(), path)
    num_moved = 0
    for path in sorted(trained.glob("model*.safetensors")):
        shard = {name: weight.to(target) for name, weight in load_file(path).items()}
        for name, weight in shard.items():
            with safe_open(base_files[name], framework="pt") as tensors:
                num_moved += not torch.equal(tensors.get_tensor(name).to(target), weight)
        save_file(shard, folder / path.name, metadata={"format": "pt"})
    for path in sorted(trained.iterdir()):
        if path.suffix != ".safetensors" and path.is_file() and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    # transformers 4 reads the older of the two names.
    config |= {"dtype": dtype, "torch_dtype": dtype}
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        config.setdefault("rope_theta", theta)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return num_moved


def save_full_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    """Write a model folder in float32, as it was trained; it appears when it is complete.

    Args:
        model: The trained model.
        tokenizer: The tokenizer, which is saved with it.
        base: Model folder that training started from. Its licence files are copied.
        folder: Folder to write. An older one is replaced.
    """
    with replaced_folder(folder) as temporary:
        with quiet_libraries():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        _restore_special_tokens(base, temporary)
        for path in sorted(base.iterdir()):
            if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")):
                shutil.copyfile(path, temporary / path.name)


def _restore_special_tokens(base: Path, folder: Path) -> None:
    """Undo that the trainer puts the tokenizer's own end token into the configurations."""
    for name in ("config.json", "generation_config.json"):
        if (base / name).is_file() and (folder / name).is_file():
            before = json.loads((base / name).read_text(encoding="utf-8"))
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            for key in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"):
                config.pop(key, None)
                config |= {key: before[key]} if key in before else {}
            (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
