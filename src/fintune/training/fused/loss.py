"""Final norm, output head and loss of the labelled positions, in chunks that never hold all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fintune.training.fused import kernels_torch
from fintune.training.memory.model import MAX_CHUNK_LOGITS


@dataclass(frozen=True)
class LabelLoss:
    """The loss of the labelled positions.

    Attributes:
        mean: Sum of the losses divided by the given number of labels; a scalar with a gradient.
        losses: Loss of each label, float32 [labels], without a gradient.
        is_top1: Whether the label has the largest logit, bool [labels].
    """

    mean: Tensor
    losses: Tensor
    is_top1: Tensor


def label_loss(
    hidden: Tensor, rows: Tensor, targets: Tensor, norm: Tensor, eps: float, head: Tensor, num_labels: Tensor | float
) -> LabelLoss:
    """Compute the cross entropy at the labelled positions.

    Args:
        hidden: Hidden states after the last layer, [tokens, hidden].
        rows: Positions that predict a label, int64 [labels].
        targets: The labels, int64 [labels].
        norm: Weight of the final norm, [hidden].
        eps: Epsilon of that norm.
        head: Frozen output head, [vocabulary, hidden].
        num_labels: Divisor of the sum of the losses: the labels of the whole step, over all devices and accumulated
            passes. Accumulation then does not change the loss.
    """
    factor = torch.as_tensor(1.0 / num_labels, dtype=torch.float32, device=hidden.device)
    mean, losses, is_top1 = _LossFunction.apply(hidden, rows, targets, norm, eps, head, factor)
    return LabelLoss(mean, losses, is_top1)


class _LossFunction(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, rows: Tensor, targets: Tensor, norm: Tensor, eps: float, head: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = kernels_torch.kernels_for(hidden)
        labelled = hidden.index_select(0, rows)  # [labels, hidden]
        normed = torch.empty(labelled.shape, dtype=head.dtype, device=hidden.device)
        _, inverse = run.add_norm(labelled, None, None, norm, eps, normed)
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(normed) if needs_grad else None
        chunk_rows = max(1, MAX_CHUNK_LOGITS // head.shape[0])
        losses, hits = [], []
        for start in range(0, len(rows), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            logits = normed[chunk] @ head.t()  # [chunk rows, vocabulary]
            loss, is_top1 = run.cross_entropy(logits, targets[chunk], factor if needs_grad else None)
            losses.append(loss)
            hits.append(is_top1)
            if grad is not None:
                torch.mm(logits, head, out=grad[chunk])
        all_losses, all_hits = torch.cat(losses), torch.cat(hits)
        # The head is frozen, so the backward pass needs only the gradient of its input. No logits outlive this.
        ctx.save_for_backward(labelled, inverse, rows, norm, grad)
        ctx.shape = hidden.shape
        ctx.mark_non_differentiable(all_losses, all_hits)
        return all_losses.sum() * factor, all_losses, all_hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        labelled, inverse, rows, norm, grad = ctx.saved_tensors
        zeros = torch.zeros_like(labelled)
        labelled_grad = (
            kernels_torch.kernels_for(labelled).norm_backward(grad, labelled, inverse, norm, zeros) * grads[0]
        )
        hidden_grad = labelled.new_zeros(ctx.shape)
        # A position predicts one token, so no row occurs twice.
        hidden_grad.index_copy_(0, rows, labelled_grad.to(hidden_grad.dtype))
        return hidden_grad, None, None, None, None, None, None
