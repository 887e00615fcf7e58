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
from fintune.training.fused.dropout import DropoutMask, dropout_mask
from fintune.training.fused.group_pass import GroupPass
from fintune.training.fused.kernels_torch import HeadTransform, MagnitudeSums
from fintune.training.fused.lora_linear import AdapterGrads, LinearGroup

Masks = tuple[DropoutMask | None, ...]
"""Dropout masks of the four groups of a layer, in their order."""


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
        masks = tuple(dropout_mask(self.dropout, seed, self.index, group) for group in range(4))
        out: Tensor = _LayerFunction.apply(hidden, cos, sin, bounds, self, masks, *self.parameters())
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
        passes: The passes of the four groups, with their inputs.
        hidden: Input, [tokens, hidden].
        inverse_rms: 1 / root mean square of the input and of ``middle``, float32 [tokens].
        qkv: Projections before the rotary embedding, if the backward pass needs them.
        heads: Queries, keys and values, [tokens, heads, head_dim], leaves of the attention's own graph.
        attended: Output of the attention, [tokens, heads * head_dim].
        middle: Hidden states between attention and feed-forward, [tokens, hidden].
        gate_up: Outputs of gate and up, [tokens, 2 * intermediate].
    """

    passes: tuple[GroupPass, ...]
    hidden: Tensor
    inverse_rms: tuple[Tensor, Tensor]
    qkv: Tensor | None
    heads: tuple[Tensor, ...]
    attended: Tensor
    middle: Tensor
    gate_up: Tensor


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
    """Run the layer. With ``recompute``, only what is saved is computed, and the output is not the layer's."""
    run, tokens = kernels_torch.kernels_for(hidden), len(hidden)
    passes = tuple(map(GroupPass, layer.groups, masks))
    qkv, output, gate_up, down = passes

    # Attention.
    _, inverse = run.add_norm(hidden, None, None, layer.norms[0], layer.eps, qkv.new_input(tokens))
    projected = qkv.forward()
    transform = replace(layer.heads, scale=qkv.later_scale)
    heads = tuple(tensor.requires_grad_() for tensor in run.split_heads(projected, transform, cos, sin))
    # The attention has its own small graph: torch saves what its backward pass needs.
    with torch.enable_grad():
        attended = attend(heads[0], heads[1], heads[2], bounds, layer.scaling)
    branch = output.forward(attended.detach())

    # Feed-forward.
    normed = gate_up.new_input(tokens)
    middle, inverse_middle = run.add_norm(hidden, branch, output.later_scale, layer.norms[1], layer.eps, normed)
    both = gate_up.forward()
    run.gate(both, gate_up.later_scale, down.new_input(tokens))
    out = middle
    if recompute and layer.down.magnitude is None:
        down.fill_low_rank()
    else:
        branch = down.forward()
        out = middle if recompute else run.add(middle, branch, down.later_scale)
    down.drop_input()
    needs_qkv = transform.scale is not None or transform.query_norm is not None
    saved = SavedActivations(
        passes, hidden, (inverse, inverse_middle), projected if needs_qkv else None, heads, attended, middle, both
    )
    return out, saved


def _backward(
    layer: FusedDecoderLayer, saved: SavedActivations, grad: Tensor, cos: Tensor, sin: Tensor, *, needs_input: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of the input (if anything before the layer is trained) and of ``layer.parameters()``."""
    run, tokens = kernels_torch.kernels_for(grad), len(grad)
    qkv, output, gate_up, down = saved.passes
    blocks = _magnitude_blocks(saved.passes, tokens)

    # Feed-forward.
    gated_grad, unscaled_grad, low_rank_grad = down.backward_separate(grad)
    augmented_grad = layer.gate_up.augmented_grad(tokens)
    left = augmented_grad[:, : layer.gate_up.num_out]
    # Afterwards gated_grad holds the gated rows, the input of the down projection.
    run.gate_backward(gated_grad, saved.gate_up, gate_up.later_scale, left, gated_grad, gate_up.later_sums)
    down_grads = down.adapter_grads(unscaled_grad, low_rank_grad, gated_grad)
    del unscaled_grad, low_rank_grad, gated_grad
    normed_grad, gate_grads = gate_up.backward_augmented(augmented_grad, needs_input=True)
    del augmented_grad, left
    assert normed_grad is not None, "needs_input is True"
    grad = run.norm_backward(normed_grad, saved.middle, saved.inverse_rms[1], layer.norms[1], grad)
    del normed_grad

    # Attention.
    attended_grad, unscaled_grad, low_rank_grad = output.backward_separate(grad)
    output_grads = output.adapter_grads(unscaled_grad, low_rank_grad, saved.attended.detach())
    head_grads = torch.autograd.grad(saved.attended, saved.heads, attended_grad)
    del unscaled_grad, low_rank_grad, attended_grad
    augmented_grad = layer.qkv.augmented_grad(tokens)
    left = augmented_grad[:, : layer.qkv.num_out]
    transform = replace(layer.heads, scale=qkv.later_scale)
    run.join_heads(head_grads, saved.qkv, transform, cos, sin, left, qkv.later_sums)
    normed_grad, qkv_grads = qkv.backward_augmented(augmented_grad, needs_input=needs_input)
    if needs_input and normed_grad is not None:
        grad = run.norm_backward(normed_grad, saved.hidden, saved.inverse_rms[0], layer.norms[0], grad)

    parameter_grads: list[Tensor | None] = []
    magnitudes = _add_up(saved.passes, blocks)
    all_grads = (qkv_grads, output_grads, gate_grads, down_grads)
    for group, grads, magnitude in zip(layer.groups, all_grads, magnitudes, strict=True):
        parameter_grads += _in_parameter_order(group, grads, magnitude)
    return grad if needs_input else None, parameter_grads


def _magnitude_blocks(passes: tuple[GroupPass, ...], tokens: int) -> Tensor | None:
    """Give the passes with DoRA their part of one tensor, float32 [blocks of tokens, out of all of them]."""
    parts = [part for part in passes if part.scale is not None]
    if not parts:
        return None
    run, device = kernels_torch.kernels_for(parts[0].low_rank), parts[0].low_rank.device
    sizes = [part.group.num_out for part in parts]
    blocks = torch.empty(run.num_sums(tokens), sum(sizes), dtype=torch.float32, device=device)
    for part, columns in zip(parts, blocks.split(sizes, 1), strict=True):
        assert part.group.magnitude is not None, "there is a scale"
        part.sums = MagnitudeSums(part.group.magnitude, columns)
    return blocks


def _add_up(passes: tuple[GroupPass, ...], blocks: Tensor | None) -> list[Tensor | None]:
    """Return the gradient of the magnitudes of each group, float32 [out], from the sums over blocks of tokens."""
    sizes = [part.group.num_out if part.scale is not None else 0 for part in passes]
    if blocks is None:
        return [None] * len(sizes)
    return [part if len(part) else None for part in blocks.sum(0).split(sizes)]


def _in_parameter_order(group: LinearGroup, grads: AdapterGrads, magnitude: Tensor | None) -> list[Tensor | None]:
    magnitudes = [None] * len(group.layers) if magnitude is None else magnitude.split(group.sizes)
    ordered: list[Tensor | None] = []
    for linear, *parts in zip(group.layers, grads.a, grads.b, magnitudes, strict=True):
        for parameter, grad in zip((linear.a, linear.b, linear.magnitude), parts, strict=True):
            if parameter is not None:
                ordered.append(None if grad is None else grad.to(parameter.dtype))
    return ordered
