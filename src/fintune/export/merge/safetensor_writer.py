"""Writes safetensors files row by row, so that a model need not be in memory to be saved.

Source: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of the types as torch has them -> as the format has them."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def to_stored(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """Round to a stored type, ties to even as torch does; bfloat16 comes as its bits in uint16."""
    import numpy as np

    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # The rounding carries what is no number into infinity, or past the sign to zero.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_stored(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    """The float32 values of what :func:`to_stored` made."""
    import numpy as np

    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


class SafetensorFile:
    """One file that is being written; use it as a context manager. It takes its name when the block ends well.

    Args:
        path: The finished file.
        shapes: Tensor name -> shape, in the order in which the rows will come.
        dtype: "float32", "bfloat16" or "float16".
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        self._path, self._part = path, path.with_name(f".{path.name}.part")
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, shape in shapes.items():
            end = position + prod(shape) * _BYTES[dtype]
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.num_bytes = 8 + len(text) + position
        self._file = self._part.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, rows: NDArray[np.generic]) -> None:
        """Append rows of the tensor whose turn it is, in the stored type."""
        import numpy as np

        self._file.write(np.ascontiguousarray(rows).data)

    def __enter__(self) -> SafetensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                assert self._file.tell() == self.num_bytes, f"{self._path}: rows are missing"
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)
