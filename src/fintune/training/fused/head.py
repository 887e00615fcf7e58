"""Final norm, output head and loss of the labelled positions only, in pieces that never hold all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fintune.training.fused import kernels

_PIECE_LOGITS = 2**27
"""Logits that are held at a time; 256 MiB of bfloat16."""


@dataclass(frozen=True)
class Loss:
    """What the labelled positions say.

    Attributes:
        mean: Sum of the losses by the number of labels that the caller gave; a scalar with a gradient.
        losses: Of each label, float32 [labels], without a gradient.
        is_top1: Whether the label has the largest logit, bool [labels].
    """

    mean: Tensor
    losses: Tensor
    is_top1: Tensor


def loss_of(
    hidden: Tensor, rows: Tensor, targets: Tensor, norm: Tensor, eps: float, head: Tensor, num_labels: Tensor | float
) -> Loss:
    """Cross entropy at the labelled positions.

    Args:
        hidden: Behind the last layer, [tokens, hidden].
        rows: Positions that predict a label, int64 [labels].
        targets: The labels, int64 [labels].
        norm: Weight of the final norm, [hidden].
        eps: Of that norm.
        head: [vocabulary, hidden], frozen.
        num_labels: What the sum of the losses is divided by: labels of the whole step, over all devices and
            accumulated passes, so that accumulation does not change the loss.
    """
    factor = torch.as_tensor(1.0 / num_labels, dtype=torch.float32, device=hidden.device)
    mean, losses, is_top1 = _Head.apply(hidden, rows, targets, norm, eps, head, factor)
    return Loss(mean, losses, is_top1)


class _Head(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, rows: Tensor, targets: Tensor, norm: Tensor, eps: float, head: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = kernels.of(hidden)
        chosen = hidden.index_select(0, rows)
        normed = torch.empty(chosen.shape, dtype=head.dtype, device=hidden.device)
        _, inverse = run.add_norm(chosen, None, None, norm, eps, normed)
        wants_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(normed) if wants_grad else None
        piece = max(1, _PIECE_LOGITS // head.shape[0])
        losses, hits = [], []
        for start in range(0, len(rows), piece):
            part = slice(start, start + piece)
            logits = normed[part] @ head.t()
            loss, is_top1 = run.cross_entropy(logits, targets[part], factor if wants_grad else None)
            losses.append(loss)
            hits.append(is_top1)
            if grad is not None:
                torch.mm(logits, head, out=grad[part])
        all_losses, all_hits = torch.cat(losses), torch.cat(hits)
        # The head is frozen, so its input's gradient is all that the backward pass needs: no logits outlive this.
        ctx.save_for_backward(chosen, inverse, rows, norm, grad)
        ctx.shape = hidden.shape
        ctx.mark_non_differentiable(all_losses, all_hits)
        return all_losses.sum() * factor, all_losses, all_hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        chosen, inverse, rows, norm, grad = ctx.saved_tensors
        outer = grads[0]
        zeros = torch.zeros_like(chosen)
        own = kernels.of(chosen).norm_backward(grad, chosen, inverse, norm, zeros) * outer
        full = chosen.new_zeros(ctx.shape)
        # A position predicts one token, so no row comes twice.
        full.index_copy_(0, rows, own.to(full.dtype))
        return full, None, None, None, None, None, None
