"""The elementwise passes, on the device of their first tensor: Triton's on a CUDA GPU, plain torch elsewhere."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from fintune.training.fused import plain_kernels
from fintune.training.fused.plain_kernels import HeadParts, Magnitudes

__all__ = ["HeadParts", "Magnitudes", "of"]


def of(tensor: Tensor) -> ModuleType:
    """The module of kernels for this tensor's device; both have the functions of ``plain_kernels``."""
    if tensor.is_cuda:
        from fintune.training.fused import triton_kernels

        return triton_kernels
    return plain_kernels
