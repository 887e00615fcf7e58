"""DoRA's factors of the outputs of linear layers, and the gradients of its magnitudes.

DoRA (arXiv 2402.09353) multiplies each output by ``m / ||W + s B A||``, a norm that is taken as constant in the
backward pass (its section 4.3). Row by row the norm needs no sum of matrices, for its square is
``||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fintune.training.fused import kernels
from fintune.training.fused.products import product

if TYPE_CHECKING:
    from fintune.training.fused.adapted import Grads
    from fintune.training.fused.bordered import Group


def scales(group: Group, matrices: Tensor, squares: Tensor, magnitudes: Tensor) -> Tensor:
    """DoRA's factors of several groups alike.

    Args:
        group: One of them.
        matrices: Their bordered matrices, [layers, out + border, in + border].
        squares: Squared norms of the rows of the frozen weights, float32 [layers, out].
        magnitudes: float32 [layers, out].

    Returns:
        float32 [layers, out].
    """
    w, b = matrices[:, : group.num_out, : group.num_in], matrices[:, : group.num_out, group.num_in :]
    a = matrices[:, group.num_out :, : group.num_in]
    cross, gram = product(w, a.transpose(1, 2)), product(a, a.transpose(1, 2))
    if group.factors is not None:
        # Factors of the columns belong to A as well as to B.
        cross, gram = cross * group.factors, gram * group.factors * group.factors[:, None]
    made: Tensor = kernels.of(matrices).dora_scale(cross, b, gram, squares, magnitudes, group.factor)
    return made


def without_magnitude(group: Group, factors: Tensor) -> None:
    """Set the factors of layers that have no magnitude to one, in place; shape [layers, out]."""
    for layer, part in zip(group.layers, factors.split(group.sizes, 1), strict=True):
        if layer.magnitude is None:
            part.fill_(1.0)


def split_magnitude_grad(group: Group, grad: Tensor, into: Grads) -> None:
    """Put the gradient of all magnitudes, [out], to the layers that have one."""
    parts = grad.split(group.sizes)
    into.magnitude = [
        None if layer.magnitude is None else part.to(layer.magnitude.dtype)
        for layer, part in zip(group.layers, parts, strict=True)
    ]
