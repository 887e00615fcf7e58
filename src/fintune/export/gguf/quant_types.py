"""llama.cpp's quantisation types: the storage type of every tensor in a file of a given type.

A type such as Q4_K_M stores most matrices as Q4_K and some as Q6_K. The rules are those of ``src/llama-quant.cpp`` of
llama.cpp (``tensor_allows_quantization``, ``llama_tensor_get_type_impl``, ``tensor_type_fallback``) for dense models.
Mixture-of-experts models have further rules and are not supported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fintune.errors import ModelError
from fintune.export.gguf.ggml import TYPES


@dataclass(frozen=True)
class QuantType:
    """One type of GGUF file.

    Attributes:
        file_type: llama.cpp's ``llama_ftype`` number, written as ``general.file_type``.
        base: Storage type of every matrix that no rule names.
        quantised: Whether llama.cpp's quantiser writes this type. The quantiser orders tensors by layer.
    """

    file_type: int
    base: str
    quantised: bool = True


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


def quant_type(name: str) -> QuantType:
    """Look up a type of file by name.

    Raises:
        ModelError: The name is unknown; the hint lists the known ones.
    """
    try:
        return QUANT_TYPES[name]
    except KeyError:
        raise ModelError(f"unknown GGUF type {name!r}", hint=f"known: {', '.join(QUANT_TYPES)}") from None


def layer_order(name: str) -> tuple[int, str]:
    """Return llama.cpp's sort key of a tensor: tensors outside the layers first, then layer number, then name."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def tensor_types(kind: str, shapes: Mapping[str, tuple[int, ...]], *, is_70b: bool) -> dict[str, str]:
    """Choose the storage type of every tensor of a file.

    Args:
        kind: A key of :data:`QUANT_TYPES`.
        shapes: GGUF tensor name -> shape, rows first.
        is_70b: Whether llama.cpp counts the model as its size 70B.

    Returns:
        Tensor name -> key of :data:`fintune.export.gguf.ggml.TYPES`. The order is llama.cpp's for quantised types, and
        that of ``shapes`` for the others.

    Raises:
        ModelError: The kind is unknown.
    """
    file_kind = quant_type(kind)
    names = sorted(shapes, key=layer_order) if file_kind.quantised else list(shapes)
    tied = "output.weight" not in shapes
    num_values = sum(".attn_v.weight" in name for name in names)
    num_layers = 1 + max((layer_order(name)[0] for name in names), default=-1)
    chosen: dict[str, str] = {}
    index_value = index_down = 0
    for name in names:
        shape = shapes[name]
        if len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight"):
            chosen[name] = "F32"
            continue
        storage_type = file_kind.base
        if file_kind.quantised:
            if name == "output.weight" or (tied and name == "token_embd.weight"):
                storage_type = _output_type(file_kind.base, shape[-1])
            elif ".attn_v.weight" in name:
                storage_type = _value_type(kind, file_kind.base, index_value, num_values, is_70b)
                index_value += 1
            elif ".ffn_down." in name:
                storage_type = _down_type(kind, file_kind.base, index_down, num_layers)
                index_down += 1
            elif ".attn_output." in name and kind == "Q3_K_M":
                storage_type = "Q4_K"
        chosen[name] = _fitting(storage_type, shape[-1])
    return chosen


def _output_type(base: str, num_columns: int) -> str:
    if base == "Q8_0" or num_columns % TYPES[base].block_elements:
        return "Q8_0"
    return "Q6_K"


def _value_type(kind: str, base: str, index: int, count: int, is_70b: bool) -> str:
    chosen = base
    if kind in ("Q4_K_M", "Q5_K_M") and _more_bits(index, count):
        chosen = "Q6_K"
    elif kind == "Q4_K_S" and index < 4:
        chosen = "Q5_K"
    elif kind == "Q3_K_M":
        chosen = "Q5_K" if index < 2 else "Q4_K"
    if is_70b and chosen in ("Q3_K", "Q4_K"):
        # Eight heads share a value matrix in these models, so more bits cost next to nothing.
        chosen = "Q5_K"
    return chosen


def _down_type(kind: str, base: str, index: int, count: int) -> str:
    if kind in ("Q4_K_M", "Q5_K_M") and _more_bits(index, count):
        return "Q6_K"
    if kind == "Q4_K_S" and index < count // 8:
        return "Q5_K"
    if kind == "Q3_K_M":
        return "Q5_K" if index < count // 16 else "Q4_K"
    return base


def _more_bits(index: int, count: int) -> bool:
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


def _fitting(name: str, num_columns: int) -> str:
    if num_columns % TYPES[name].block_elements:
        name = _FALLBACK.get(name, "F16")
    if num_columns % TYPES[name].block_elements:
        name = "F16"
    return name
