"""An adapter folded into its base, shard by shard: a Hugging Face folder for which no model was ever in memory.

Memory holds a slab of rows and the two matrices of one adapted weight. ``config.json`` is written last, and without it
a folder is no model: what a killed merge leaves behind cannot be taken for a finished one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.export.merge.merged_folder import carry_over, merged_config, read_json, write_json
from fintune.export.merge.merged_weights import MergedWeights
from fintune.export.merge.rounded_weights import RoundedWeights
from fintune.export.merge.safetensor_reader import StoredTensor
from fintune.export.merge.safetensor_writer import SafetensorFile
from fintune.util.disk import name_full_disk, require_space

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SLAB_ELEMENTS = 4 << 20
_INDEX = "model.safetensors.index.json"
_WHAT = "the merged model"


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
        transform: See :class:`~fintune.export.merge.merged_weights.MergedWeights`.
        progress: Called with (bytes written, bytes in all).

    Returns:
        What was written.

    Raises:
        ModelError: A base or adapter that cannot be read, that do not belong together, or values that ``dtype`` cannot
            hold.
        ArtifactError: A weight that the adapter should change and does not.
        ResourceError: The disk is too small.
    """
    (folder / "config.json").unlink(missing_ok=True)
    tied = bool(read_json(base / "config.json").get("tie_word_embeddings", False))
    with MergedWeights(base, adapter, transform=transform) as merged:
        weights = RoundedWeights(merged, dtype, counts_all=True)
        total = sum(prod(t.shape) for t in weights.tensors.values()) * (4 if weights.dtype == "float32" else 2)
        require_space(folder, total, _WHAT)
        with name_full_disk(folder, _WHAT):
            _write_shards(merged, weights, folder, total, progress)
        weights.check()
        carry_over(base, adapter, folder)
        write_json(folder / "config.json", merged_config(base, merged, weights.dtype))
        num_tensors, untied = len(weights.tensors), tied and not merged.tied
    return MergeReport(weights.dtype, num_tensors, weights.num_moved, total, weights.moved_share, untied)


def _write_shards(
    merged: MergedWeights,
    weights: RoundedWeights,
    folder: Path,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Files as the base has them; what an adapter saved lies where the base's tensor did."""
    shards: dict[str, list[StoredTensor]] = {}
    for name, tensor in weights.tensors.items():
        shards.setdefault(merged.shard_of(name), []).append(tensor)
    done = 0
    for shard, tensors in shards.items():
        with SafetensorFile(folder / shard, {t.name: t.shape for t in tensors}, weights.dtype) as file:
            for tensor in tensors:
                step = max(1, _SLAB_ELEMENTS * tensor.shape[0] // prod(tensor.shape))
                for start in range(0, tensor.shape[0], step):
                    stored = weights.stored(tensor, start, min(tensor.shape[0], start + step))
                    file.write(stored)
                    done += stored.nbytes
                    if progress is not None:
                        progress(done, total)
    if len(shards) > 1:
        weight_map = {tensor.name: shard for shard, tensors in shards.items() for tensor in tensors}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / _INDEX, content)
