"""A key-value cache with room to grow in place.

Transformers' own cache is copied whole for every new token, which on a CPU is a quarter of the decoding time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, PreTrainedConfig


def cache_with_room(config: PreTrainedConfig, room: int) -> DynamicCache:
    """An empty cache for a model, whose full-attention layers take ``room`` tokens behind the prompt without a copy.

    Layers of other kinds (sliding windows) stay transformers' own.

    Args:
        config: The model's.
        room: New tokens that are to be expected; more work too, with a copy now and then.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        """Keys and values are views of buffers that are longer than they are."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.buffers: list[torch.Tensor] = [key_states[:, :, :0], value_states[:, :, :0]]
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            for at, states in enumerate((key_states, value_states)):
                old = self.buffers[at]
                if old.shape[-2] < end:
                    longer = states.new_empty((*states.shape[:-2], end + room, states.shape[-1]))
                    longer[:, :, :start] = old[:, :, :start]
                    self.buffers[at] = longer
                self.buffers[at][:, :, start:end] = states
            self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            length = self.get_seq_length()
            if length:
                self.buffers = [buffer.index_select(0, indices) for buffer in self.buffers]
                self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

        def spread(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
            self.buffers = [buffer.transpose(1, 2)[rows[:, None], columns].transpose(1, 2) for buffer in self.buffers]
            self.keys, self.values = self.buffers

    cache = DynamicCache(config=config)
    # Exactly this class: its subclasses keep their tokens otherwise.
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_spread(cache: DynamicCache) -> bool:
    """Whether :func:`spread` can be used: all layers keep all tokens."""
    return bool(cache.layers) and all(hasattr(layer, "spread") for layer in cache.layers)


def spread(cache: DynamicCache, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Make a cache of other rows from the tokens that it has; none of them is computed again.

    Args:
        cache: From :func:`cache_with_room`, not empty.
        rows: For each new row the old one that it is taken from, shape [rows].
        columns: For each token of a new row its place in the old one, shape [rows, tokens].
    """
    for layer in cache.layers:
        layer.spread(rows, columns)
