"""4-bit weights of bitsandbytes (NF4, arXiv 2305.14314), put into a matrix of one's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_four_bit(layer: nn.Module) -> bool:
    """Whether the layer's weight is packed."""
    return getattr(layer.weight, "quant_state", None) is not None


def dequantise(layer: nn.Module, out: Tensor) -> None:
    """Write a packed weight as numbers.

    Args:
        layer: A ``Linear4bit``.
        out: [out, in], may have a row stride of its own.
    """
    weight: Any = layer.weight
    state = weight.quant_state
    if not out.is_cuda or out.shape[1] % state.blocksize:
        from bitsandbytes.functional import dequantize_4bit

        out.copy_(dequantize_4bit(weight.data, state))
        return
    from fintune.training.fused.triton_kernels import unpack_nf4

    # bitsandbytes' own kernel writes a matrix of its own, which would be copied here: twice the traffic.
    outer = (state.state2.code, state.state2.absmax, state.offset) if state.nested else None
    outer_size = state.state2.blocksize if state.nested else 1
    unpack_nf4(weight.data, state.code, state.absmax, outer, state.blocksize, outer_size, out)
