"""One group of a decoder layer in one batch: its products forward and backward, with dropout or without."""

from __future__ import annotations

from torch import Tensor

from fintune.training.fused import kernels_torch
from fintune.training.fused.dropout import (
    DropoutMask,
    adapter_grads_dropout,
    fill_low_rank_dropout,
    forward_dropout,
    input_grad_dropout,
)
from fintune.training.fused.kernels_torch import MagnitudeSums
from fintune.training.fused.lora_linear import AdapterGrads, LinearGroup


class GroupPass:
    """The products of a group for a batch, and what its backward pass needs of them.

    Attributes:
        group: The layers.
        mask: Dropout masks, or None.
        scale: DoRA's scale of each output, float32 [out], or None.
        augmented: Augmented input, [tokens, in + r], if :meth:`new_input` made one.
        low_rank: Low-rank activations, [tokens, r].
        unscaled: Outputs before DoRA's scale, [tokens, out]; None without DoRA.
        sums: Where the gradients of DoRA's magnitudes go.
    """

    def __init__(self, group: LinearGroup, mask: DropoutMask | None) -> None:
        self.group, self.mask = group, mask
        self.scale: Tensor | None = None
        self.augmented: Tensor | None = None
        self.low_rank: Tensor
        self.unscaled: Tensor | None = None
        self.sums: MagnitudeSums | None = None

    @property
    def later_scale(self) -> Tensor | None:
        """DoRA's scale that the kernel after the group applies. With dropout the group itself has applied it."""
        return None if self.mask is not None else self.scale

    @property
    def later_sums(self) -> MagnitudeSums | None:
        """The sums that the kernel after the group computes. With dropout the group computes them itself."""
        return None if self.mask is not None else self.sums

    def new_input(self, tokens: int) -> Tensor:
        """Make an augmented input and return its left part [tokens, in], which the caller fills."""
        self.augmented = self.group.augmented_input(tokens)
        self.low_rank = self.augmented[:, self.group.num_in :]
        return self.augmented[:, : self.group.num_in]

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Return the outputs [tokens, out] without bias and :attr:`later_scale`.

        Args:
            x: Input [tokens, in], if it is not in an augmented input.
        """
        group, weight = self.group, self.group.weight()
        self.scale = group.dora_scale(weight)
        if self.mask is not None:
            if x is None:
                x = self._left()
            else:
                self.low_rank = x.new_empty(len(x), group.padded_rank)
            out, self.unscaled = forward_dropout(group, x, self.low_rank, weight, self.scale, self.mask)
            return out
        if x is None:
            assert self.augmented is not None, "new_input was called"
            out = group.forward(self.augmented, weight)
        else:
            out, self.low_rank = group.forward_separate(x, weight)
        self.unscaled = None if self.scale is None else out
        return out

    def fill_low_rank(self) -> None:
        """Compute the low-rank activations of the augmented input alone."""
        assert self.augmented is not None, "new_input was called"
        if self.mask is None:
            self.group.fill_low_rank(self.augmented, self.group.weight())
        else:
            fill_low_rank_dropout(self.group, self._left(), self.low_rank, self.group.weight(), self.mask)

    def drop_input(self) -> None:
        """Free the augmented input but its low-rank activations: the backward pass computes the input again."""
        self.low_rank, self.augmented = self.low_rank.clone(), None

    def backward_separate(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the input, of the output before DoRA's scale, and of the low-rank activations."""
        group, grad = self.group, grad.to(self.group.dtype)
        if self.mask is not None:
            return input_grad_dropout(group, grad, self.unscaled, group.weight(), self.scale, self.mask, self.sums)
        if self.scale is not None:
            grad = kernels_torch.kernels_for(grad).scale_grad(grad, self.unscaled, self.scale, self.sums)
        input_grad, low_rank_grad = group.input_grad_separate(grad, group.weight())
        return input_grad, grad, low_rank_grad

    def backward_augmented(self, augmented_grad: Tensor, *, needs_input: bool) -> tuple[Tensor | None, AdapterGrads]:
        """Return the gradients of the input and of the adapters.

        Args:
            augmented_grad: [tokens, out + r], its left part filled with the gradient of the output.
            needs_input: Whether anything before the group is trained.
        """
        group, grad = self.group, augmented_grad[:, : self.group.num_out]
        if self.mask is not None:
            x_grad, grad, low_rank_grad = self.backward_separate(grad)
            return x_grad, self.adapter_grads(grad, low_rank_grad, self._left())
        x_grad = None
        if needs_input:
            x_grad = group.input_grad(augmented_grad, group.weight())
        else:
            group.fill_low_rank_grad(augmented_grad, group.weight())
        return x_grad, self.adapter_grads(grad, augmented_grad[:, group.num_out :], self._left())

    def adapter_grads(self, unscaled_grad: Tensor, low_rank_grad: Tensor, x: Tensor) -> AdapterGrads:
        """Return the gradients of A and B in float32 from those of :meth:`backward_separate` and the input."""
        if self.mask is None:
            return self.group.adapter_grads(unscaled_grad, low_rank_grad, x, self.low_rank)
        return adapter_grads_dropout(self.group, unscaled_grad, low_rank_grad, x, self.low_rank, self.mask)

    def _left(self) -> Tensor:
        assert self.augmented is not None, "new_input was called"
        return self.augmented[:, : self.group.num_in]
