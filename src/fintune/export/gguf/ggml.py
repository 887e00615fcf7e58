"""Quantisation as llama.cpp does it: the storage type of every tensor in a file, and the bytes of its rows.

A type of file such as Q4_K_M stores most matrices as Q4_K and some as Q6_K. The rules are those of
``src/llama-quant.cpp`` of llama.cpp (``tensor_allows_quantization``, ``llama_tensor_get_type_impl``,
``tensor_type_fallback``) for dense models. Mixture-of-experts models have further rules and are not supported.

ggml's own C library converts the rows, so the bytes are llama.cpp's. The ``libggml-python`` wheel contains it
(``libggml-base``). ``ctypes`` releases the GIL during a call, so plain threads use all cores. The library is compared
with :data:`TYPES` when it is loaded. A type whose number or block layout changed is refused, not written wrongly.
Source: ``ggml.h`` (``ggml_quantize_chunk``, ``ggml_validate_row_data``) and ``ggml-common.h`` (block layouts).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fintune.errors import ModelError, ResourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class GgmlType(NamedTuple):
    """The storage layout of one tensor type. The length of a row must be a multiple of a block."""

    id: int
    """Number in ggml's ``enum ggml_type``."""
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


class QuantType(NamedTuple):
    """One type of GGUF file."""

    file_type: int
    """llama.cpp's ``llama_ftype`` number, written as ``general.file_type``."""
    base: str
    """Storage type of every matrix that no rule names."""
    quantised: bool = True
    """Whether llama.cpp's quantiser writes this type. The quantiser orders tensors by layer."""


QUANT_TYPES: dict[str, QuantType] = {
    "F32": QuantType(0, "F32", quantised=False),
    "F16": QuantType(1, "F16", quantised=False),
    "BF16": QuantType(32, "BF16", quantised=False),
    "Q8_0": QuantType(7, "Q8_0"),
    "Q6_K": QuantType(18, "Q6_K"),
    "Q5_K_M": QuantType(17, "Q5_K"),
    "Q4_K_M": QuantType(15, "Q4_K"),
    "Q4_K_S": QuantType(14, "Q4_K"),
    "Q3_K_M": QuantType(12, "Q3_K"),
}

# Storage type of a row whose length is no multiple of the block; F16 if that does not fit either.
_FALLBACK = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def row_bytes(type_name: str, num_columns: int) -> int:
    """Return the bytes of a row of ``num_columns`` elements, a multiple of the type's block."""
    layout = TYPES[type_name]
    assert num_columns % layout.block_elements == 0, (type_name, num_columns)
    return num_columns // layout.block_elements * layout.block_bytes


def tensor_types(kind: str, shapes: Mapping[str, tuple[int, ...]], *, is_70b: bool) -> dict[str, str]:
    """Choose the storage type of every tensor of a file.

    Args:
        kind: A key of :data:`QUANT_TYPES`.
        shapes: GGUF tensor name -> shape, rows first.
        is_70b: Whether llama.cpp counts the model as its size 70B.

    Returns:
        Tensor name -> key of :data:`TYPES`. The order is llama.cpp's for quantised types, and that of ``shapes`` for
        the others.

    Raises:
        ModelError: The kind is unknown; the hint lists the known ones.
    """
    if kind not in QUANT_TYPES:
        raise ModelError(f"unknown GGUF type {kind!r}", hint=f"known: {', '.join(QUANT_TYPES)}")
    _, base, quantised = QUANT_TYPES[kind]
    layer_of = {name: int(match[1]) if (match := re.match(r"blk\.(\d+)\.", name)) else -1 for name in shapes}
    # llama.cpp's order: tensors outside the layers first, then layer number, then name.
    names = sorted(shapes, key=lambda name: (layer_of[name], name)) if quantised else list(shapes)
    output = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    num_values = sum(".attn_v.weight" in name for name in names)
    num_layers = 1 + max(layer_of.values(), default=-1)
    chosen: dict[str, str] = {}
    index_value = index_down = 0
    for name in names:
        shape = shapes[name]
        if len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight"):
            chosen[name] = "F32"
            continue
        storage_type = base
        if quantised and name == output:
            storage_type = "Q8_0" if base == "Q8_0" or shape[-1] % TYPES[base].block_elements else "Q6_K"
        elif quantised and ".attn_v.weight" in name:
            storage_type = _more_bits(kind, base, index_value, num_values, first_layers=(4, 2))
            if is_70b and storage_type in ("Q3_K", "Q4_K"):
                # Eight heads share a value matrix in these models, so more bits cost next to nothing.
                storage_type = "Q5_K"
            index_value += 1
        elif quantised and ".ffn_down." in name:
            storage_type = _more_bits(kind, base, index_down, num_layers, (num_layers // 8, num_layers // 16))
            index_down += 1
        elif ".attn_output." in name and kind == "Q3_K_M":
            storage_type = "Q4_K"
        for fallback in (_FALLBACK.get(storage_type, "F16"), "F16"):
            if shape[-1] % TYPES[storage_type].block_elements:
                storage_type = fallback
        chosen[name] = storage_type
    return chosen


def _more_bits(kind: str, base: str, index: int, count: int, first_layers: tuple[int, int]) -> str:
    """Return the type of a matrix that matters more; Q4_K_S and Q3_K_M give Q5_K to that many first layers."""
    eighth = count // 8
    if kind in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2 else base
    if kind == "Q4_K_S":
        return "Q5_K" if index < first_layers[0] else base
    if kind == "Q3_K_M":
        return "Q5_K" if index < first_layers[1] else "Q4_K"
    return base


class Ggml:
    """A checked handle to the shared library ``libggml-base``.

    Raises:
        ResourceError: The library does not load, lacks a function, or disagrees with :data:`TYPES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        number, pointer, size, long = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        try:
            library = ctypes.CDLL(str(path))
            for name, result, *arguments in (
                ("ggml_quantize_chunk", size, number, pointer, pointer, long, long, long, pointer),
                ("ggml_validate_row_data", ctypes.c_bool, number, pointer, size),
                ("ggml_type_name", ctypes.c_char_p, number),
                ("ggml_blck_size", long, number),
                ("ggml_row_size", size, number, long),
            ):
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise ResourceError(f"{path.name} cannot be used: {error}", hint="reinstall libggml-python") from error
        self._library = library
        for name, layout in TYPES.items():
            actual = (
                (library.ggml_type_name(layout.id) or b"").decode().upper(),
                library.ggml_blck_size(layout.id),
                library.ggml_row_size(layout.id, layout.block_elements),
            )
            if actual != (name, *layout[1:]):
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
            rows: Values, (num_rows, num_columns), C-contiguous; the stored bytes are (num_rows, row_bytes).
            column_weights: Weight of an error in each column, (num_columns,), from an importance matrix, or None.
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
        out = np.empty((num_rows, row_bytes(type_name, num_columns)), np.uint8)
        weights = None if column_weights is None else column_weights.ctypes.data
        written = self._library.ggml_quantize_chunk(
            TYPES[type_name].id, rows.ctypes.data, out.ctypes.data, 0, num_rows, num_columns, weights
        )
        assert written == out.nbytes
        return out

    def is_valid(self, type_name: str, data: NDArray[np.uint8]) -> bool:
        """Return whether stored bytes hold only finite scales and values (``ggml_validate_row_data``)."""
        return bool(self._library.ggml_validate_row_data(TYPES[type_name].id, data.ctypes.data, data.nbytes))


@functools.cache
def load_ggml() -> Ggml:
    """Load the library of the installed ``libggml-python``.

    Raises:
        ResourceError: The package is missing or unusable.
    """
    spec = importlib.util.find_spec("libggml")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for pattern in ("lib*/libggml-base.so", "lib*/libggml-base.dylib", "*/libggml-base.*dylib", "*/ggml-base.dll"):
            for path in sorted(Path(root).glob(pattern)):
                return Ggml(path)
    raise ResourceError("quantisation needs libggml-python, which is not installed", hint='pip install "fintune[gguf]"')
