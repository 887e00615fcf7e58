"""One decoder layer (Llama, Mistral, Qwen2, Qwen3) with adapters, as a function of torch's autograd.

Its passes are written out in ``passes``. A layer may keep its input only and run forward once more (gradient
checkpointing, arXiv 1604.06174).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fintune.training.fused import passes
from fintune.training.fused.attend import Sequences
from fintune.training.fused.bordered import Group
from fintune.training.fused.dropped import drop_of
from fintune.training.fused.kernels import HeadParts
from fintune.training.fused.passes import Drops


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
        dropout: Share of the adapters' inputs that is zero while training.
        number: Of the layer in the model.
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
    dropout: float = 0.0
    number: int = 0

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

    def drops(self, seed: int | None) -> Drops:
        """Masks of the groups for a batch; None where nothing is dropped."""
        made = [drop_of(self.dropout, seed, self.number, group) for group in range(4)]
        return made[0], made[1], made[2], made[3]

    def __call__(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, sequences: Sequences, seed: int | None = None
    ) -> Tensor:
        """Hidden states behind the layer.

        Args:
            hidden: [tokens, hidden].
            cos: Of the rotary embedding, [tokens, width].
            sin: Likewise.
            sequences: Borders of the sequences in the batch.
            seed: Of the batch's dropout; None where nothing is dropped.
        """
        made: Tensor = _Run.apply(hidden, cos, sin, sequences, self, self.drops(seed), *self.parameters())
        return made


class _Run(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        sequences: Sequences,
        layer: Layer,
        drops: Drops,
        *parameters: Tensor,
    ) -> Tensor:
        out, kept = passes.forward(layer, hidden, cos, sin, sequences, drops)
        ctx.layer, ctx.sequences, ctx.drops, ctx.kept = layer, sequences, drops, None if layer.checkpoint else kept
        ctx.save_for_backward(hidden, cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, cos, sin = ctx.saved_tensors
        layer: Layer = ctx.layer
        kept = ctx.kept or passes.forward(layer, hidden, cos, sin, ctx.sequences, ctx.drops, again=True)[1]
        ctx.kept = None
        grad, parameter_grads = passes.backward(layer, kept, grads[0], cos, sin, needs_input=ctx.needs_input_grad[0])
        return grad, None, None, None, None, None, *parameter_grads
