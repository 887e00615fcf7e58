"""The forward and backward pass of a decoder layer, written out.

What is gained over autograd through the modules: products of layers that read one input are one product, adapters
are part of it (see ``bordered``), elementwise steps between products are one pass each, and what is kept for the
backward pass is chosen: everything that a product made, nothing that one elementwise pass makes again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fintune.training.fused import dropped, kernels
from fintune.training.fused.adapted import Grads
from fintune.training.fused.attend import Sequences, attend
from fintune.training.fused.bordered import Group
from fintune.training.fused.dora import split_magnitude_grad
from fintune.training.fused.dropped import Drop
from fintune.training.fused.kernels import Magnitudes

if TYPE_CHECKING:
    from fintune.training.fused.layer import Layer

Drops = tuple[Drop | None, Drop | None, Drop | None, Drop | None]
"""Of the groups, in their order."""


@dataclass
class Kept:
    """What the forward pass leaves for the backward pass."""

    hidden: Tensor
    inverses: tuple[Tensor, Tensor]
    wides: tuple[Tensor, Tensor]
    qkv: Tensor | None
    qkv_leaves: tuple[Tensor, Tensor, Tensor]
    mixed: Tensor
    inner_output: Tensor
    middle: Tensor
    gate_up: Tensor
    inner_down: Tensor
    branches: tuple[Tensor, Tensor | None] | None
    scales: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    drops: Drops
    unscaled: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

    @property
    def factors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """DoRA's factors that are applied behind a group: with dropout the group has applied its own."""
        left = [None if drop is not None else scale for scale, drop in zip(self.scales, self.drops, strict=True)]
        return left[0], left[1], left[2], left[3]


def forward(
    layer: Layer,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    sequences: Sequences,
    drops: Drops,
    *,
    again: bool = False,
) -> tuple[Tensor, Kept]:
    """Forward pass.

    Args:
        layer: The weights.
        hidden: [tokens, hidden].
        cos: Of the rotary embedding, [tokens, width].
        sin: Likewise.
        sequences: Borders of the sequences in the batch.
        drops: Masks of the groups.
        again: Only what the backward pass needs is wanted.

    Returns:
        The layer's output and what its backward pass needs.
    """
    run = kernels.of(hidden)
    tokens = len(hidden)
    wide = layer.qkv.wide(tokens)
    _, inverse = run.add_norm(hidden, None, None, layer.norms[0], layer.eps, wide[:, : layer.qkv.num_in])
    matrix = layer.qkv.matrix()
    qkv_scale = layer.qkv.scale(matrix)
    qkv, free_qkv = _through(layer.qkv, wide, matrix, qkv_scale, drops[0])
    parts = replace(layer.heads, scale=None if drops[0] else qkv_scale)
    leaves = tuple(each.requires_grad_() for each in run.split_heads(qkv, parts, cos, sin))
    # A small graph of its own: torch keeps what the attention's backward pass needs.
    with torch.enable_grad():
        mixed = attend(leaves[0], leaves[1], leaves[2], sequences, layer.scaling)
    matrix = layer.output.matrix()
    output_scale = layer.output.scale(matrix)
    free_output = None
    if drops[1] is None:
        attended, inner_output = layer.output.forward_narrow(mixed.detach(), matrix)
    else:
        inner_output = mixed.new_empty(tokens, layer.output.border)
        attended, free_output = dropped.forward(
            layer.output, mixed.detach(), inner_output, matrix, output_scale, drops[1]
        )

    wide_middle = layer.gate_up.wide(tokens)
    middle, inverse_middle = run.add_norm(
        hidden,
        attended,
        None if drops[1] else output_scale,
        layer.norms[1],
        layer.eps,
        wide_middle[:, : layer.gate_up.num_in],
    )
    matrix = layer.gate_up.matrix()
    gate_scale = layer.gate_up.scale(matrix)
    both, free_both = _through(layer.gate_up, wide_middle, matrix, gate_scale, drops[2])
    wide_down = layer.down.wide(tokens)
    run.gate(both, None if drops[2] else gate_scale, wide_down[:, : layer.down.num_in])
    matrix = layer.down.matrix()
    down_scale = layer.down.scale(matrix)
    fed = free_fed = None
    if again and down_scale is None:
        _inner(layer.down, wide_down, matrix, drops[3])
    else:
        fed, free_fed = _through(layer.down, wide_down, matrix, down_scale, drops[3])
    needs_qkv = parts.scale is not None or parts.query_norm is not None
    kept = Kept(
        hidden=hidden,
        inverses=(inverse, inverse_middle),
        wides=(wide, wide_middle),
        qkv=qkv if needs_qkv else None,
        qkv_leaves=(leaves[0], leaves[1], leaves[2]),
        mixed=mixed,
        inner_output=inner_output,
        middle=middle,
        gate_up=both,
        # A copy, so that the wide buffer beside it can go: the backward pass makes the gated rows again.
        inner_down=wide_down[:, layer.down.num_in :].clone(),
        branches=None if drops[1] or (output_scale is None and down_scale is None) else (attended, fed),
        scales=(qkv_scale, output_scale, gate_scale, down_scale),
        drops=drops,
        unscaled=(free_qkv, free_output, free_both, free_fed),
    )
    if fed is None or again:
        return middle, kept
    return run.add(middle, fed, None if drops[3] else down_scale), kept


def _through(
    group: Group, wide: Tensor, matrix: Tensor, scale: Tensor | None, drop: Drop | None
) -> tuple[Tensor, Tensor | None]:
    """Outputs of a group and, with dropout under DoRA, those before its factor; fills the right part of ``wide``."""
    if drop is None:
        return group.forward(wide, matrix), None
    return dropped.forward(group, wide[:, : group.num_in], wide[:, group.num_in :], matrix, scale, drop)


def _inner(group: Group, wide: Tensor, matrix: Tensor, drop: Drop | None) -> None:
    if drop is None:
        group.inner(wide, matrix)
    else:
        dropped.fill_inner(group, wide[:, : group.num_in], wide[:, group.num_in :], matrix, drop)


def backward(
    layer: Layer, kept: Kept, grad: Tensor, cos: Tensor, sin: Tensor, *, needs_input: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Backward pass.

    Args:
        layer: The weights.
        kept: From :func:`forward`.
        grad: Of the layer's output, [tokens, hidden].
        cos: As there.
        sin: As there.
        needs_input: Whether anything before the layer is trained.

    Returns:
        Gradients of the input, and of ``layer.parameters()``.
    """
    run = kernels.of(grad)
    tokens = len(grad)
    factors, sums = kept.factors, _Sums(layer, kept, tokens)
    # The feed-forward part.
    grad_gated, own, inner_grad = _narrow_backward(layer.down, grad, kept, 3, sums)
    wide = layer.gate_up.wide_grad(tokens)
    left = wide[:, : layer.gate_up.num_out]
    run.gate_backward(grad_gated, kept.gate_up, factors[2], left, grad_gated, sums.behind(2))
    down_grads = _narrow_grads(layer.down, own, inner_grad, grad_gated, kept.inner_down, kept.drops[3])
    del own, inner_grad, grad_gated
    grad_normed, gate_grads = _wide_backward(layer.gate_up, wide, kept, 2, sums, needs_input=True)
    del wide, left
    assert grad_normed is not None, "asked for"
    grad = run.norm_backward(grad_normed, kept.middle, kept.inverses[1], layer.norms[1], grad)
    del grad_normed

    # Attention.
    grad_mixed, own, inner_grad = _narrow_backward(layer.output, grad, kept, 1, sums)
    output_grads = _narrow_grads(layer.output, own, inner_grad, kept.mixed.detach(), kept.inner_output, kept.drops[1])
    grads_heads = torch.autograd.grad(kept.mixed, kept.qkv_leaves, grad_mixed)
    del own, inner_grad, grad_mixed
    wide = layer.qkv.wide_grad(tokens)
    left = wide[:, : layer.qkv.num_out]
    run.join_heads(grads_heads, kept.qkv, replace(layer.heads, scale=factors[0]), cos, sin, left, sums.behind(0))
    grad_normed, qkv_grads = _wide_backward(layer.qkv, wide, kept, 0, sums, needs_input=needs_input)
    if needs_input and grad_normed is not None:
        grad = run.norm_backward(grad_normed, kept.hidden, kept.inverses[0], layer.norms[0], grad)

    found: list[Tensor | None] = []
    all_grads = (qkv_grads, output_grads, gate_grads, down_grads)
    for group, grads, magnitude in zip(layer.groups, all_grads, sums.gradients(), strict=True):
        found += _in_order(group, grads, magnitude)
    return grad if needs_input else None, found


class _Sums:
    """Gradients of a layer's magnitudes: one tensor for the blocks of tokens of all groups, added up once.

    Args:
        layer: The weights.
        kept: What its forward pass left.
        tokens: In the batch.
    """

    def __init__(self, layer: Layer, kept: Kept, tokens: int) -> None:
        self._drops = kept.drops
        self._sizes = [
            0 if scale is None else group.num_out for group, scale in zip(layer.groups, kept.scales, strict=True)
        ]
        self._all: Tensor | None = None
        self._parts: list[Magnitudes | None] = [None] * len(self._sizes)
        if any(self._sizes):
            rows = kernels.of(kept.hidden).num_sums(tokens)
            self._all = torch.empty(rows, sum(self._sizes), dtype=torch.float32, device=kept.hidden.device)
            for place, (group, part) in enumerate(zip(layer.groups, self._all.split(self._sizes, 1), strict=True)):
                if part.shape[1]:
                    assert group.magnitude is not None, "there is a factor"
                    self._parts[place] = Magnitudes(group.magnitude, part)

    def of(self, place: int) -> Magnitudes | None:
        """Those of a group."""
        return self._parts[place]

    def behind(self, place: int) -> Magnitudes | None:
        """Those that the pass behind a group takes along; with dropout the group has its own."""
        return None if self._drops[place] is not None else self._parts[place]

    def gradients(self) -> list[Tensor | None]:
        """Of each group, float32 [out]."""
        if self._all is None:
            return [None] * len(self._sizes)
        return [part if len(part) else None for part in self._all.sum(0).split(self._sizes)]


def _narrow_backward(group: Group, grad: Tensor, kept: Kept, place: int, sums: _Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, of the output before DoRA's factor, of the adapters' activations."""
    drop, scale = kept.drops[place], kept.scales[place]
    grad = grad.to(group.dtype)
    if drop is not None:
        return dropped.input_grad(group, grad, kept.unscaled[place], group.matrix(), scale, drop, sums.of(place))
    if scale is not None:
        assert kept.branches is not None, "kept where there is a factor"
        grad = kernels.of(grad).scale_grad(grad, kept.branches[0 if place == 1 else 1], scale, sums.of(place))
    input_grad, inner_grad = group.input_grad_narrow(grad, group.matrix())
    return input_grad, grad, inner_grad


def _narrow_grads(group: Group, own: Tensor, inner_grad: Tensor, x: Tensor, inner: Tensor, drop: Drop | None) -> Grads:
    if drop is None:
        return group.adapter_grads(own, inner_grad, x, inner)
    return dropped.adapter_grads(group, own, inner_grad, x, inner, drop)


def _wide_backward(
    group: Group, wide_grad: Tensor, kept: Kept, place: int, sums: _Sums, *, needs_input: bool
) -> tuple[Tensor | None, Grads]:
    """Gradients of the input and the adapters' matrices; ``wide_grad`` has the output's at its left."""
    left, wide = wide_grad[:, : group.num_out], kept.wides[0 if place == 0 else 1]
    drop = kept.drops[place]
    if drop is not None:
        grad, own, inner_grad = dropped.input_grad(
            group, left, kept.unscaled[place], group.matrix(), kept.scales[place], drop, sums.of(place)
        )
        x, inner = wide[:, : group.num_in], wide[:, group.num_in :]
        return grad, dropped.adapter_grads(group, own, inner_grad, x, inner, drop)
    input_grad = None
    if needs_input:
        input_grad = group.input_grad(wide_grad, group.matrix())
    else:
        group.inner_grad(wide_grad, group.matrix())
    return input_grad, _adapter_grads(group, wide_grad, wide)


def _adapter_grads(group: Group, wide_grad: Tensor, wide: Tensor) -> Grads:
    return group.adapter_grads(
        wide_grad[:, : group.num_out], wide_grad[:, group.num_out :], wide[:, : group.num_in], wide[:, group.num_in :]
    )


def _in_order(group: Group, grads: Grads, magnitude: Tensor | None) -> list[Tensor | None]:
    if magnitude is not None:
        split_magnitude_grad(group, magnitude, grads)
    found: list[Tensor | None] = []
    for layer, a, b, m in zip(group.layers, grads.a, grads.b, grads.magnitude, strict=True):
        for parameter, made in ((layer.a, a), (layer.b, b), (layer.magnitude, m)):
            if parameter is not None:
                found.append(None if made is None else made.to(parameter.dtype))
    return found
