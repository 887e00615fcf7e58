"""Merged weights as they will be stored, and the proof that the adapter moved each of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from fintune.errors import ArtifactError, ModelError
from fintune.export.merge.merged_weights import MergedWeights
from fintune.export.merge.safetensor_reader import StoredTensor
from fintune.export.merge.safetensor_writer import CODES, from_stored, to_stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass
class _Watched:
    num_seen: int = 0
    num_changed: int = 0


class RoundedWeights:
    """Rows of merged weights, rounded to a stored type; several threads may read.

    Args:
        weights: Base and adapter.
        dtype: "bfloat16", "float16", "float32", or "auto": that of most of the base's numbers.
        counts_all: Count every number that moved; else stop at the first of each tensor, which is faster.

    Attributes:
        dtype: The type, "auto" resolved.
    """

    def __init__(self, weights: MergedWeights, dtype: str, *, counts_all: bool = False) -> None:
        self._weights = weights
        self.dtype = _most_stored(weights) if dtype == "auto" else dtype
        self._counts_all = counts_all
        self._lock = threading.Lock()
        self._watched = {name: _Watched() for name in sorted(weights.changed) if name in weights.tensors}

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Name -> shape, type and place."""
        return self._weights.tensors

    def stored(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.generic]:
        """Rows ``start`` to ``stop`` in the stored type, bfloat16 as its bits.

        Raises:
            ModelError: Values that are not finite in this type, or a file that ended early.
        """
        import numpy as np

        stop = tensor.shape[0] if stop is None else stop
        stored = to_stored(self._weights.rows(tensor, start, stop), self.dtype)
        if not np.isfinite(stored if stored.dtype != np.uint16 else from_stored(stored)).all():
            raise ModelError(
                f"tensor {tensor.name} holds values that are not finite in {self.dtype}",
                hint="the training diverged, or the values exceed what float16 holds: merge in bfloat16",
            )
        watched = self._watched.get(tensor.name)
        if watched is not None and (self._counts_all or not watched.num_changed):
            before = self._weights.original_rows(tensor.name, start, stop)
            same = 0 if before is None else int((to_stored(before, self.dtype) == stored).sum())
            with self._lock:
                watched.num_seen += stored.size
                watched.num_changed += stored.size - same
        return stored

    def rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """The same as float32."""
        return from_stored(self.stored(tensor, start, stop))

    @property
    def num_moved(self) -> int:
        """Tensors that the adapter changed."""
        return sum(watched.num_changed > 0 for watched in self._watched.values())

    @property
    def moved_share(self) -> float:
        """Share of the numbers of adapted tensors that differ from the base's, where all were counted."""
        seen = sum(watched.num_seen for watched in self._watched.values())
        return sum(watched.num_changed for watched in self._watched.values()) / max(1, seen)

    def check(self) -> None:
        """Call it when all rows were read.

        Raises:
            ArtifactError: A tensor that the adapter should change and does not.
        """
        still = [name for name, watched in self._watched.items() if not watched.num_changed]
        if len(still) == len(self._watched):
            raise ArtifactError(
                "the adapter changes no weight of the model", hint="it is untrained; look at train/metrics.jsonl"
            )
        if still:
            raise ArtifactError(
                f"{len(still)} of {len(self._watched)} adapted weights did not move in {self.dtype}, "
                f"the first is {still[0]}",
                hint="merge.dtype=float32 keeps smaller changes; if they stand still there too, they are untrained",
            )


def _most_stored(weights: MergedWeights) -> str:
    sizes: dict[str, int] = {}
    for tensor in weights.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + prod(tensor.shape)
    most = max(sizes, key=lambda code: sizes[code])
    return next(name for name, code in CODES.items() if code == most)
