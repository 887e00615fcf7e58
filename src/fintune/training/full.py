"""Full fine-tuning: every weight is trained, and the result is a model folder of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.errors import ModelError
from fintune.util.console import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = "model"
"""Where the result lies below that of ``train``; an adapter lies in ``adapter``."""


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Let every weight be trained.

    Args:
        model: With float32 weights, in which small updates are not rounded away.

    Returns:
        The same object.
    """
    for weight in model.parameters():
        weight.requires_grad_(True)
    return model


def result(folder: Path) -> Path | None:
    """The model folder that full fine-tuning left in a folder of ``train``; None where it holds an adapter."""
    found = folder / FOLDER
    return found if found.is_dir() else None


def num_saved(folder: Path) -> int:
    """Numbers in a model folder."""
    from math import prod

    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            total += sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return total


def stored_dtype(folder: Path) -> str:
    """Type of most of a model folder's numbers, by its torch name.

    Raises:
        ModelError: It is none of float32, bfloat16 and float16.
    """
    from collections import Counter
    from math import prod

    from safetensors import safe_open

    sizes: Counter[str] = Counter()
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - the handle is no mapping
                piece = tensors.get_slice(key)
                sizes[piece.get_dtype()] += prod(piece.get_shape())
    most = max(sizes, key=lambda name: sizes[name], default="nothing")
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    if most not in names:
        raise ModelError(f"{folder}: weights of type {most}", hint="set merge.dtype")
    return names[most]


def store(trained: Path, base: Path, folder: Path, dtype: str) -> int:
    """Write the trained model's weights in another type, with everything else of its folder.

    Args:
        trained: From :func:`save`.
        base: The model folder that training began with.
        folder: An existing folder to write into.
        dtype: Name of the torch type.

    Returns:
        Number of tensors that differ from the base's in that type.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    wanted = getattr(torch, dtype)
    where: dict[str, Path] = {}
    for path in sorted(base.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), path)
    num_moved = 0
    for path in sorted(trained.glob("model*.safetensors")):
        shard = {name: weight.to(wanted) for name, weight in load_file(path).items()}
        for name, weight in shard.items():
            with safe_open(where[name], framework="pt") as tensors:
                num_moved += not torch.equal(tensors.get_tensor(name).to(wanted), weight)
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


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    """Write a model folder in float32, as it was trained; it appears at once, with everything in it.

    Args:
        model: The trained model.
        tokenizer: Is saved beside.
        base: The model folder that training began with; its licences go along.
        folder: Where to; an older one is replaced.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    with quiet_libraries():
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    _end_as_before(base, beside)
    for path in sorted(base.iterdir()):
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")):
            shutil.copyfile(path, beside / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)


def _end_as_before(base: Path, folder: Path) -> None:
    # The trainer puts the tokenizer's own end token into the configurations.
    for name in ("config.json", "generation_config.json"):
        if (base / name).is_file() and (folder / name).is_file():
            before = json.loads((base / name).read_text(encoding="utf-8"))
            here = json.loads((folder / name).read_text(encoding="utf-8"))
            for key in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"):
                here.pop(key, None)
                here |= {key: before[key]} if key in before else {}
            (folder / name).write_text(json.dumps(here, indent=2) + "\n", encoding="utf-8")
