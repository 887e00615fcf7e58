"""DoRA's scales of the outputs of linear layers.

DoRA (arXiv 2402.09353) multiplies each output by ``m / ||W + s B A||``, where the norm is constant in the backward
pass (section 4.3 of the paper). The norm of a row needs no sum of the matrices, because its square is
``||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>``.
"""

from __future__ import annotations

from torch import Tensor

from fintune.training.fused import kernels_torch
from fintune.training.fused.kernels_torch import matmul_float32


def weight_scales(
    w: Tensor,
    a: Tensor,
    b: Tensor,
    row_squares: Tensor,
    magnitudes: Tensor,
    scaling: float,
    column_scalings: Tensor | None,
) -> Tensor:
    """Compute DoRA's scales of several weights of one shape.

    Args:
        w: Frozen weights, [weights, out, in].
        a: [weights, rank, in].
        b: [weights, out, rank].
        row_squares: Squared norms of the rows of ``w``, float32 [weights, out].
        magnitudes: float32 [weights, out].
        scaling: LoRA's factor s; 1 with ``column_scalings``.
        column_scalings: Factor of each column of ``b``, [rank], if they differ.

    Returns:
        float32 [weights, out].
    """
    cross, gram = matmul_float32(w, a.transpose(1, 2)), matmul_float32(a, a.transpose(1, 2))
    if column_scalings is not None:
        # The factors of the columns belong to A as well as to B.
        cross, gram = cross * column_scalings, gram * column_scalings * column_scalings[:, None]
    scales: Tensor = kernels_torch.kernels_for(w).dora_scale(cross, b, gram, row_squares, magnitudes, scaling)
    return scales
