"""The same group of every layer of a model, with what changes in a step brought up to date in a few operations.

The adapters' parameters become views of one tensor a part (all ``A`` of queries, keys and values of all layers, all
``B`` of the queries, ...). After a step of the optimiser the borders of all layers are then written by one copy a
part, and DoRA's factors made by three operations; a copy and a norm for every layer would keep a small batch waiting.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fintune.training.fused.bordered import Group
from fintune.training.fused.dora import scales, without_magnitude
from fintune.training.fused.weights import is_four_bit


class Stack:
    """Groups of one kind, one a layer of the model.

    Args:
        groups: Of one shape, with adapters of the same ranks.
        keep: Hold every group's bordered matrix. Weights of 16 bits then live in it: the layer's parameter becomes a
            view. Without it a matrix is put together at every use (4-bit weights where memory is short).
    """

    def __init__(self, groups: Sequence[Group], *, keep: bool) -> None:
        with torch.no_grad():
            self._build(groups, keep=keep)

    def _build(self, groups: Sequence[Group], *, keep: bool) -> None:
        self._groups = list(groups)
        self._held: Tensor | None = None
        self._scale: Tensor | None = None
        if keep:
            self._held = self._take_over()
        self._a = self._gather_a()
        self._b = [self._gather_b(place) for place in range(len(groups[0].layers))]
        self._magnitude = self._gather_magnitudes()
        if self._magnitude is not None:
            self._squares = torch.stack([_row_squares(group) for group in self._groups])
            for group, magnitude, squares in zip(self._groups, self._magnitude, self._squares, strict=True):
                group.magnitude, group.squares = magnitude, squares
            if keep:
                self._scale = torch.empty_like(self._magnitude)
                for group, scale in zip(self._groups, self._scale, strict=True):
                    group.held_scale = scale

    def refresh(self) -> None:
        """Bring borders and factors up to date.

        Called for every batch: torch's fused optimisers change parameters without counting it as a change.
        """
        if self._held is not None:
            with torch.no_grad():
                self._refresh(self._held)

    def _refresh(self, held: Tensor) -> None:
        first = self._groups[0]
        out, num_in = first.num_out, first.num_in
        if self._a is not None:
            held[:, out : out + self._a.shape[1], :num_in].copy_(self._a)
        top, column = 0, num_in
        for size, rank, b in zip(first.sizes, first.ranks, self._b, strict=True):
            if b is not None:
                held[:, top : top + size, column : column + rank].copy_(b)
            top, column = top + size, column + rank
        if self._magnitude is not None and self._scale is not None:
            self._scale.copy_(scales(first, held, self._squares, self._magnitude))
            without_magnitude(first, self._scale)

    def _take_over(self) -> Tensor:
        first = self._groups[0]
        held = torch.zeros(len(self._groups), *first.shape, dtype=first.dtype, device=first.device)
        for group, matrix in zip(self._groups, held, strict=True):
            group.write_weights(matrix)
            group.held = matrix
            rows = matrix[: group.num_out, : group.num_in].split(group.sizes)
            for layer, part in zip(group.layers, rows, strict=True):
                if not is_four_bit(layer.base) and layer.base.weight.dtype == group.dtype:
                    layer.base.weight.data = part
        return held

    def _gather_a(self) -> Tensor | None:
        first = self._groups[0]
        found = next((layer.a for layer in first.layers if layer.a is not None), None)
        if found is None:
            return None
        shape = (len(self._groups), sum(first.ranks), first.num_in)
        stacked = torch.empty(shape, dtype=found.dtype, device=found.device)
        for group, rows in zip(self._groups, stacked, strict=True):
            row = 0
            for layer in group.layers:
                if layer.a is not None:
                    _move(layer.a, rows[row : row + layer.rank])
                    row += layer.rank
        return stacked

    def _gather_b(self, place: int) -> Tensor | None:
        found = self._groups[0].layers[place].b
        if found is None:
            return None
        stacked = torch.empty(len(self._groups), *found.shape, dtype=found.dtype, device=found.device)
        for group, part in zip(self._groups, stacked, strict=True):
            b = group.layers[place].b
            assert b is not None, "adapters of a stack are alike"
            _move(b, part)
        return stacked

    def _gather_magnitudes(self) -> Tensor | None:
        first = self._groups[0]
        found = next((layer.magnitude for layer in first.layers if layer.magnitude is not None), None)
        if found is None:
            return None
        stacked = torch.ones(len(self._groups), first.num_out, dtype=torch.float32, device=found.device)
        for group, row in zip(self._groups, stacked, strict=True):
            for layer, part in zip(group.layers, row.split(group.sizes), strict=True):
                if layer.magnitude is not None:
                    _move(layer.magnitude, part)
        return stacked


def _move(parameter: torch.nn.Parameter, place: Tensor) -> None:
    """Let a parameter live at a place of a larger tensor."""
    place.copy_(parameter.detach())
    parameter.data = place


def _row_squares(group: Group) -> Tensor:
    """Squared norm of each row of the frozen weights, float32 [out]."""
    weights = group.matrix()[: group.num_out, : group.num_in]
    # In blocks: a float32 copy of a whole matrix would be the largest allocation of the run.
    return torch.cat([rows.float().pow(2).sum(1) for rows in weights.split(1024)])
