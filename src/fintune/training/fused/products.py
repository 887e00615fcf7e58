"""Matrix products whose result is float32, as gradients and norms want it."""

from __future__ import annotations

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product (or a batch of them) in float32; on a GPU it is never rounded to the type of its inputs."""
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    if left.is_cuda and left.dtype != torch.float32:
        return multiply(left, right, out_dtype=torch.float32)
    return multiply(left, right).float()
