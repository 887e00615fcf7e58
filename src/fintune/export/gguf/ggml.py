"""Quantisation through ggml's own C library, which gives the bytes that llama.cpp gives.

The ``libggml-python`` wheel contains ``libggml-base``. ``ctypes`` releases the GIL during a call, so plain threads use
all cores. The library is compared with :data:`TYPES` when it is loaded. A type whose number or block layout changed is
refused, not written wrongly.

Source: ``ggml.h`` (``ggml_quantize_chunk``, ``ggml_validate_row_data``) and ``ggml-common.h`` (block layouts).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.errors import ResourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class GgmlType:
    """The storage layout of one tensor type.

    Attributes:
        id: Number in ggml's ``enum ggml_type``.
        block_elements: Number of elements in a block. The length of a row must be a multiple of it.
        block_bytes: Size of a block.
    """

    id: int
    block_elements: int
    block_bytes: int


TYPES: dict[str, GgmlType] = {
    "F32": GgmlType(0, 1, 4),
    "F16": GgmlType(1, 1, 2),
    "Q4_0": GgmlType(2, 32, 18),
    "Q5_0": GgmlType(6, 32, 22),
    "Q5_1": GgmlType(7, 32, 24),
    "Q8_0": GgmlType(8, 32, 34),
    "Q3_K": GgmlType(11, 256, 110),
    "Q4_K": GgmlType(12, 256, 144),
    "Q5_K": GgmlType(13, 256, 176),
    "Q6_K": GgmlType(14, 256, 210),
    "BF16": GgmlType(30, 1, 2),
}


def row_bytes(type_name: str, num_columns: int) -> int:
    """Return the bytes of a row of ``num_columns`` elements, a multiple of the type's block."""
    layout = TYPES[type_name]
    assert num_columns % layout.block_elements == 0, (type_name, num_columns)
    return num_columns // layout.block_elements * layout.block_bytes


class Ggml:
    """A checked handle to ``libggml-base``.

    Args:
        path: The shared library.

    Raises:
        ResourceError: The library does not load, lacks a function, or disagrees with :data:`TYPES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            library = ctypes.CDLL(str(path))
            self._quantize = library.ggml_quantize_chunk
            self._validate = library.ggml_validate_row_data
            type_name, block, row = library.ggml_type_name, library.ggml_blck_size, library.ggml_row_size
        except (OSError, AttributeError) as error:
            raise ResourceError(f"{path.name} cannot be used: {error}", hint="reinstall libggml-python") from error
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        self._validate.restype = ctypes.c_bool
        self._validate.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        type_name.restype, type_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
        block.restype, block.argtypes = ctypes.c_int64, [ctypes.c_int]
        row.restype, row.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]
        for name, layout in TYPES.items():
            actual = (
                (type_name(layout.id) or b"").decode().upper(),
                block(layout.id),
                row(layout.id, layout.block_elements),
            )
            if actual != (name, layout.block_elements, layout.block_bytes):
                raise ResourceError(
                    f"{path.name} has type {layout.id} as {actual}, expected {name} {layout}",
                    hint="install a version of libggml-python that fintune's pyproject.toml allows",
                )

    def quantise(
        self, type_name: str, rows: NDArray[np.float32], column_weights: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """Convert whole rows. The bytes of a row depend on that row alone.

        Args:
            type_name: A key of :data:`TYPES`.
            rows: Values, (num_rows, num_columns), C-contiguous.
            column_weights: Weight of an error in each column, (num_columns,), from an importance matrix. None weights
                all columns alike.

        Returns:
            The stored bytes, (num_rows, row_bytes).
        """
        import numpy as np

        num_rows, num_columns = rows.shape
        assert rows.flags.c_contiguous and rows.dtype == np.float32
        if type_name == "F32":
            return rows.view(np.uint8)
        if type_name == "F16":
            # An overflow becomes infinite. `is_valid` then detects it.
            with np.errstate(over="ignore"):
                return rows.astype(np.float16).view(np.uint8)
        assert column_weights is None or (column_weights.shape == (num_columns,) and column_weights.dtype == np.float32)
        width = row_bytes(type_name, num_columns)
        out = np.empty((num_rows, width), np.uint8)
        weights = None if column_weights is None else column_weights.ctypes.data
        written = self._quantize(
            TYPES[type_name].id, rows.ctypes.data, out.ctypes.data, 0, num_rows, num_columns, weights
        )
        assert written == num_rows * width
        return out

    def is_valid(self, type_name: str, data: NDArray[np.uint8]) -> bool:
        """Return whether stored bytes hold only finite scales and values (``ggml_validate_row_data``)."""
        return bool(self._validate(TYPES[type_name].id, data.ctypes.data, data.nbytes))


@functools.cache
def load_ggml() -> Ggml:
    """Load the library of the installed ``libggml-python``.

    Raises:
        ResourceError: The package is missing or unusable.
    """
    spec = importlib.util.find_spec("libggml")
    roots = [Path(location) for location in spec.submodule_search_locations or ()] if spec else []
    for root in roots:
        for pattern in (
            "lib*/libggml-base.so",
            "lib*/libggml-base.dylib",
            "*/libggml-base.*dylib",
            "*/ggml-base.dll",
        ):
            for path in sorted(root.glob(pattern)):
                return Ggml(path)
    raise ResourceError(
        "quantisation needs libggml-python, which is not installed",
        hint='pip install "fintune[gguf]"',
    )
