"""A loaded base that gets the weights of the merged model, slab by slab: one model is in memory, and no folder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fintune.errors import ModelError
from fintune.export.merge.merged_weights import HEAD, Weights
from fintune.export.merge.safetensor_reader import StoredTensor

if TYPE_CHECKING:
    from torch import nn

_SLAB_ELEMENTS = 4 << 20


def fill_layers(model: nn.Module, weights: Weights, tensors: Iterable[StoredTensor] | None = None) -> None:
    """Overwrite embedding and layers; the output embedding, on which no layer's input depends, may stay the base's.

    Args:
        model: The base, loaded. Its tensors then are what loading the merged folder in the same type would give.
        weights: The merged weights, rounded as they would be stored.
        tensors: Those of ``weights``, such as behind a progress bar; None takes them directly.

    Raises:
        ModelError: Values that are not finite, or a tensor of another shape than the model's.
    """
    import torch

    modules = dict(model.named_modules())
    for tensor in weights.tensors.values() if tensors is None else tensors:
        owner, _, leaf = tensor.name.rpartition(".")
        parameter = getattr(modules.get(owner), leaf, None)
        if tensor.name == HEAD or not isinstance(parameter, torch.nn.Parameter):
            continue  # what a checkpoint holds and a model does not load, as rotary frequencies
        if parameter.shape != tensor.shape:
            if parameter.shape[1:] != tensor.shape[1:] or not isinstance(modules[owner], torch.nn.Embedding):
                raise ModelError(f"tensor {tensor.name} has the shape {list(tensor.shape)}, not the model's")
            parameter = torch.nn.Parameter(parameter.new_empty(tensor.shape), requires_grad=False)
            setattr(modules[owner], leaf, parameter)  # a vocabulary that grew
        step = max(1, _SLAB_ELEMENTS * tensor.shape[0] // max(1, parameter.numel()))
        with torch.no_grad():
            for start in range(0, tensor.shape[0], step):
                stop = min(start + step, tensor.shape[0])
                parameter[start:stop].copy_(torch.from_numpy(weights.rows(tensor, start, stop)))
