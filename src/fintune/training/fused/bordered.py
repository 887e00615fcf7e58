"""Linear layers that read the same input, with their adapters, as one bordered matrix.

For a layer ``W`` [out, in] with the adapter ``B A`` of rank ``r`` and factor ``s``, one buffer holds::

            in    r
    out  [  W  |  B  ]         forward    [x | s x A^T] times (top rows)^T      = x W^T + s x A^T B^T
    r    [  A  |  0  ]         backward   [g | s g B]   times (left columns)    = g W + s g B A

So the adapter costs a few more columns of a product that is taken anyway, and no pass over the output. Layers with one
input (queries, keys and values; gate and up) lie below each other, the ``B`` on a block diagonal. The buffer of a
16-bit layer *is* its weight: the layer's parameter becomes a view of it, so nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fintune.training.fused.adapted import Adapted, Grads
from fintune.training.fused.dora import scales, without_magnitude
from fintune.training.fused.products import product
from fintune.training.fused.weights import dequantise, is_four_bit

_ALIGNMENT = 64
"""Columns; rows then begin at multiples of a cache line, as fast matrix products want."""


@dataclass(frozen=True)
class Corners:
    """Parts of a bordered matrix; cut once where it is held, since every cut costs as much as a launch."""

    w: Tensor
    a: Tensor
    b: Tensor
    top: Tensor
    left: Tensor
    blocks: list[Tensor]


class Group:
    """Layers that read one input.

    Args:
        layers: In the order of their outputs.
        dtype: Type of the products.
    """

    def __init__(self, layers: Sequence[Adapted], *, dtype: torch.dtype) -> None:
        self.layers = list(layers)
        self.sizes = [int(layer.base.out_features) for layer in layers]
        self.num_in = int(layers[0].base.in_features)
        self.num_out = sum(self.sizes)
        self.ranks = [layer.rank for layer in layers]
        self.places = _places(self.sizes, self.ranks)
        """Rows and columns of each layer's block of ``B``."""
        self.border = -(-sum(self.ranks) // _ALIGNMENT) * _ALIGNMENT
        self.dtype = dtype
        self.device = layers[0].base.weight.device
        scalings = {layer.scaling for layer in layers if layer.rank}
        # One factor for all, else one a column.
        self.factor = scalings.pop() if len(scalings) == 1 else 1.0
        self.factors = self._column_factors() if scalings else None
        # Filled by a stack where the matrices of all layers of the model are held.
        self.held: Tensor | None = None
        self.held_scale: Tensor | None = None
        self.magnitude: Tensor | None = None
        self.squares: Tensor | None = None
        self._held_corners: Corners | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the bordered matrix."""
        return self.num_out + self.border, self.num_in + self.border

    # -- the matrix

    def matrix(self) -> Tensor:
        """The bordered matrix, [out + border, in + border]; where none is held, a new one."""
        return self.made() if self.held is None else self.held

    def made(self) -> Tensor:
        """The bordered matrix from the layers' weights."""
        matrix = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        matrix[self.num_out :].zero_()
        matrix[:, self.num_in :].zero_()
        self.write_weights(matrix)
        top, column = 0, 0
        for layer, size in zip(self.layers, self.sizes, strict=True):
            if layer.a is not None and layer.b is not None:
                matrix[self.num_out + column :][: layer.rank, : self.num_in].copy_(layer.a.detach())
                matrix[top : top + size, self.num_in + column :][:, : layer.rank].copy_(layer.b.detach())
            top, column = top + size, column + layer.rank
        return matrix

    def write_weights(self, matrix: Tensor) -> None:
        """Put the frozen weights into their corner."""
        rows = matrix[: self.num_out, : self.num_in].split(self.sizes)
        for layer, part in zip(self.layers, rows, strict=True):
            if is_four_bit(layer.base):
                dequantise(layer.base, part)
            else:
                part.copy_(layer.base.weight)

    def _column_factors(self) -> Tensor:
        factors = torch.zeros(self.border, device=self.device)
        column = 0
        for layer in self.layers:
            factors[column : column + layer.rank] = layer.scaling
            column += layer.rank
        return factors.to(self.dtype)

    # -- products

    def wide(self, tokens: int) -> Tensor:
        """A buffer whose left part takes the input, [tokens, in + border]."""
        return torch.empty(tokens, self.num_in + self.border, dtype=self.dtype, device=self.device)

    def wide_grad(self, tokens: int) -> Tensor:
        """A buffer whose left part takes the gradient of the output, [tokens, out + border]."""
        return torch.empty(tokens, self.num_out + self.border, dtype=self.dtype, device=self.device)

    def forward(self, wide: Tensor, matrix: Tensor) -> Tensor:
        """Outputs, [tokens, out], without bias and DoRA's factor; fills the right part of ``wide``.

        Args:
            wide: From :meth:`wide`, its left part filled.
            matrix: From :meth:`matrix`.
        """
        self.inner(wide, matrix)
        return wide @ self.corners(matrix).top.t()

    def inner(self, wide: Tensor, matrix: Tensor) -> None:
        """The adapters' activations alone, into the right part of ``wide``."""
        self.thin(wide[:, : self.num_in], self.corners(matrix).a.t(), wide[:, self.num_in :])

    def forward_narrow(self, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward` for an input without room at its side.

        Returns:
            Outputs, and the adapters' activations, [tokens, border].
        """
        corners = self.corners(matrix)
        inner = torch.empty(len(x), self.border, dtype=self.dtype, device=self.device)
        self.thin(x, corners.a.t(), inner)
        return (x @ corners.w.t()).addmm_(inner, corners.b.t()), inner

    def input_grad(self, wide_grad: Tensor, matrix: Tensor) -> Tensor:
        """Gradient of the input, [tokens, in]; fills the right part of ``wide_grad``.

        Args:
            wide_grad: From :meth:`wide_grad`, its left part filled with the output's gradient before DoRA's factor.
            matrix: From :meth:`matrix`.
        """
        self.inner_grad(wide_grad, matrix)
        return wide_grad @ self.corners(matrix).left

    def inner_grad(self, wide_grad: Tensor, matrix: Tensor) -> None:
        """Fill the right part of ``wide_grad`` only, where nothing before these layers is trained."""
        self._inner_grad(wide_grad[:, : self.num_out], matrix, wide_grad[:, self.num_out :])

    def input_grad_narrow(self, grad: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`input_grad` for a gradient without room at its side, [tokens, out].

        Returns:
            Gradients of the input and of the adapters' activations.
        """
        corners = self.corners(matrix)
        inner_grad = self.inner_grad_of(grad, matrix)
        return (grad @ corners.w).addmm_(inner_grad, corners.a), inner_grad

    def inner_grad_of(self, grad: Tensor, matrix: Tensor) -> Tensor:
        """Gradient of the adapters' activations, [tokens, border], from that of the output before DoRA's factor."""
        inner_grad = torch.empty(len(grad), self.border, dtype=self.dtype, device=self.device)
        self._inner_grad(grad, matrix, inner_grad)
        return inner_grad

    def _inner_grad(self, grad: Tensor, matrix: Tensor, out: Tensor) -> None:
        top, column = 0, 0
        for size, rank, block in zip(self.sizes, self.ranks, self.corners(matrix).blocks, strict=True):
            if rank:
                part = grad if size == self.num_out else grad[:, top : top + size]
                self.thin(part, block, out[:, column : column + rank], column)
            top, column = top + size, column + rank
        if column < self.border:
            out[:, column:].zero_()

    def corners(self, matrix: Tensor) -> Corners:
        """Parts of the bordered matrix."""
        if self._held_corners is not None and matrix is self.held:
            return self._held_corners
        w, a, b = matrix[: self.num_out, : self.num_in], matrix[self.num_out :, : self.num_in], matrix[: self.num_out]
        b = b[:, self.num_in :]
        blocks, top, column = [], 0, 0
        for size, rank in zip(self.sizes, self.ranks, strict=True):
            blocks.append(b[top : top + size, column : column + rank])
            top, column = top + size, column + rank
        made = Corners(w, a, b, matrix[: self.num_out], matrix[:, : self.num_in], blocks)
        if matrix is self.held:
            self._held_corners = made
        return made

    def thin(self, left: Tensor, right: Tensor, out: Tensor, column: int = 0) -> None:
        """``out = factor * left @ right``, for the adapters' columns from a place on."""
        if out.shape[1] == 0:
            return
        torch.addmm(out, left, right, beta=0, alpha=self.factor, out=out)
        if self.factors is not None:
            out.mul_(self.factors[column : column + out.shape[1]])

    def adapter_grads(self, grad: Tensor, inner_grad: Tensor, x: Tensor, inner: Tensor) -> Grads:
        """Gradients of the adapters' matrices, float32.

        Args:
            grad: Of the output before DoRA's factor, [tokens, out].
            inner_grad: Of the adapters' activations, [tokens, border].
            x: Input, [tokens, in].
            inner: The adapters' activations, [tokens, border].
        """
        made = Grads([], [], [None] * len(self.layers))
        all_a = product(inner_grad.t(), x) if self.border else None
        top, column = 0, 0
        for size, rank in zip(self.sizes, self.ranks, strict=True):
            if rank and all_a is not None:
                made.a.append(all_a[column : column + rank])
                made.b.append(product(grad[:, top : top + size].t(), inner[:, column : column + rank]))
            else:
                made.a.append(None)
                made.b.append(None)
            top, column = top + size, column + rank
        return made

    # -- DoRA

    def scale(self, matrix: Tensor) -> Tensor | None:
        """DoRA's factor of each output, float32 [out]; None without DoRA."""
        if self.magnitude is None or self.held_scale is not None:
            return self.held_scale
        assert self.squares is not None, "filled together with the magnitude"
        with torch.no_grad():
            made = scales(self, matrix[None], self.squares[None], self.magnitude[None])
        without_magnitude(self, made)
        return made[0]


def _places(sizes: Sequence[int], ranks: Sequence[int]) -> list[tuple[slice, slice]]:
    made, row, column = [], 0, 0
    for size, rank in zip(sizes, ranks, strict=True):
        made.append((slice(row, row + size), slice(column, column + rank)))
        row, column = row + size, column + rank
    return made
