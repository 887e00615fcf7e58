"""The same group of all decoder layers of a model, updated together after each optimizer step.

The adapters' parameters become views of one tensor for each kind (all ``A`` of queries, keys and values, all ``B``
of the queries, ...). After an optimizer step, one copy for each kind updates the augmented weights of all layers,
and three operations compute DoRA's scales. A copy and a norm for every layer would keep a small batch waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fintune.training.fused.lora_linear import LinearGroup, is_four_bit


class GroupStack:
    """Groups of one kind, one of each decoder layer.

    Args:
        groups: Groups of one shape, whose adapters have the same ranks.
        hold: Hold the augmented weight of every group. 16-bit weights are then moved into it: the layer's parameter
            becomes a view. Otherwise a weight is put together at every use (4-bit weights if memory is short).
    """

    def __init__(self, groups: Sequence[LinearGroup], *, hold: bool) -> None:
        with torch.no_grad():
            self._build(groups, hold=hold)

    def _build(self, groups: Sequence[LinearGroup], *, hold: bool) -> None:
        self._groups = list(groups)
        self._weights: Tensor | None = None  # [layers, out + r, in + r]
        self._scales: Tensor | None = None  # [layers, out]
        if hold:
            self._weights = self._hold_weights()
        first, indices = groups[0], range(len(groups[0].layers))
        self._a = _stack(  # [layers, rank, in]
            groups, lambda group, at: (group.layers[at].a, group.b_slices[at][1]), (sum(first.ranks), first.num_in)
        )
        self._b = [  # [layers, out, rank] each
            _stack(groups, lambda group, at: (group.layers[at].b, slice(None)), (size, rank), [index])
            for index, size, rank in zip(indices, first.sizes, first.ranks, strict=True)
        ]
        self._magnitudes = _stack(  # [layers, out]
            groups, lambda group, at: (group.layers[at].magnitude, group.b_slices[at][0]), (first.num_out,)
        )
        if self._magnitudes is not None:
            self._row_squares = torch.stack([_row_squares(group) for group in self._groups])
            for group, magnitude, squares in zip(self._groups, self._magnitudes, self._row_squares, strict=True):
                group.magnitude, group.row_squares = magnitude, squares
            if hold:
                self._scales = torch.empty_like(self._magnitudes)
                for group, scale in zip(self._groups, self._scales, strict=True):
                    group.held_scale = scale

    def refresh(self) -> None:
        """Update the adapters' part of the augmented weights, and DoRA's scales.

        It is called for every batch, because the fused optimizers of torch do not count a change of the parameters.
        """
        if self._weights is not None:
            with torch.no_grad():
                self._refresh(self._weights)

    def _refresh(self, weights: Tensor) -> None:
        first = self._groups[0]
        out, num_in = first.num_out, first.num_in
        if self._a is not None:
            weights[:, out : out + self._a.shape[1], :num_in].copy_(self._a)
        for (rows, columns), b in zip(first.b_slices, self._b, strict=True):
            if b is not None:
                weights[:, rows, num_in + columns.start : num_in + columns.stop].copy_(b)
        if self._magnitudes is not None and self._scales is not None:
            self._scales.copy_(first.dora_scales(weights, self._row_squares, self._magnitudes))

    def _hold_weights(self) -> Tensor:
        first = self._groups[0]
        weights = torch.zeros(len(self._groups), *first.shape, dtype=first.dtype, device=first.device)
        for group, weight in zip(self._groups, weights, strict=True):
            group.write_base_weights(weight)
            group.held_weight = weight
            parts = weight[: group.num_out, : group.num_in].split(group.sizes)
            for layer, part in zip(group.layers, parts, strict=True):
                if not is_four_bit(layer.base) and layer.base.weight.dtype == group.dtype:
                    layer.base.weight.data = part
        return weights


def _stack(
    groups: Sequence[LinearGroup],
    pick: Callable[[LinearGroup, int], tuple[nn.Parameter | None, slice]],
    shape: tuple[int, ...],
    indices: Sequence[int] | None = None,
) -> Tensor | None:
    """Move a parameter of layers of all groups into one tensor, [groups, *shape]; None if no layer has it.

    Args:
        groups: The groups.
        pick: Returns the parameter of a group's layer, and its place in the group's part of the tensor.
        shape: Shape of that part.
        indices: Indices of the layers in their group; all by default.
    """
    indices = range(len(groups[0].layers)) if indices is None else indices
    example = next((found for index in indices if (found := pick(groups[0], index)[0]) is not None), None)
    if example is None:
        return None
    dtype = torch.float32 if len(shape) == 1 else example.dtype  # magnitudes
    stacked = torch.ones(len(groups), *shape, dtype=dtype, device=example.device)
    for group, part in zip(groups, stacked, strict=True):
        for parameter, place in (pick(group, index) for index in indices):
            if parameter is not None:
                part[place].copy_(parameter.detach())
                parameter.data = part[place]
    return stacked


def _row_squares(group: LinearGroup) -> Tensor:
    """Return the squared norm of each row of the frozen weights, float32 [out]."""
    weights = group.weight()[: group.num_out, : group.num_in]
    # In blocks: a float32 copy of the whole matrix would be the largest allocation of the run.
    return torch.cat([rows.float().pow(2).sum(1) for rows in weights.split(1024)])
