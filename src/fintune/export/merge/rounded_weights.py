"""Merged weights in the type in which they are stored, and the check that the adapter changed every one of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from fintune.errors import ArtifactError, ModelError
from fintune.export.merge.merged_weights import HEAD, MergedWeights
from fintune.export.merge.safetensors_files import CODES, StoredTensor, WeightSource, from_stored, to_stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

_SLAB_ELEMENTS = 4 << 20


@dataclass
class _ChangeCount:
    """Number of values of a tensor that were compared with the base, and of those that differ."""

    num_compared: int = 0
    num_changed: int = 0


class RoundedWeights:
    """Rows of merged weights, rounded to a stored type. Several threads may read.

    Args:
        weights: Base and adapter.
        dtype: "bfloat16", "float16", "float32", or "auto" for the type of most values of the base.
        counts_all: Whether to count every changed value. False stops at the first of each tensor, which is faster.

    Attributes:
        dtype: The stored type; "auto" is resolved.
    """

    def __init__(self, weights: MergedWeights, dtype: str, *, counts_all: bool = False) -> None:
        self._weights = weights
        self.dtype = _most_common_dtype(weights) if dtype == "auto" else dtype
        self._counts_all = counts_all
        self._lock = threading.Lock()
        self._counts = {name: _ChangeCount() for name in sorted(weights.changed) if name in weights.tensors}

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Name -> shape, type and position."""
        return self._weights.tensors

    def stored_rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.generic]:
        """Return rows ``start`` to ``stop`` in the stored type; bfloat16 as its bits in uint16.

        Raises:
            ModelError: A value is not finite in this type, or a file ended early.
        """
        import numpy as np

        stop = tensor.shape[0] if stop is None else stop
        stored = to_stored(self._weights.rows(tensor, start, stop), self.dtype)
        if not np.isfinite(stored if stored.dtype != np.uint16 else from_stored(stored)).all():
            raise ModelError(
                f"tensor {tensor.name} holds values that are not finite in {self.dtype}",
                hint="the training diverged, or the values exceed the range of float16: use merge.dtype=bfloat16",
            )
        count = self._counts.get(tensor.name)
        if count is not None and (self._counts_all or not count.num_changed):
            before = self._weights.original_rows(tensor.name, start, stop)
            same = 0 if before is None else int((to_stored(before, self.dtype) == stored).sum())
            with self._lock:
                count.num_compared += stored.size
                count.num_changed += stored.size - same
        return stored

    def rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop``, rounded to the stored type, as float32."""
        return from_stored(self.stored_rows(tensor, start, stop))

    @property
    def num_moved(self) -> int:
        """Number of tensors that the adapter changed."""
        return sum(count.num_changed > 0 for count in self._counts.values())

    @property
    def moved_share(self) -> float:
        """Share of the values of adapted tensors that differ from the base, if all were counted."""
        num_compared = sum(count.num_compared for count in self._counts.values())
        return sum(count.num_changed for count in self._counts.values()) / max(1, num_compared)

    def check_read(self) -> None:
        """Check, after all rows were read, that the adapter changed every tensor that it adapts.

        Raises:
            ArtifactError: A tensor did not change.
        """
        unchanged = [name for name, count in self._counts.items() if not count.num_changed]
        if len(unchanged) == len(self._counts):
            raise ArtifactError(
                "the adapter changes no weight of the model", hint="it is untrained; look at train/metrics.jsonl"
            )
        if unchanged:
            raise ArtifactError(
                f"{len(unchanged)} of {len(self._counts)} adapted weights did not change in {self.dtype}, "
                f"the first is {unchanged[0]}",
                hint="merge.dtype=float32 keeps smaller changes; if none change there either, they are untrained",
            )


def _most_common_dtype(weights: MergedWeights) -> str:
    sizes: dict[str, int] = {}
    for tensor in weights.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + prod(tensor.shape)
    most = max(sizes, key=lambda code: sizes[code])
    return next(name for name, code in CODES.items() if code == most)


def load_merged_weights(model: nn.Module, weights: WeightSource, tensors: Iterable[StoredTensor] | None = None) -> None:
    """Replace embedding and layers of a loaded base with merged weights, slab by slab.

    The output embedding stays the base's, because no layer's input depends on it. The result equals the model that
    loading the merged folder in the same type would give, without a second model in memory.

    Args:
        model: The base model.
        weights: The merged weights, rounded as they would be stored.
        tensors: The tensors of ``weights`` to load, such as an iterator with a progress bar. None loads all of them.

    Raises:
        ModelError: A value is not finite, or a tensor has another shape than the model's.
    """
    import torch

    modules = dict(model.named_modules())
    for tensor in weights.tensors.values() if tensors is None else tensors:
        owner, _, leaf = tensor.name.rpartition(".")
        parameter = getattr(modules.get(owner), leaf, None)
        if tensor.name == HEAD or not isinstance(parameter, torch.nn.Parameter):
            continue  # a checkpoint may hold what a model does not load, such as rotary frequencies
        if parameter.shape != tensor.shape:
            if parameter.shape[1:] != tensor.shape[1:] or not isinstance(modules[owner], torch.nn.Embedding):
                raise ModelError(f"tensor {tensor.name} has the shape {list(tensor.shape)}, which is not the model's")
            parameter = torch.nn.Parameter(parameter.new_empty(tensor.shape), requires_grad=False)
            setattr(modules[owner], leaf, parameter)  # the vocabulary grew in training
        step = max(1, _SLAB_ELEMENTS * tensor.shape[0] // max(1, parameter.numel()))
        with torch.no_grad():
            for start in range(0, tensor.shape[0], step):
                stop = min(start + step, tensor.shape[0])
                parameter[start:stop].copy_(torch.from_numpy(weights.rows(tensor, start, stop)))
