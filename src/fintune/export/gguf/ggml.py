"""Quantisation through ggml's own C library, so that the bytes are those of llama.cpp.

The ``libggml-python`` wheel carries ``libggml-base``; ``ctypes`` releases the GIL while a call runs, so plain threads
use all cores. The library is checked against :data:`TYPES` when it is loaded: a type that changed its number or
its block layout is refused instead of written wrongly.

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
    """Storage of one tensor type.

    Attributes:
        id: Number in ggml's ``enum ggml_type``.
        block_elements: Elements that are packed together; a row must be a multiple of it.
        block_bytes: Bytes of one block.
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
    """Bytes of one row of ``num_columns`` elements, which must be a multiple of the type's block."""
    kind = TYPES[type_name]
    assert num_columns % kind.block_elements == 0, (type_name, num_columns)
    return num_columns // kind.block_elements * kind.block_bytes


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
        for name, kind in TYPES.items():
            found = (
                (type_name(kind.id) or b"").decode().upper(),
                block(kind.id),
                row(kind.id, kind.block_elements),
            )
            if found != (name, kind.block_elements, kind.block_bytes):
                raise ResourceError(
                    f"{path.name} has type {kind.id} as {found}, expected {name} {kind}",
                    hint="install a version of libggml-python that fintune's pyproject.toml allows",
                )

    def quantise(
        self, type_name: str, rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """Convert whole rows; each row's bytes depend on that row alone.

        Args:
            type_name: A key of :data:`TYPES`.
            rows: (num_rows, num_columns), C-contiguous.
            importance: (num_columns,): how much an error in each column matters; alike where None.

        Returns:
            (num_rows, row_bytes): the stored bytes.
        """
        import numpy as np

        num_rows, num_columns = rows.shape
        assert rows.flags.c_contiguous and rows.dtype == np.float32
        if type_name == "F32":
            return rows.view(np.uint8)
        if type_name == "F16":
            # An overflow becomes infinite and is found by `is_valid`, which names the tensor.
            with np.errstate(over="ignore"):
                return rows.astype(np.float16).view(np.uint8)
        assert importance is None or (importance.shape == (num_columns,) and importance.dtype == np.float32)
        width = row_bytes(type_name, num_columns)
        out = np.empty((num_rows, width), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        written = self._quantize(
            TYPES[type_name].id, rows.ctypes.data, out.ctypes.data, 0, num_rows, num_columns, weights
        )
        assert written == num_rows * width
        return out

    def is_valid(self, type_name: str, data: NDArray[np.uint8]) -> bool:
        """Whether stored bytes hold only finite scales and values (``ggml_validate_row_data``)."""
        return bool(self._validate(TYPES[type_name].id, data.ctypes.data, data.nbytes))


@functools.cache
def load_ggml() -> Ggml:
    """The library of the installed ``libggml-python``.

    Raises:
        ResourceError: The package is missing or not usable.
    """
    spec = importlib.util.find_spec("libggml")
    roots = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
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
        "libggml-python is not installed, so nothing can be quantised",
        hint='pip install "fintune[gguf]"',
    )
