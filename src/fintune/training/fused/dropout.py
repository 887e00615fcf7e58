"""Dropout on the adapters' input, as PEFT applies it, for the layers of a group (see ``lora_linear``).

Every adapted layer draws its own mask ``D`` with the values 0 and 1 / (1 - p). With LoRA only the adapter reads
``D x``. With DoRA, PEFT reads it in the scaled part of the weight as well. With ``d = D x`` and
``k = m / ||W + s B A||``::

    y  = W x + (k - 1) W d + k s B A d          u = W d + s B A d, so y = W x - W d + k u
    dx = W^T g + D (W^T ((k - 1) g) + s A^T B^T k g)

A mask is never saved. It is drawn again from its seed, also in a layer that is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fintune.training.fused import kernels_torch
from fintune.training.fused.kernels_torch import MagnitudeSums, matmul_float32
from fintune.training.fused.lora_linear import AdapterGrads, LinearGroup

_MAX_PARTS = 4
"""Most layers of a group, and groups of a decoder layer."""


@dataclass(frozen=True)
class DropoutMask:
    """Masks of a group for one batch.

    Attributes:
        p: Probability that a number becomes zero.
        seed: Seed of the first layer's mask. The other layers have the next seeds.
    """

    p: float
    seed: int

    def apply(self, x: Tensor, index: int) -> Tensor:
        """Return ``D x`` for the layer at an index of the group, [tokens, in], contiguous."""
        dropped: Tensor = kernels_torch.kernels_for(x).dropout(x, self.p, self.seed + index)
        return dropped


def dropout_mask(p: float, seed: int | None, layer: int, group: int) -> DropoutMask | None:
    """Return the masks of a group of a layer, by their indices and the batch's seed; None if nothing is dropped."""
    if seed is None or p == 0:
        return None
    return DropoutMask(p, (seed + _MAX_PARTS * (_MAX_PARTS * layer + group)) % 2**31)


def forward_dropout(
    group: LinearGroup, x: Tensor, low_rank: Tensor, weight: Tensor, scale: Tensor | None, mask: DropoutMask
) -> tuple[Tensor, Tensor | None]:
    """Compute the outputs with DoRA's scale.

    Args:
        group: The layers.
        x: Input, [tokens, in].
        low_rank: [tokens, r]; gets the low-rank activations.
        weight: Augmented weight of the group.
        scale: DoRA's scale, float32 [out], or None.
        mask: The masks.

    Returns:
        Outputs, [tokens, out], and ``u`` [tokens, out], which the backward pass of DoRA needs.
    """
    views = group.views(weight)
    out = x @ views.w.t()
    if scale is None:
        fill_low_rank_dropout(group, x, low_rank, weight, mask)
        return out.addmm_(low_rank, views.b.t()), None
    unscaled = torch.zeros_like(out)
    for index, (rows, columns) in enumerate(group.b_slices):
        if not group.ranks[index]:
            continue
        dropped = mask.apply(x, index)
        base = dropped @ views.w[rows].t()
        group.scaled_matmul(dropped, views.a[columns].t(), low_rank[:, columns], columns.start)
        part = torch.addmm(base, low_rank[:, columns], views.b[rows, columns].t())
        unscaled[:, rows] = part
        out[:, rows] += (part.float() * scale[rows] - base.float()).to(out.dtype)
    group.clear_padding(low_rank)
    return out, unscaled


def fill_low_rank_dropout(group: LinearGroup, x: Tensor, low_rank: Tensor, weight: Tensor, mask: DropoutMask) -> None:
    """Compute the low-rank activations alone; arguments as for :func:`forward_dropout`."""
    views = group.views(weight)
    for index, (_, columns) in enumerate(group.b_slices):
        if group.ranks[index]:
            dropped = mask.apply(x, index)
            group.scaled_matmul(dropped, views.a[columns].t(), low_rank[:, columns], columns.start)
    group.clear_padding(low_rank)


def input_grad_dropout(
    group: LinearGroup,
    grad: Tensor,
    unscaled: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    mask: DropoutMask,
    sums: MagnitudeSums | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward pass of :func:`forward_dropout` without the gradients of A and B.

    Args:
        group: The layers.
        grad: Gradient of the output, [tokens, out].
        unscaled: ``u`` from the forward pass, [tokens, out].
        weight: Augmented weight of the group.
        scale: DoRA's scale, float32 [out], or None.
        mask: The masks of the forward pass.
        sums: Where the gradients of DoRA's magnitudes go.

    Returns:
        Gradients of the input [tokens, in], of the output before DoRA's scale [tokens, out], and of the low-rank
        activations [tokens, r].
    """
    views = group.views(weight)
    unscaled_grad = grad
    if scale is not None:
        assert unscaled is not None, "saved if there is a scale"
        unscaled_grad = kernels_torch.kernels_for(grad).scale_grad(grad, unscaled, scale, sums)
    low_rank_grad = group.low_rank_grad(unscaled_grad, weight)
    x_grad = grad @ views.w
    for index, (rows, columns) in enumerate(group.b_slices):
        if not group.ranks[index]:
            continue
        dropped_grad = low_rank_grad[:, columns] @ views.a[columns]
        if scale is not None:
            dropped_grad.addmm_(unscaled_grad[:, rows] - grad[:, rows], views.w[rows])
        x_grad += mask.apply(dropped_grad, index)
    return x_grad, unscaled_grad, low_rank_grad


def adapter_grads_dropout(
    group: LinearGroup, unscaled_grad: Tensor, low_rank_grad: Tensor, x: Tensor, low_rank: Tensor, mask: DropoutMask
) -> AdapterGrads:
    """Return the gradients of A and B in float32, from what :func:`input_grad_dropout` returns and from the input."""
    grads = AdapterGrads([], [])
    for index, (rows, columns) in enumerate(group.b_slices):
        has_adapter = group.ranks[index] > 0
        dropped = mask.apply(x, index) if has_adapter else None
        grads.a.append(None if dropped is None else matmul_float32(low_rank_grad[:, columns].t(), dropped))
        grads.b.append(None if dropped is None else matmul_float32(unscaled_grad[:, rows].t(), low_rank[:, columns]))
    return grads
