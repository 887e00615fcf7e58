"""Dropout on the adapters' input, as PEFT applies it, for the layers of a group (see ``bordered``).

Every adapted layer draws a mask of its own, ``D`` (0, or 1 / (1 - p)). With LoRA only the adapter reads ``D x``. DoRA
as PEFT has it reads it in the scaled part of the weight as well: with ``d = D x`` and ``k = m / ||W + s B A||``::

    y  = W x + (k - 1) W d + k s B A d          u = W d + s B A d, so y = W x - W d + k u
    dx = W^T g + D (W^T ((k - 1) g) + s A^T B^T k g)

A mask is never kept: it is drawn again from its seed, in a layer that is recomputed as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fintune.training.fused import kernels
from fintune.training.fused.adapted import Grads
from fintune.training.fused.bordered import Group
from fintune.training.fused.kernels import Magnitudes
from fintune.training.fused.products import product

_PARTS = 4
"""Layers of a group at most, and groups of a decoder layer."""


@dataclass(frozen=True)
class Drop:
    """Masks of a group in one pass.

    Attributes:
        share: Of the numbers that become zero.
        seed: Of the group's first mask; its others have the next ones.
    """

    share: float
    seed: int

    def apply(self, x: Tensor, place: int) -> Tensor:
        """``D x`` for one layer of the group, [tokens, in], contiguous."""
        dropped: Tensor = kernels.of(x).drop(x, self.share, self.seed + place)
        return dropped


def drop_of(share: float, seed: int | None, layer: int, group: int) -> Drop | None:
    """Masks of a group, the same whenever they are asked for.

    Args:
        share: Of the numbers that become zero.
        seed: Of the batch; None where nothing is dropped.
        layer: Number of the decoder layer.
        group: Number of the group in it.
    """
    if seed is None or share == 0:
        return None
    return Drop(share, (seed + _PARTS * (_PARTS * layer + group)) % 2**31)


def forward(
    group: Group, x: Tensor, inner: Tensor, matrix: Tensor, scale: Tensor | None, drop: Drop
) -> tuple[Tensor, Tensor | None]:
    """Outputs with DoRA's factor.

    Args:
        group: The layers.
        x: Input, [tokens, in].
        inner: [tokens, border], gets the adapters' activations.
        matrix: The group's bordered matrix.
        scale: DoRA's factors, float32 [out], or None.
        drop: The masks.

    Returns:
        Outputs, [tokens, out], and ``u``, which the backward pass of DoRA needs.
    """
    corners = group.corners(matrix)
    out = x @ corners.w.t()
    if scale is None:
        fill_inner(group, x, inner, matrix, drop)
        return out.addmm_(inner, corners.b.t()), None
    unscaled = torch.zeros_like(out)
    for place, (rows, columns) in enumerate(group.places):
        if not group.ranks[place]:
            continue
        part = drop.apply(x, place)
        base = part @ corners.w[rows].t()
        _inner_of(group, part, inner, matrix, columns)
        own = torch.addmm(base, inner[:, columns], corners.b[rows, columns].t())
        unscaled[:, rows] = own
        out[:, rows] += (own.float() * scale[rows] - base.float()).to(out.dtype)
    _clear_rest(group, inner)
    return out, unscaled


def fill_inner(group: Group, x: Tensor, inner: Tensor, matrix: Tensor, drop: Drop) -> None:
    """The adapters' activations alone; arguments as in :func:`forward`."""
    for place, (_, columns) in enumerate(group.places):
        if group.ranks[place]:
            _inner_of(group, drop.apply(x, place), inner, matrix, columns)
    _clear_rest(group, inner)


def input_grad(
    group: Group,
    grad: Tensor,
    unscaled: Tensor | None,
    matrix: Tensor,
    scale: Tensor | None,
    drop: Drop,
    magnitudes: Magnitudes | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of :func:`forward` but for the adapters' matrices.

    Args:
        group: The layers.
        grad: Of the output, [tokens, out].
        unscaled: ``u`` from there.
        matrix: As there.
        scale: As there.
        drop: As there.
        magnitudes: DoRA's, whose gradients are taken along.

    Returns:
        Gradients of the input [tokens, in], of the output before DoRA's factor [tokens, out], and of the adapters'
        activations [tokens, border].
    """
    corners = group.corners(matrix)
    own = grad
    if scale is not None:
        assert unscaled is not None, "made where there is a factor"
        own = kernels.of(grad).scale_grad(grad, unscaled, scale, magnitudes)
    inner_grad = group.inner_grad_of(own, matrix)
    made = grad @ corners.w
    for place, (rows, columns) in enumerate(group.places):
        if not group.ranks[place]:
            continue
        passed = inner_grad[:, columns] @ corners.a[columns]
        if scale is not None:
            passed.addmm_(own[:, rows] - grad[:, rows], corners.w[rows])
        made += drop.apply(passed, place)
    return made, own, inner_grad


def adapter_grads(group: Group, own: Tensor, inner_grad: Tensor, x: Tensor, inner: Tensor, drop: Drop) -> Grads:
    """Gradients of the adapters' matrices, float32.

    Args:
        group: The layers.
        own: Gradient of the output before DoRA's factor, from :func:`input_grad`.
        inner_grad: From there.
        x: Input, [tokens, in].
        inner: The adapters' activations, [tokens, border].
        drop: The masks.
    """
    made = Grads([], [], [None] * len(group.layers))
    for place, (rows, columns) in enumerate(group.places):
        if not group.ranks[place]:
            made.a.append(None)
            made.b.append(None)
            continue
        made.a.append(product(inner_grad[:, columns].t(), drop.apply(x, place)))
        made.b.append(product(own[:, rows].t(), inner[:, columns]))
    return made


def _inner_of(group: Group, part: Tensor, inner: Tensor, matrix: Tensor, columns: slice) -> None:
    group.thin(part, group.corners(matrix).a[columns].t(), inner[:, columns], columns.start)


def _clear_rest(group: Group, inner: Tensor) -> None:
    if sum(group.ranks) < group.border:
        inner[:, sum(group.ranks) :].zero_()
