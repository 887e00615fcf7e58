"""Which tensor gets which type in a file of a given kind: llama.cpp's mixtures.

A kind such as Q4_K_M is a mixture: most matrices in Q4_K, some in Q6_K. The rules follow ``src/llama-quant.cpp`` of
llama.cpp (``tensor_allows_quantization``, ``llama_tensor_get_type_impl``, ``tensor_type_fallback``) for dense
models; mixtures of experts have further rules and are not served here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fintune.errors import ModelError
from fintune.export.gguf.ggml import TYPES


@dataclass(frozen=True)
class Mixture:
    """A kind of GGUF file.

    Attributes:
        file_type: llama.cpp's ``llama_ftype`` number, written as ``general.file_type``.
        base: Type of a matrix without a rule of its own.
        quantised: Whether llama.cpp's quantiser makes it from a converted file; it then orders tensors by layer.
    """

    file_type: int
    base: str
    quantised: bool = True


MIXTURES: dict[str, Mixture] = {
    "F32": Mixture(0, "F32", quantised=False),
    "F16": Mixture(1, "F16", quantised=False),
    "BF16": Mixture(32, "BF16", quantised=False),
    "Q8_0": Mixture(7, "Q8_0"),
    "Q6_K": Mixture(18, "Q6_K"),
    "Q5_K_M": Mixture(17, "Q5_K"),
    "Q4_K_M": Mixture(15, "Q4_K"),
    "Q4_K_S": Mixture(14, "Q4_K"),
    "Q3_K_M": Mixture(12, "Q3_K"),
}

# A row that is no multiple of the block takes the type on the right, then F16.
_FALLBACK = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def mixture(name: str) -> Mixture:
    """Look a kind up.

    Raises:
        ModelError: The kind is not known; the hint lists those that are.
    """
    try:
        return MIXTURES[name]
    except KeyError:
        raise ModelError(f"unknown GGUF type {name!r}", hint=f"known: {', '.join(MIXTURES)}") from None


def layer_order(name: str) -> tuple[int, str]:
    """Sort key of llama.cpp's loader: tensors outside the layers first, then by layer number, then by name."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def tensor_types(kind: str, shapes: Mapping[str, tuple[int, ...]], *, is_70b: bool) -> dict[str, str]:
    """Choose the type of every tensor of a file.

    Args:
        kind: A key of :data:`MIXTURES`.
        shapes: GGUF tensor name -> shape, rows first.
        is_70b: llama.cpp's model size 70B (80 layers, with grouped queries where it is a llama).

    Returns:
        Tensor name -> key of :data:`fintune.export.gguf.ggml.TYPES`, in the order in which llama.cpp would lay them out
        (for kinds that are not quantised, in the order given).

    Raises:
        ModelError: The kind is not known.
    """
    mix = mixture(kind)
    names = sorted(shapes, key=layer_order) if mix.quantised else list(shapes)
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
        kind_of_tensor = mix.base
        if mix.quantised:
            if name == "output.weight" or (tied and name == "token_embd.weight"):
                kind_of_tensor = _output_type(mix.base, shape[-1])
            elif ".attn_v.weight" in name:
                kind_of_tensor = _value_type(kind, mix.base, index_value, num_values, is_70b)
                index_value += 1
            elif ".ffn_down." in name:
                kind_of_tensor = _down_type(kind, mix.base, index_down, num_layers)
                index_down += 1
            elif ".attn_output." in name and kind == "Q3_K_M":
                kind_of_tensor = "Q4_K"
        chosen[name] = _fitting(kind_of_tensor, shape[-1])
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
        # Eight heads share a value matrix there: more bits cost next to nothing.
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
