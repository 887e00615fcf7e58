"""Merge an adapter into its base, shard by shard, and write a Hugging Face folder.

Memory holds a slab of rows and the two matrices of one adapted weight, never a whole model. ``config.json`` is written
last, and a folder without it is no model. So an interrupted merge never looks complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ModelError
from fintune.export.merge.merged_weights import EMBEDDING, BaseTransform, MergedWeights, RoundedWeights
from fintune.models.chat_template import end_of_turn_ids, read_chat_template, special_token_texts, turn_ending
from fintune.models.folder import check_unquantised, read_model_config
from fintune.models.safetensors_files import INDEX_FILE, StoredTensor, safetensors_writer
from fintune.util.disk import name_full_disk, require_space
from fintune.util.files import read_json, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SLAB_ELEMENTS = 4 << 20
_WHAT = "the merged model"
_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "*.jinja"),
)
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge: the type of the stored weights, and what changed."""

    dtype: str
    num_tensors: int
    num_moved: int
    """Number of tensors that the adapter changed."""
    num_bytes: int
    moved_share: float
    """Share of the values of the adapted tensors that differ from the base after rounding to ``dtype``."""
    untied: bool
    """Whether input and output embedding were one tensor in the base and are two now."""


def merge_folders(
    base: Path,
    adapter: Path,
    folder: Path,
    *,
    dtype: str = "auto",
    transform: BaseTransform | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write base + adapter as a Hugging Face folder with the shards of the base.

    Args:
        base: Hugging Face folder with 16 or 32-bit weights.
        adapter: PEFT folder, LoRA or DoRA.
        folder: An existing folder to write into.
        dtype: "bfloat16", "float16", "float32", or "auto" for the type of most values of the base.
        transform: Change of the base weights before the merge, as in ``MergedWeights``.
        progress: Called with (bytes written, total bytes).

    Raises:
        ModelError: Base or adapter cannot be read, they do not belong together, or ``dtype`` cannot hold a value.
        ArtifactError: The adapter does not change a weight that it adapts.
        ResourceError: The disk is too small.
    """
    (folder / "config.json").unlink(missing_ok=True)
    check_unquantised(base)
    with MergedWeights(base, adapter, transform=transform) as merged:
        weights = RoundedWeights(merged, dtype, counts_all=True)
        total = sum(prod(t.shape) for t in weights.tensors.values()) * (4 if weights.dtype == "float32" else 2)
        require_space(folder, total, _WHAT)
        with name_full_disk(folder, _WHAT):
            _write_shards(merged, weights, folder, total, progress)
        weights.check_read()
        copy_metadata(base, adapter, folder)
        write_json(folder / "config.json", merged_config(base, merged, weights.dtype))
        untied = bool(read_model_config(base).get("tie_word_embeddings")) and not merged.tied
    return MergeReport(weights.dtype, len(weights.tensors), weights.num_moved, total, weights.moved_share, untied)


def _write_shards(
    merged: MergedWeights,
    weights: RoundedWeights,
    folder: Path,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the files of the base. A tensor that the adapter replaces goes to the file of the base's tensor."""
    shards: dict[str, list[StoredTensor]] = {}
    for name, tensor in weights.tensors.items():
        shards.setdefault(merged.shard_of(name), []).append(tensor)
    done = 0
    for shard, tensors in shards.items():
        with safetensors_writer(folder / shard, {t.name: t.shape for t in tensors}, weights.dtype) as write:
            for tensor in tensors:
                step = max(1, _SLAB_ELEMENTS * tensor.shape[0] // prod(tensor.shape))
                for start in range(0, tensor.shape[0], step):
                    stored = weights.stored_rows(tensor, start, min(tensor.shape[0], start + step))
                    write(stored)
                    done += stored.nbytes
                    if progress is not None:
                        progress(done, total)
    if len(shards) > 1:
        weight_map = {tensor.name: shard for shard, tensors in shards.items() for tensor in tensors}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_FILE, content)


def copy_metadata(base: Path, adapter: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence.

    The tokenizer comes from the adapter if the adapter has one, because it was trained with it.
    """
    tokenizer = adapter if (adapter / "tokenizer.json").is_file() else base
    files = [path for pattern in _TOKENIZER for path in sorted(tokenizer.glob(pattern))]
    files += [p for p in base.iterdir() if p.name == "generation_config.json" or p.name.upper().startswith(_LICENCES)]
    for path in files:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def merged_config(base: Path, weights: MergedWeights, dtype: str) -> dict[str, Any]:
    """Return the ``config.json`` of the merged model.

    Raises:
        ModelError: The base's ``config.json`` cannot be read.
    """
    config = read_model_config(base)
    # transformers 4 reads torch_dtype and rope_theta. If version 5 did not write them, it silently uses its defaults.
    merged = config | {"dtype": dtype, "torch_dtype": dtype}
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        merged.setdefault("rope_theta", theta)
    if config.get("tie_word_embeddings") and not weights.tied:
        merged["tie_word_embeddings"] = False
    if EMBEDDING in weights.tensors and "vocab_size" in config:
        merged["vocab_size"] = weights.tensors[EMBEDDING].shape[0]
    return merged


def has_padding_token(folder: Path) -> bool:
    """Return whether the tokenizer's files name a padding token that neither begins nor ends a text or a turn."""
    special = special_token_texts(folder)
    template = read_chat_template(folder)
    pad = special["pad_token"]
    ending = turn_ending(template, special) if template is not None else ""
    return bool(pad) and pad not in (special["eos_token"], special["bos_token"]) and pad not in ending


def write_special_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the padding token and the tokens that end an answer into the configuration files of a merged folder."""
    stops, pad_id = list(end_of_turn_ids(tokenizer)), tokenizer.pad_token_id
    eos = stops if len(stops) > 1 else stops[0]
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"pad_token_id": pad_id},
        "generation_config.json": {"pad_token_id": pad_id, "eos_token_id": eos},
        "tokenizer_config.json": {"pad_token": tokenizer.pad_token},
    }
    for name, change in changes.items():
        path = folder / name
        write_json(path, (read_json(path, ModelError) if path.is_file() else {}) | change)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a configuration file in the form of transformers, atomically."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
