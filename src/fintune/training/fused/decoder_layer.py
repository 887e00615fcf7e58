"""One decoder layer (Llama, Mistral, Qwen2, Qwen3) with adapters: its forward and backward pass, written out.

What this gains over autograd through the modules of transformers: products that read one input are one product, and the
adapters are part of it (see ``lora_linear``). Elementwise steps between products are one kernel each. And what is saved
for the backward pass is chosen: every result of a product, and nothing that one elementwise kernel computes again. A
layer may also save only its input and run forward again (gradient checkpointing, arXiv 1604.06174).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fintune.training.fused import kernels_torch
from fintune.training.fused.attention import attend
from fintune.training.fused.batch import SequenceBounds
from fintune.training.fused.dropout import (
    DropoutMask,
    adapter_grads_dropout,
    dropout_mask,
    fill_low_rank_dropout,
    forward_dropout,
    input_grad_dropout,
)
from fintune.training.fused.kernels_torch import HeadTransform, MagnitudeSums
from fintune.training.fused.lora_linear import AdapterGrads, LinearGroup

Masks = tuple[DropoutMask | None, DropoutMask | None, DropoutMask | None, DropoutMask | None]
"""Dropout masks of the groups of a layer, in their order."""

_QKV, _OUTPUT, _GATE_UP, _DOWN = range(4)
"""Indices of the groups of a layer."""


@dataclass
class FusedDecoderLayer:
    """Weights of a decoder layer.

    Attributes:
        qkv: Projections to queries, keys and values.
        output: Output projection of the attention.
        gate_up: Gate and up projections of the feed-forward part.
        down: Down projection of the feed-forward part.
        norms: Weights of the norms before attention and feed-forward, [hidden].
        eps: Epsilon of these norms.
        heads: Number, bias and norms of the heads.
        scaling: Factor of the attention scores.
        checkpoint: Whether only the input is saved.
        dropout: Probability of the adapters' dropout.
        index: Index of the layer in the model.
    """

    qkv: LinearGroup
    output: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
    norms: tuple[Tensor, Tensor]
    eps: float
    heads: HeadTransform
    scaling: float
    checkpoint: bool = False
    dropout: float = 0.0
    index: int = 0

    @property
    def groups(self) -> tuple[LinearGroup, LinearGroup, LinearGroup, LinearGroup]:
        """The groups in the order of the forward pass."""
        return self.qkv, self.output, self.gate_up, self.down

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters, in the order of the gradients of the backward pass."""
        return [parameter for group in self.groups for linear in group.layers for parameter in linear.parameters()]

    def masks(self, seed: int | None) -> Masks:
        """Return the dropout masks of the groups for a batch."""
        masks = [dropout_mask(self.dropout, seed, self.index, group) for group in range(4)]
        return masks[0], masks[1], masks[2], masks[3]

    def __call__(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, bounds: SequenceBounds, seed: int | None = None
    ) -> Tensor:
        """Return the hidden states after the layer, [tokens, hidden].

        Args:
            hidden: Hidden states before the layer, [tokens, hidden].
            cos: Cosines of the rotary embedding, [tokens, head_dim].
            sin: Sines of the rotary embedding, [tokens, head_dim].
            bounds: Bounds of the sequences in the batch.
            seed: Seed of the batch's dropout; None if nothing is dropped.
        """
        out: Tensor = _LayerFunction.apply(hidden, cos, sin, bounds, self, self.masks(seed), *self.parameters())
        return out


class _LayerFunction(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        bounds: SequenceBounds,
        layer: FusedDecoderLayer,
        masks: Masks,
        *parameters: Tensor,
    ) -> Tensor:
        out, saved = _forward(layer, hidden, cos, sin, bounds, masks)
        ctx.layer, ctx.bounds, ctx.masks, ctx.saved = layer, bounds, masks, None if layer.checkpoint else saved
        ctx.save_for_backward(hidden, cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, cos, sin = ctx.saved_tensors
        layer: FusedDecoderLayer = ctx.layer
        saved = ctx.saved or _forward(layer, hidden, cos, sin, ctx.bounds, ctx.masks, recompute=True)[1]
        ctx.saved = None
        grad, parameter_grads = _backward(layer, saved, grads[0], cos, sin, needs_input=ctx.needs_input_grad[0])
        return grad, None, None, None, None, None, *parameter_grads


@dataclass
class SavedActivations:
    """What the forward pass saves for the backward pass.

    Attributes:
        hidden: Input, [tokens, hidden].
        inverse_rms: 1 / root mean square of the input and of ``middle``, float32 [tokens].
        augmented: Augmented inputs of qkv and of gate and up.
        qkv: Projections before the rotary embedding, if the backward pass needs them.
        heads: Queries, keys and values, [tokens, heads, head_dim], leaves of the attention's own graph.
        attended: Output of the attention, [tokens, heads * head_dim].
        output_low_rank: Low-rank activations of the output projection.
        middle: Hidden states between attention and feed-forward, [tokens, hidden].
        gate_up: Outputs of gate and up, [tokens, 2 * intermediate].
        down_low_rank: Low-rank activations of the down projection.
        branches: Outputs of the output and down projections before DoRA's scale, if there is a scale.
        scales: DoRA's scale of each group, float32 [out].
        masks: Dropout masks of each group.
        unscaled: Outputs of each group before DoRA's scale, with dropout.
    """

    hidden: Tensor
    inverse_rms: tuple[Tensor, Tensor]
    augmented: tuple[Tensor, Tensor]
    qkv: Tensor | None
    heads: tuple[Tensor, Tensor, Tensor]
    attended: Tensor
    output_low_rank: Tensor
    middle: Tensor
    gate_up: Tensor
    down_low_rank: Tensor
    branches: tuple[Tensor, Tensor | None] | None
    scales: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    masks: Masks
    unscaled: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

    def later_scale(self, index: int) -> Tensor | None:
        """Return DoRA's scale that the kernel after a group applies. With dropout the group itself has applied it."""
        return None if self.masks[index] is not None else self.scales[index]


# -- forward


def _forward(
    layer: FusedDecoderLayer,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    bounds: SequenceBounds,
    masks: Masks,
    *,
    recompute: bool = False,
) -> tuple[Tensor, SavedActivations]:
    """Run the layer; arguments as for :class:`FusedDecoderLayer`.

    With ``recompute``, only what the backward pass needs is computed, and the output is not the layer's.
    """
    run = kernels_torch.kernels_for(hidden)
    tokens = len(hidden)

    # Attention.
    augmented = layer.qkv.augmented_input(tokens)
    _, inverse = run.add_norm(hidden, None, None, layer.norms[0], layer.eps, augmented[:, : layer.qkv.num_in])
    weight = layer.qkv.weight()
    qkv_scale = layer.qkv.dora_scale(weight)
    qkv, qkv_unscaled = _project(layer.qkv, augmented, weight, qkv_scale, masks[_QKV])
    transform = replace(layer.heads, scale=None if masks[_QKV] else qkv_scale)
    heads = tuple(tensor.requires_grad_() for tensor in run.split_heads(qkv, transform, cos, sin))
    # The attention has its own small graph: torch saves what its backward pass needs.
    with torch.enable_grad():
        attended = attend(heads[0], heads[1], heads[2], bounds, layer.scaling)
    weight = layer.output.weight()
    output_scale = layer.output.dora_scale(weight)
    output_unscaled, mask = None, masks[_OUTPUT]
    if mask is None:
        branch, output_low_rank = layer.output.forward_separate(attended.detach(), weight)
    else:
        output_low_rank = attended.new_empty(tokens, layer.output.padded_rank)
        branch, output_unscaled = forward_dropout(
            layer.output, attended.detach(), output_low_rank, weight, output_scale, mask
        )

    # Feed-forward.
    augmented_middle = layer.gate_up.augmented_input(tokens)
    middle, inverse_middle = run.add_norm(
        hidden,
        branch,
        None if mask else output_scale,
        layer.norms[1],
        layer.eps,
        augmented_middle[:, : layer.gate_up.num_in],
    )
    weight = layer.gate_up.weight()
    gate_scale = layer.gate_up.dora_scale(weight)
    gate_up, gate_unscaled = _project(layer.gate_up, augmented_middle, weight, gate_scale, masks[_GATE_UP])
    augmented_down = layer.down.augmented_input(tokens)
    run.gate(gate_up, None if masks[_GATE_UP] else gate_scale, augmented_down[:, : layer.down.num_in])
    weight = layer.down.weight()
    down_scale = layer.down.dora_scale(weight)
    down_branch = down_unscaled = None
    if recompute and down_scale is None:
        _fill_low_rank(layer.down, augmented_down, weight, masks[_DOWN])
    else:
        down_branch, down_unscaled = _project(layer.down, augmented_down, weight, down_scale, masks[_DOWN])

    needs_qkv = transform.scale is not None or transform.query_norm is not None
    saved = SavedActivations(
        hidden=hidden,
        inverse_rms=(inverse, inverse_middle),
        augmented=(augmented, augmented_middle),
        qkv=qkv if needs_qkv else None,
        heads=(heads[0], heads[1], heads[2]),
        attended=attended,
        output_low_rank=output_low_rank,
        middle=middle,
        gate_up=gate_up,
        # A copy, so that the augmented buffer can be freed: the backward pass computes the gated rows again.
        down_low_rank=augmented_down[:, layer.down.num_in :].clone(),
        branches=None if mask or (output_scale is None and down_scale is None) else (branch, down_branch),
        scales=(qkv_scale, output_scale, gate_scale, down_scale),
        masks=masks,
        unscaled=(qkv_unscaled, output_unscaled, gate_unscaled, down_unscaled),
    )
    if down_branch is None or recompute:
        return middle, saved
    return run.add(middle, down_branch, None if masks[_DOWN] else down_scale), saved


def _project(
    group: LinearGroup, augmented: Tensor, weight: Tensor, scale: Tensor | None, mask: DropoutMask | None
) -> tuple[Tensor, Tensor | None]:
    """Return the outputs of a group and, with dropout and DoRA, those before its scale; fills the augmented input."""
    if mask is None:
        return group.forward(augmented, weight), None
    return forward_dropout(group, augmented[:, : group.num_in], augmented[:, group.num_in :], weight, scale, mask)


def _fill_low_rank(group: LinearGroup, augmented: Tensor, weight: Tensor, mask: DropoutMask | None) -> None:
    if mask is None:
        group.fill_low_rank(augmented, weight)
    else:
        fill_low_rank_dropout(group, augmented[:, : group.num_in], augmented[:, group.num_in :], weight, mask)


# -- backward


def _backward(
    layer: FusedDecoderLayer, saved: SavedActivations, grad: Tensor, cos: Tensor, sin: Tensor, *, needs_input: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Run the backward pass.

    Args:
        layer: The weights.
        saved: What :func:`_forward` saved.
        grad: Gradient of the layer's output, [tokens, hidden].
        cos: Cosines of the rotary embedding, [tokens, head_dim].
        sin: Sines of the rotary embedding, [tokens, head_dim].
        needs_input: Whether anything before the layer is trained.

    Returns:
        Gradients of the input, and of ``layer.parameters()``.
    """
    run = kernels_torch.kernels_for(grad)
    tokens = len(grad)
    sums = _LayerMagnitudeSums(layer, saved, tokens)

    # Feed-forward.
    gated_grad, unscaled_grad, low_rank_grad = _backward_separate(layer.down, grad, saved, _DOWN, sums)
    augmented_grad = layer.gate_up.augmented_grad(tokens)
    left = augmented_grad[:, : layer.gate_up.num_out]
    scale = saved.later_scale(_GATE_UP)
    # Afterwards gated_grad holds the gated rows, the input of the down projection.
    run.gate_backward(gated_grad, saved.gate_up, scale, left, gated_grad, sums.of_later_kernel(_GATE_UP))
    down_grads = _adapter_grads(
        layer.down, unscaled_grad, low_rank_grad, gated_grad, saved.down_low_rank, saved.masks[_DOWN]
    )
    del unscaled_grad, low_rank_grad, gated_grad
    normed_grad, gate_grads = _backward_augmented(
        layer.gate_up, augmented_grad, saved, _GATE_UP, sums, needs_input=True
    )
    del augmented_grad, left
    assert normed_grad is not None, "needs_input is True"
    grad = run.norm_backward(normed_grad, saved.middle, saved.inverse_rms[1], layer.norms[1], grad)
    del normed_grad

    # Attention.
    attended_grad, unscaled_grad, low_rank_grad = _backward_separate(layer.output, grad, saved, _OUTPUT, sums)
    output_grads = _adapter_grads(
        layer.output,
        unscaled_grad,
        low_rank_grad,
        saved.attended.detach(),
        saved.output_low_rank,
        saved.masks[_OUTPUT],
    )
    head_grads = torch.autograd.grad(saved.attended, saved.heads, attended_grad)
    del unscaled_grad, low_rank_grad, attended_grad
    augmented_grad = layer.qkv.augmented_grad(tokens)
    left = augmented_grad[:, : layer.qkv.num_out]
    transform = replace(layer.heads, scale=saved.later_scale(_QKV))
    run.join_heads(head_grads, saved.qkv, transform, cos, sin, left, sums.of_later_kernel(_QKV))
    normed_grad, qkv_grads = _backward_augmented(layer.qkv, augmented_grad, saved, _QKV, sums, needs_input=needs_input)
    if needs_input and normed_grad is not None:
        grad = run.norm_backward(normed_grad, saved.hidden, saved.inverse_rms[0], layer.norms[0], grad)

    parameter_grads: list[Tensor | None] = []
    all_grads = (qkv_grads, output_grads, gate_grads, down_grads)
    for group, grads, magnitude in zip(layer.groups, all_grads, sums.gradients(), strict=True):
        parameter_grads += _in_parameter_order(group, grads, magnitude)
    return grad if needs_input else None, parameter_grads


class _LayerMagnitudeSums:
    """Gradients of a layer's magnitudes: one tensor with blocks of tokens for all groups, added up once.

    Args:
        layer: The weights.
        saved: What the forward pass saved.
        tokens: Number of tokens of the batch.
    """

    def __init__(self, layer: FusedDecoderLayer, saved: SavedActivations, tokens: int) -> None:
        self._masks = saved.masks
        self._sizes = [
            0 if scale is None else group.num_out for group, scale in zip(layer.groups, saved.scales, strict=True)
        ]
        self._blocks: Tensor | None = None  # float32 [blocks, out of all groups with DoRA]
        self._parts: list[MagnitudeSums | None] = [None] * len(self._sizes)
        if any(self._sizes):
            num_blocks = kernels_torch.kernels_for(saved.hidden).num_sums(tokens)
            self._blocks = torch.empty(num_blocks, sum(self._sizes), dtype=torch.float32, device=saved.hidden.device)
            parts = self._blocks.split(self._sizes, 1)
            for index, (group, part) in enumerate(zip(layer.groups, parts, strict=True)):
                if part.shape[1]:
                    assert group.magnitude is not None, "there is a scale"
                    self._parts[index] = MagnitudeSums(group.magnitude, part)

    def of_group(self, index: int) -> MagnitudeSums | None:
        """Return the sums of a group."""
        return self._parts[index]

    def of_later_kernel(self, index: int) -> MagnitudeSums | None:
        """Return the sums that the kernel after a group computes. With dropout the group computes them itself."""
        return None if self._masks[index] is not None else self._parts[index]

    def gradients(self) -> list[Tensor | None]:
        """Return the gradient of the magnitudes of each group, float32 [out]."""
        if self._blocks is None:
            return [None] * len(self._sizes)
        return [part if len(part) else None for part in self._blocks.sum(0).split(self._sizes)]


def _backward_separate(
    group: LinearGroup, grad: Tensor, saved: SavedActivations, index: int, sums: _LayerMagnitudeSums
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input, of the output before DoRA's scale, and of the low-rank activations."""
    mask, scale = saved.masks[index], saved.scales[index]
    grad = grad.to(group.dtype)
    if mask is not None:
        return input_grad_dropout(group, grad, saved.unscaled[index], group.weight(), scale, mask, sums.of_group(index))
    if scale is not None:
        assert saved.branches is not None, "saved if there is a scale"
        branch = saved.branches[0 if index == _OUTPUT else 1]
        grad = kernels_torch.kernels_for(grad).scale_grad(grad, branch, scale, sums.of_group(index))
    input_grad, low_rank_grad = group.input_grad_separate(grad, group.weight())
    return input_grad, grad, low_rank_grad


def _backward_augmented(
    group: LinearGroup,
    augmented_grad: Tensor,
    saved: SavedActivations,
    index: int,
    sums: _LayerMagnitudeSums,
    *,
    needs_input: bool,
) -> tuple[Tensor | None, AdapterGrads]:
    """Return the gradients of the input and of the adapters; the left part of the buffer has that of the output."""
    augmented = saved.augmented[0 if index == _QKV else 1]
    x, low_rank = augmented[:, : group.num_in], augmented[:, group.num_in :]
    grad, mask = augmented_grad[:, : group.num_out], saved.masks[index]
    if mask is not None:
        scale, group_sums = saved.scales[index], sums.of_group(index)
        input_grad, unscaled_grad, low_rank_grad = input_grad_dropout(
            group, grad, saved.unscaled[index], group.weight(), scale, mask, group_sums
        )
        return input_grad, adapter_grads_dropout(group, unscaled_grad, low_rank_grad, x, low_rank, mask)
    x_grad = None
    if needs_input:
        x_grad = group.input_grad(augmented_grad, group.weight())
    else:
        group.fill_low_rank_grad(augmented_grad, group.weight())
    return x_grad, group.adapter_grads(grad, augmented_grad[:, group.num_out :], x, low_rank)


def _adapter_grads(
    group: LinearGroup,
    unscaled_grad: Tensor,
    low_rank_grad: Tensor,
    x: Tensor,
    low_rank: Tensor,
    mask: DropoutMask | None,
) -> AdapterGrads:
    if mask is None:
        return group.adapter_grads(unscaled_grad, low_rank_grad, x, low_rank)
    return adapter_grads_dropout(group, unscaled_grad, low_rank_grad, x, low_rank, mask)


def _in_parameter_order(group: LinearGroup, grads: AdapterGrads, magnitude: Tensor | None) -> list[Tensor | None]:
    if magnitude is not None:
        group.split_magnitude_grad(magnitude, grads)
    ordered: list[Tensor | None] = []
    for linear, a, b, m in zip(group.layers, grads.a, grads.b, grads.magnitude, strict=True):
        for parameter, grad in ((linear.a, a), (linear.b, b), (linear.magnitude, m)):
            if parameter is not None:
                ordered.append(None if grad is None else grad.to(parameter.dtype))
    return ordered
