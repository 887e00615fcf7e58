"""One decoder layer (Llama, Mistral, Qwen2, Qwen3) with adapters: its forward and backward pass, written out.

What is gained over autograd through the modules: products of layers that read one input are one product, adapters
are part of it (see ``bordered``), elementwise steps between products are one pass each, and what is kept for the
backward pass is chosen: everything that a product made, nothing that one elementwise pass makes again. A layer may
instead keep its input only and run forward once more (gradient checkpointing, arXiv 1604.06174).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fintune.tuning.fused import kernels
from fintune.tuning.fused.attend import Sequences, attend
from fintune.tuning.fused.bordered import Grads, Group
from fintune.tuning.fused.kernels import HeadParts


@dataclass
class Layer:
    """Weights of a decoder layer.

    Attributes:
        qkv: Queries, keys, values.
        output: Of the attention.
        gate_up: Gate and up of the feed-forward part.
        down: Its way back.
        norms: Weights of the norms before attention and feed-forward, [hidden].
        eps: Of these norms.
        heads: Heads, bias and norms of queries and keys.
        scaling: Factor of the attention's scores.
        checkpoint: Keep the input only.
    """

    qkv: Group
    output: Group
    gate_up: Group
    down: Group
    norms: tuple[Tensor, Tensor]
    eps: float
    heads: HeadParts
    scaling: float
    checkpoint: bool = False

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        """In the order of the forward pass."""
        return self.qkv, self.output, self.gate_up, self.down

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the order of the gradients that the backward pass returns."""
        found: list[nn.Parameter] = []
        for group in self.groups:
            for layer in group.layers:
                found += layer.parameters()
        return found

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, sequences: Sequences) -> Tensor:
        """Hidden states behind the layer.

        Args:
            hidden: [tokens, hidden].
            cos: Of the rotary embedding, [tokens, width].
            sin: Likewise.
            sequences: Borders of the sequences in the batch.
        """
        made: Tensor = _Run.apply(hidden, cos, sin, sequences, self, *self.parameters())
        return made


@dataclass
class _Kept:
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


class _Run(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, cos: Tensor, sin: Tensor, sequences: Sequences, layer: Layer, *parameters: Tensor
    ) -> Tensor:
        out, kept = _forward(layer, hidden, cos, sin, sequences)
        ctx.layer, ctx.sequences, ctx.kept = layer, sequences, None if layer.checkpoint else kept
        ctx.save_for_backward(hidden, cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, cos, sin = ctx.saved_tensors
        layer: Layer = ctx.layer
        kept = ctx.kept or _forward(layer, hidden, cos, sin, ctx.sequences, again=True)[1]
        ctx.kept = None
        grad, parameter_grads = _backward(layer, kept, grads[0], cos, sin, needs_input=ctx.needs_input_grad[0])
        return grad, None, None, None, None, *parameter_grads


def _forward(
    layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor, sequences: Sequences, *, again: bool = False
) -> tuple[Tensor, _Kept]:
    """The layer's output and what its backward pass needs; ``again`` makes the latter only."""
    run = kernels.of(hidden)
    tokens = len(hidden)
    wide = layer.qkv.wide(tokens)
    _, inverse = run.add_norm(hidden, None, None, layer.norms[0], layer.eps, wide[:, : layer.qkv.num_in])
    matrix = layer.qkv.matrix()
    qkv_scale = layer.qkv.scale(matrix)
    qkv = layer.qkv.forward(wide, matrix)
    parts = replace(layer.heads, scale=qkv_scale)
    leaves = tuple(each.requires_grad_() for each in run.split_heads(qkv, parts, cos, sin))
    # A small graph of its own: torch keeps what the attention's backward pass needs.
    with torch.enable_grad():
        mixed = attend(leaves[0], leaves[1], leaves[2], sequences, layer.scaling)
    matrix = layer.output.matrix()
    output_scale = layer.output.scale(matrix)
    attended, inner_output = layer.output.forward_narrow(mixed.detach(), matrix)

    wide_middle = layer.gate_up.wide(tokens)
    middle, inverse_middle = run.add_norm(
        hidden, attended, output_scale, layer.norms[1], layer.eps, wide_middle[:, : layer.gate_up.num_in]
    )
    matrix = layer.gate_up.matrix()
    gate_scale = layer.gate_up.scale(matrix)
    both = layer.gate_up.forward(wide_middle, matrix)
    wide_down = layer.down.wide(tokens)
    run.gate(both, gate_scale, wide_down[:, : layer.down.num_in])
    matrix = layer.down.matrix()
    down_scale = layer.down.scale(matrix)
    if again and down_scale is None:
        layer.down.inner(wide_down, matrix)
        fed = None
    else:
        fed = layer.down.forward(wide_down, matrix)
    needs_qkv = qkv_scale is not None or parts.query_norm is not None
    kept = _Kept(
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
        branches=None if output_scale is None and down_scale is None else (attended, fed),
        scales=(qkv_scale, output_scale, gate_scale, down_scale),
    )
    return middle if fed is None or again else run.add(middle, fed, down_scale), kept


def _backward(
    layer: Layer, kept: _Kept, grad: Tensor, cos: Tensor, sin: Tensor, *, needs_input: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    run = kernels.of(grad)
    tokens = len(grad)
    # The feed-forward part.
    own, down_magnitude = _unscale(layer.down, grad, kept, 3)
    grad_gated, inner_grad = layer.down.input_grad_narrow(own, layer.down.matrix())
    wide = layer.gate_up.wide_grad(tokens)
    left = wide[:, : layer.gate_up.num_out]
    run.gate_backward(grad_gated, kept.gate_up, kept.scales[2], left, grad_gated)
    down_grads = layer.down.adapter_grads(own, inner_grad, grad_gated, kept.inner_down)
    del own, inner_grad, grad_gated
    gate_magnitude = _magnitude(layer.gate_up, left, kept.gate_up, kept.scales[2])
    grad_normed = layer.gate_up.input_grad(wide, layer.gate_up.matrix())
    gate_grads = _adapter_grads(layer.gate_up, wide, kept.wides[1])
    del wide, left
    grad = run.norm_backward(grad_normed, kept.middle, kept.inverses[1], layer.norms[1], grad)
    del grad_normed

    # Attention.
    own, output_magnitude = _unscale(layer.output, grad, kept, 1)
    grad_mixed, inner_grad = layer.output.input_grad_narrow(own, layer.output.matrix())
    output_grads = layer.output.adapter_grads(own, inner_grad, kept.mixed.detach(), kept.inner_output)
    grads_heads = torch.autograd.grad(kept.mixed, kept.qkv_leaves, grad_mixed)
    del own, inner_grad, grad_mixed
    wide = layer.qkv.wide_grad(tokens)
    left = wide[:, : layer.qkv.num_out]
    run.join_heads(grads_heads, kept.qkv, replace(layer.heads, scale=kept.scales[0]), cos, sin, left)
    qkv_magnitude = _magnitude(layer.qkv, left, kept.qkv, kept.scales[0])
    if needs_input:
        grad_normed = layer.qkv.input_grad(wide, layer.qkv.matrix())
    else:
        layer.qkv.inner_grad(wide, layer.qkv.matrix())
    qkv_grads = _adapter_grads(layer.qkv, wide, kept.wides[0])
    if needs_input:
        grad = run.norm_backward(grad_normed, kept.hidden, kept.inverses[0], layer.norms[0], grad)

    found: list[Tensor | None] = []
    all_grads = (qkv_grads, output_grads, gate_grads, down_grads)
    magnitudes = (qkv_magnitude, output_magnitude, gate_magnitude, down_magnitude)
    for group, grads, magnitude in zip(layer.groups, all_grads, magnitudes, strict=True):
        found += _in_order(group, grads, magnitude)
    return grad if needs_input else None, found


def _adapter_grads(group: Group, wide_grad: Tensor, wide: Tensor) -> Grads:
    return group.adapter_grads(
        wide_grad[:, : group.num_out], wide_grad[:, group.num_out :], wide[:, : group.num_in], wide[:, group.num_in :]
    )


def _unscale(group: Group, grad: Tensor, kept: _Kept, place: int) -> tuple[Tensor, Tensor | None]:
    """Gradient of a branch before DoRA's factor, and of its magnitudes."""
    scale = kept.scales[place]
    if scale is None:
        return grad.to(group.dtype), None
    assert kept.branches is not None, "kept where there is a factor"
    branch = kept.branches[0 if place == 1 else 1]
    assert branch is not None, "kept where there is a factor"
    own, magnitude = kernels.of(grad).scale_grad(grad.to(group.dtype), branch, scale, group.magnitude)
    return own, magnitude


def _magnitude(group: Group, grad: Tensor, outputs: Tensor | None, scale: Tensor | None) -> Tensor | None:
    if scale is None or outputs is None:
        return None
    made: Tensor = kernels.of(grad).magnitude_grad(grad, outputs, group.magnitude)
    return made


def _in_order(group: Group, grads: Grads, magnitude: Tensor | None) -> list[Tensor | None]:
    if magnitude is not None:
        group.split_magnitude_grad(magnitude, grads)
    found: list[Tensor | None] = []
    for layer, a, b, m in zip(group.layers, grads.a, grads.b, grads.magnitude, strict=True):
        for parameter, made in ((layer.a, a), (layer.b, b), (layer.magnitude, m)):
            if parameter is not None:
                found.append(None if made is None else made.to(parameter.dtype))
    return found
