"""An adapter folded into its base, shard by shard: a Hugging Face folder for which no model was ever in memory.

Memory holds a slab of rows and the two matrices of one adapted weight. ``config.json`` is written last, and without it
a folder is no model: what a killed merge leaves behind cannot be taken for a finished one.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ArtifactError, ModelError, ResourceError
from fintune.gguf.merged_weights import EMBEDDING, MergedWeights
from fintune.gguf.safetensor_reader import StoredTensor
from fintune.gguf.safetensor_writer import CODES, SafetensorFile, from_stored, to_stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SLAB_ELEMENTS = 4 << 20
_INDEX = "model.safetensors.index.json"
_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "*.jinja"),
)
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        dtype: Type of the stored weights.
        num_tensors: Tensors of the folder.
        num_moved: Tensors that the adapter changed.
        num_bytes: Bytes of weights written.
        moved_share: Share of the numbers of those tensors that differ from the base's after rounding to ``dtype``.
        untied: Whether input and output embedding were one tensor and are two now.
    """

    dtype: str
    num_tensors: int
    num_moved: int
    num_bytes: int
    moved_share: float
    untied: bool


def merge_folders(
    base: Path,
    adapter: Path,
    folder: Path,
    *,
    dtype: str = "auto",
    transform: Callable[[StoredTensor, NDArray[np.float32]], NDArray[np.float32]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write base + adapter as a Hugging Face folder of the same shards.

    Args:
        base: Hugging Face folder with 16 or 32-bit weights.
        adapter: PEFT folder, LoRA or DoRA.
        folder: An existing folder to write into.
        dtype: "bfloat16", "float16", "float32", or "auto": that of most of the base's numbers.
        transform: See :class:`~fintune.gguf.merged_weights.MergedWeights`.
        progress: Called with (bytes written, bytes in all).

    Returns:
        What was written.

    Raises:
        ModelError: A base or adapter that cannot be read, that do not belong together, or values that ``dtype`` cannot
            hold.
        ArtifactError: A weight that the adapter should change and does not.
        ResourceError: The disk is too small.
    """
    config = read_config(base)
    (folder / "config.json").unlink(missing_ok=True)
    tied = bool(config.get("tie_word_embeddings", False))
    with MergedWeights(base, adapter, tied=tied, transform=transform) as weights:
        dtype = stored_dtype(weights) if dtype == "auto" else dtype
        shards = _shards(weights)
        total = sum(prod(t.shape) for t in weights.tensors.values()) * (4 if dtype == "float32" else 2)
        free = shutil.disk_usage(folder).free
        if free < total:
            raise ResourceError(f"{folder}: {total:,} bytes are needed, {free:,} are free", hint="free some space")
        writing = _Writing(weights, dtype, total, progress)
        try:
            for shard, tensors in shards.items():
                with SafetensorFile(folder / shard, {t.name: t.shape for t in tensors}, dtype) as file:
                    for tensor in tensors:
                        writing.write(tensor, file)
            if len(shards) > 1:
                _write_index(folder, shards, total)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(f"{folder}: the disk is full") from error
            raise
        report = writing.report(untied=tied and not weights.tied)
        rows = weights.tensors[EMBEDDING].shape[0] if EMBEDDING in weights.tensors else None
    _carry_over(base, adapter, folder)
    write_json(folder / "config.json", merged_config(config, dtype, rows, untied=report.untied))
    return report


def merged_config(config: dict[str, Any], dtype: str, vocab_size: int | None, *, untied: bool) -> dict[str, Any]:
    """``config.json`` of the merged model."""
    merged = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    # transformers 4 reads these names and would silently take its defaults for what version 5 writes.
    merged["torch_dtype"] = dtype
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        merged.setdefault("rope_theta", theta)
    if untied:
        merged["tie_word_embeddings"] = False
    if vocab_size is not None and "vocab_size" in config:
        merged["vocab_size"] = max(vocab_size, 1)
    return merged


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: Missing or unreadable.
    """
    path = folder / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="give a Hugging Face model folder") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object")
    if config.get("quantization_config"):
        raise ModelError(
            f"{folder} is quantised, and an adapter cannot be merged into it",
            hint="name the 16-bit model that it was made from",
        )
    return config


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write beside and rename."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def stored_dtype(weights: MergedWeights) -> str:
    """Type in which most of the base's numbers are stored."""
    sizes: dict[str, int] = {}
    for tensor in weights.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + prod(tensor.shape)
    most = max(sizes, key=lambda code: sizes[code])
    return next(name for name, code in CODES.items() if code == most)


class _Writing:
    """Writes merged tensors and watches what moves."""

    def __init__(
        self, weights: MergedWeights, dtype: str, total: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self._weights, self._dtype, self._total, self._progress = weights, dtype, total, progress
        self._done = self._num_changed = self._num_watched = 0
        self._moved: dict[str, bool] = {}

    def write(self, tensor: StoredTensor, file: SafetensorFile) -> None:
        import numpy as np

        weights, watched = self._weights, tensor.name in self._weights.changed
        num_rows = tensor.shape[0]
        step = max(1, _SLAB_ELEMENTS * num_rows // max(1, prod(tensor.shape)))
        moved = False
        for start in range(0, num_rows, step):
            stop = min(num_rows, start + step)
            stored = to_stored(weights.rows(tensor, start, stop), self._dtype)
            if not np.isfinite(stored if stored.dtype != np.uint16 else from_stored(stored)).all():
                raise ModelError(
                    f"tensor {tensor.name} holds values that are not finite in {self._dtype}",
                    hint="the training diverged, or the values exceed what float16 holds: merge in bfloat16",
                )
            if watched:
                before = weights.original_rows(tensor.name, start, stop)
                same = 0 if before is None else int((to_stored(before, self._dtype) == stored).sum())
                changed = stored.size - same
                self._num_changed += changed
                self._num_watched += stored.size
                moved = moved or changed > 0
            file.write(stored)
            self._done += stored.nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)
        if watched:
            self._moved[tensor.name] = moved

    def report(self, *, untied: bool) -> MergeReport:
        still = [name for name, moved in self._moved.items() if not moved]
        if len(still) == len(self._moved):
            raise ArtifactError(
                "the adapter changes no weight of the model", hint="it is untrained; look at train/metrics.jsonl"
            )
        if still:
            what = f"{len(still)} of {len(self._moved)} adapted weights"
            raise ArtifactError(
                f"{what} did not move in {self._dtype}, the first is {still[0]}",
                hint="merge.dtype=float32 keeps smaller changes; if they stand still there too, they are untrained",
            )
        share = self._num_changed / self._num_watched
        num_tensors = len(self._weights.tensors)
        return MergeReport(self._dtype, num_tensors, len(self._moved), self._done, share, untied)


def _shards(weights: MergedWeights) -> dict[str, list[StoredTensor]]:
    """File name -> tensors, as the base has them; what an adapter saved lies where the base's tensor did."""
    shards: dict[str, list[StoredTensor]] = {}
    for name, tensor in weights.tensors.items():
        shards.setdefault(weights.shard_of(name), []).append(tensor)
    return shards


def _write_index(folder: Path, shards: dict[str, list[StoredTensor]], total: int) -> None:
    weight_map = {tensor.name: shard for shard, tensors in shards.items() for tensor in tensors}
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _carry_over(base: Path, adapter: Path, folder: Path) -> None:
    """Tokenizer, template, generation settings and licence; an adapter that brings a tokenizer was trained with it."""
    tokenizer = adapter if (adapter / "tokenizer.json").is_file() else base
    for pattern in _TOKENIZER:
        for path in sorted(tokenizer.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    for path in sorted(base.iterdir()):
        if path.is_file() and (path.name == "generation_config.json" or path.name.upper().startswith(_LICENCES)):
            shutil.copyfile(path, folder / path.name)
