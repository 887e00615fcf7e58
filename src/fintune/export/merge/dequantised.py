"""The weights that training in 4 bits saw: NormalFloat and back, with double quantisation (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fintune.errors import ResourceError
from fintune.export.merge.merged_weights import EMBEDDING, HEAD
from fintune.export.merge.safetensor_reader import StoredTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class NormalFloat:
    """Rounds a whole matrix to 4-bit NormalFloat and back; embeddings and vectors stay, as they do in training.

    Attributes:
        largest: Largest absolute difference that the rounding made so far.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self._squares = self._difference_squares = 0.0
        self._measured: set[str] = set()

    @property
    def relative_rms(self) -> float:
        """Root mean square of the difference, over that of the weights."""
        return math.sqrt(self._difference_squares / self._squares) if self._squares else 0.0

    def __call__(self, tensor: StoredTensor, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """Round one tensor, float32, any shape.

        Raises:
            ResourceError: bitsandbytes is missing.
        """
        if len(tensor.shape) != 2 or tensor.name in (EMBEDDING, HEAD):
            return weight
        import torch

        try:
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        except ImportError as error:
            raise ResourceError(
                "the weights of 4-bit training need bitsandbytes", hint="pip install bitsandbytes"
            ) from error
        packed, state = quantize_4bit(
            torch.from_numpy(weight), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        rounded: NDArray[np.float32] = dequantize_4bit(packed, state).numpy()
        if tensor.name not in self._measured:
            self._measured.add(tensor.name)
            difference = rounded - weight
            self.largest = max(self.largest, float(abs(difference).max()))
            self._squares += float((weight.astype(float) ** 2).sum())
            self._difference_squares += float((difference.astype(float) ** 2).sum())
        return rounded


def merged_into(seen: NormalFloat | None) -> dict[str, str | Mapping[str, float]]:
    """What a manifest says of the weights that an adapter was folded into: the base's own where ``seen`` is None."""
    if seen is None:
        return {"merged_into": "16-bit base"}
    difference = {"relative_rms": seen.relative_rms, "largest": seen.largest}
    return {"merged_into": "base dequantised from 4 bits", "base_difference": difference}
