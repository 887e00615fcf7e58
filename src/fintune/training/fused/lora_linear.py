"""LoRA and DoRA linear layers that read the same input, as one augmented matrix product.

Layers that share an input (q, k and v; gate and up) form a :class:`LinearGroup`. For a layer ``h = W x + s B A x``
(LoRA, arXiv 2106.09685), one matrix, the augmented weight, holds::

            in    r
    out  [  W  |  B  ]         forward    [x | s x A^T] @ (top rows)^T         = x W^T + s x A^T B^T
    r    [  A  |  0  ]         backward   [g | s g B] @ (left columns)         = g W + s g B A

So the adapter adds r columns to a product that is computed anyway, and needs no pass over the output. In a group, the
``W`` are stacked, and the ``B`` are on a block diagonal. The augmented weight of a 16-bit layer *is* its weight: the
parameter of the layer becomes a view of it, so nothing is held twice.

Sizes: ``in`` and ``out`` of the group, ``r`` its ranks' sum, padded. ``s x A^T`` is called the low-rank activations,
[tokens, r]. A buffer [tokens, in + r] that holds both is called an augmented input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fintune.training.fused import kernels_torch
from fintune.training.fused.kernels_torch import matmul_float32
from fintune.training.memory.model import RANK_MULTIPLE


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer with its adapter.

    Attributes:
        base: The frozen layer.
        a: LoRA's A, [rank, in], or None without an adapter.
        b: LoRA's B, [out, rank].
        scaling: LoRA's factor s, alpha / r.
        magnitude: DoRA's magnitude, [out], or None.
    """

    base: nn.Module
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scaling: float = 1.0
    magnitude: nn.Parameter | None = None

    @property
    def rank(self) -> int:
        """Rank of the adapter, 0 without one."""
        return 0 if self.a is None else self.a.shape[0]

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters."""
        return [parameter for parameter in (self.a, self.b, self.magnitude) if parameter is not None]


@dataclass
class AdapterGrads:
    """Gradients of a group's adapters, layer by layer; None if a layer has no such parameter."""

    a: list[Tensor | None]
    b: list[Tensor | None]


@dataclass(frozen=True)
class AugmentedWeight:
    """Views of an augmented weight. They are made once if it is held: a view costs as much time as a kernel launch.

    Attributes:
        w: [out, in].
        a: [r, in].
        b: [out, r], block diagonal.
        top: ``[W | B]``, [out, in + r].
        left: ``[W; A]``, [out + r, in].
        b_blocks: ``B`` of each layer, [its out, its rank].
    """

    w: Tensor
    a: Tensor
    b: Tensor
    top: Tensor
    left: Tensor
    b_blocks: list[Tensor]


class LinearGroup:
    """Linear layers that read one input.

    Args:
        layers: The layers, in the order of their outputs.
        dtype: Type of the products.
    """

    def __init__(self, layers: Sequence[AdaptedLinear], *, dtype: torch.dtype) -> None:
        self.layers = list(layers)
        self.sizes = [int(layer.base.out_features) for layer in layers]
        self.num_in = int(layers[0].base.in_features)
        self.num_out = sum(self.sizes)
        self.ranks = [layer.rank for layer in layers]
        self.b_slices = _block_slices(self.sizes, self.ranks)
        """Rows and columns of each layer's block of ``B``."""
        self.padded_rank = -(-sum(self.ranks) // RANK_MULTIPLE) * RANK_MULTIPLE
        self.dtype = dtype
        self.device = layers[0].base.weight.device
        scalings = {layer.scaling for layer in layers if layer.rank}
        # One scaling for all columns, or else one for each column.
        self.scaling = scalings.pop() if len(scalings) == 1 else 1.0
        self.column_scalings = self._column_scalings() if scalings else None
        # Set by a GroupStack if the augmented weights of all layers of the model are held.
        self.held_weight: Tensor | None = None
        self.held_scale: Tensor | None = None
        self.magnitude: Tensor | None = None
        self.row_squares: Tensor | None = None
        self._held_views: AugmentedWeight | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the augmented weight, [out + r, in + r]."""
        return self.num_out + self.padded_rank, self.num_in + self.padded_rank

    # -- the augmented weight

    def weight(self) -> Tensor:
        """Return the augmented weight, [out + r, in + r]. If none is held, a new one is made."""
        return self._make_weight() if self.held_weight is None else self.held_weight

    def _make_weight(self) -> Tensor:
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        weight[self.num_out :].zero_()
        weight[:, self.num_in :].zero_()
        self.write_base_weights(weight)
        for layer, (rows, columns) in zip(self.layers, self.b_slices, strict=True):
            if layer.a is not None and layer.b is not None:
                weight[self.num_out :][columns, : self.num_in].copy_(layer.a.detach())
                weight[rows, self.num_in :][:, columns].copy_(layer.b.detach())
        return weight

    def write_base_weights(self, weight: Tensor) -> None:
        """Write the frozen weights ``W`` into an augmented weight."""
        for layer, part in zip(self.layers, weight[: self.num_out, : self.num_in].split(self.sizes), strict=True):
            if is_four_bit(layer.base):
                dequantize(layer.base, part)
            else:
                part.copy_(layer.base.weight)

    def views(self, weight: Tensor) -> AugmentedWeight:
        """Return the views of an augmented weight."""
        if self._held_views is not None and weight is self.held_weight:
            return self._held_views
        top, left = weight[: self.num_out], weight[:, : self.num_in]
        b = top[:, self.num_in :]
        blocks = [b[rows, columns] for rows, columns in self.b_slices]
        views = AugmentedWeight(
            weight[: self.num_out, : self.num_in], weight[self.num_out :, : self.num_in], b, top, left, blocks
        )
        if weight is self.held_weight:
            self._held_views = views
        return views

    def _column_scalings(self) -> Tensor:
        scalings = torch.zeros(self.padded_rank, device=self.device)
        for layer, (_, columns) in zip(self.layers, self.b_slices, strict=True):
            scalings[columns] = layer.scaling
        return scalings.to(self.dtype)

    # -- forward

    def augmented_input(self, tokens: int) -> Tensor:
        """Return a new buffer [tokens, in + r]. The caller writes the input into its left part."""
        return torch.empty(tokens, self.num_in + self.padded_rank, dtype=self.dtype, device=self.device)

    def forward(self, augmented: Tensor, weight: Tensor) -> Tensor:
        """Return the outputs [tokens, out] without bias and DoRA's scale; fills the right part of the input."""
        self.fill_low_rank(augmented, weight)
        return augmented @ self.views(weight).top.t()

    def fill_low_rank(self, augmented: Tensor, weight: Tensor) -> None:
        """Write the low-rank activations into the right part of an augmented input."""
        self.scaled_matmul(augmented[:, : self.num_in], self.views(weight).a.t(), augmented[:, self.num_in :])

    def forward_separate(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Compute as :meth:`forward` with a second product, for an input [tokens, in] that is not in such a buffer.

        Returns:
            Outputs [tokens, out], and low-rank activations [tokens, r].
        """
        views = self.views(weight)
        low_rank = torch.empty(len(x), self.padded_rank, dtype=self.dtype, device=self.device)
        self.scaled_matmul(x, views.a.t(), low_rank)
        return (x @ views.w.t()).addmm_(low_rank, views.b.t()), low_rank

    def scaled_matmul(self, left: Tensor, right: Tensor, out: Tensor, column: int = 0) -> None:
        """Compute ``out = s * left @ right``, [tokens, columns], from a column of the group's r columns on."""
        if out.shape[1] == 0:
            return
        torch.addmm(out, left, right, beta=0, alpha=self.scaling, out=out)
        if self.column_scalings is not None:
            out.mul_(self.column_scalings[column : column + out.shape[1]])

    # -- backward

    def augmented_grad(self, tokens: int) -> Tensor:
        """Return a new buffer [tokens, out + r]. The caller writes the gradient of the output into its left part."""
        return torch.empty(tokens, self.num_out + self.padded_rank, dtype=self.dtype, device=self.device)

    def input_grad(self, augmented_grad: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the input [tokens, in]; fills the right part of the buffer.

        The left part of the buffer [tokens, out + r] holds the gradient of the output before DoRA's scale.
        """
        self.fill_low_rank_grad(augmented_grad, weight)
        return augmented_grad @ self.views(weight).left

    def fill_low_rank_grad(self, augmented_grad: Tensor, weight: Tensor) -> None:
        """Fill only the right part of the buffer, if nothing before these layers is trained."""
        self._low_rank_grad(augmented_grad[:, : self.num_out], weight, augmented_grad[:, self.num_out :])

    def input_grad_separate(self, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Compute as :meth:`input_grad` with a second product, from the gradient of the output [tokens, out].

        Returns:
            Gradients of the input [tokens, in] and of the low-rank activations [tokens, r].
        """
        views = self.views(weight)
        low_rank_grad = self.low_rank_grad(grad, weight)
        return (grad @ views.w).addmm_(low_rank_grad, views.a), low_rank_grad

    def low_rank_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the low-rank activations [tokens, r]; arguments as for :meth:`input_grad_separate`."""
        low_rank_grad = torch.empty(len(grad), self.padded_rank, dtype=self.dtype, device=self.device)
        self._low_rank_grad(grad, weight, low_rank_grad)
        return low_rank_grad

    def _low_rank_grad(self, grad: Tensor, weight: Tensor, out: Tensor) -> None:
        for (rows, columns), block in zip(self.b_slices, self.views(weight).b_blocks, strict=True):
            if columns.start < columns.stop:
                part = grad if rows.stop - rows.start == self.num_out else grad[:, rows]
                self.scaled_matmul(part, block, out[:, columns], columns.start)
        self.clear_padding(out)

    def clear_padding(self, low_rank: Tensor) -> None:
        """Set the padded columns of a [tokens, r] tensor to zero."""
        if sum(self.ranks) < self.padded_rank:
            low_rank[:, sum(self.ranks) :].zero_()

    def adapter_grads(self, grad: Tensor, low_rank_grad: Tensor, x: Tensor, low_rank: Tensor) -> AdapterGrads:
        """Return the gradients of A and B in float32.

        They come from those of the output before DoRA's scale [tokens, out] and of the low-rank activations [tokens,
        r], from the input [tokens, in] and from the low-rank activations [tokens, r].
        """
        grads = AdapterGrads([], [])
        a_grad = matmul_float32(low_rank_grad.t(), x) if self.padded_rank else None  # [r, in]
        for rows, columns in self.b_slices:
            has_adapter = columns.start < columns.stop and a_grad is not None
            grads.a.append(a_grad[columns] if has_adapter and a_grad is not None else None)
            grads.b.append(matmul_float32(grad[:, rows].t(), low_rank[:, columns]) if has_adapter else None)
        return grads

    # -- DoRA

    def dora_scale(self, weight: Tensor) -> Tensor | None:
        """Return DoRA's scale of each output, float32 [out]; None without DoRA."""
        if self.magnitude is None or self.held_scale is not None:
            return self.held_scale
        assert self.row_squares is not None, "set together with the magnitude"
        with torch.no_grad():
            scales = self.dora_scales(weight[None], self.row_squares[None], self.magnitude[None])
        return scales[0]

    def dora_scales(self, weights: Tensor, row_squares: Tensor, magnitudes: Tensor) -> Tensor:
        """Return DoRA's ``m / ||W + s B A||`` of several groups of this shape, 1 for layers without a magnitude.

        The norm is constant in the backward pass (arXiv 2402.09353, section 4.3). The norm of a row needs no sum of the
        matrices, because its square is ``||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>``.

        Args:
            weights: Augmented weights, [groups, out + r, in + r].
            row_squares: Squared norms of the rows of the frozen weights, float32 [groups, out].
            magnitudes: float32 [groups, out].

        Returns:
            float32 [groups, out].
        """
        w, b = weights[:, : self.num_out, : self.num_in], weights[:, : self.num_out, self.num_in :]
        a = weights[:, self.num_out :, : self.num_in]
        cross, gram = matmul_float32(w, a.transpose(1, 2)), matmul_float32(a, a.transpose(1, 2))
        if self.column_scalings is not None:
            # The factors of the columns belong to A as well as to B.
            cross, gram = cross * self.column_scalings, gram * self.column_scalings * self.column_scalings[:, None]
        run = kernels_torch.kernels_for(w)
        scales: Tensor = run.dora_scale(cross, b, gram, row_squares, magnitudes, self.scaling)
        for layer, part in zip(self.layers, scales.split(self.sizes, 1), strict=True):
            if layer.magnitude is None:
                part.fill_(1.0)
        return scales


def _block_slices(sizes: Sequence[int], ranks: Sequence[int]) -> list[tuple[slice, slice]]:
    slices, row, column = [], 0, 0
    for size, rank in zip(sizes, ranks, strict=True):
        slices.append((slice(row, row + size), slice(column, column + rank)))
        row, column = row + size, column + rank
    return slices


# -- 4-bit weights of bitsandbytes (NF4, arXiv 2305.14314)


def is_four_bit(layer: nn.Module) -> bool:
    """Whether the weight of the layer is packed in 4 bits."""
    return getattr(layer.weight, "quant_state", None) is not None


def dequantize(layer: nn.Module, out: Tensor) -> None:
    """Write the packed weight of a ``Linear4bit`` as numbers into [out, in], which may have its own row stride."""
    weight: Any = layer.weight
    state = weight.quant_state
    if not out.is_cuda or out.shape[1] % state.blocksize:
        from bitsandbytes.functional import dequantize_4bit

        out.copy_(dequantize_4bit(weight.data, state))
        return
    from fintune.training.fused.launch_triton import unpack_nf4

    # The kernel of bitsandbytes writes a new matrix, which would be copied here: twice the memory traffic.
    outer = (state.state2.code, state.state2.absmax, state.offset) if state.nested else None
    outer_size = state.state2.blocksize if state.nested else 1
    unpack_nf4(weight.data, state.code, state.absmax, outer, state.blocksize, outer_size, out)
