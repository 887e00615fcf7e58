"""Frozen weights in parts, one a GPU (FSDP2): a base model that no single GPU holds together with its batch.

Only the base is divided. The adapters stay whole in every process, so that optimiser, checkpoints and the saved adapter
are those of one GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.errors import ConfigError
from fintune.training import ranks

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Trainer


def is_divided(options: TrainOptions) -> bool:
    """Whether this training holds the frozen weights in parts."""
    return options.sharding == "full" and ranks.count() > 1


def undivided(trainer: type[Trainer]) -> type[Trainer]:
    """A trainer that leaves its model where it is: it would put it on one GPU as a whole, before it is divided."""

    class Leaving(trainer):  # type: ignore[misc]
        def _move_model_to_device(self, model: object, device: object) -> None:
            pass

    return Leaving


def divide(model: PeftModel) -> int:
    """Divide the frozen weights among the processes; a layer's come together while it computes.

    Args:
        model: With adapters, complete on the device that it was loaded to; its parts end up on this process's GPU.

    Returns:
        Number of decoder layers that were divided.

    Raises:
        ConfigError: The model's layers are not where those of transformers' decoders are.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = _layers(model)
    cuda = torch.cuda.is_available()
    mesh = init_device_mesh("cuda" if cuda else "cpu", (ranks.count(),))
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    place = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    for weight in trained:  # whoever is not divided is not moved either
        weight.data = weight.data.to(place)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    # Else what lies outside the layers would stay together, and only the process that saves would part it.
    fully_shard(model, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    return len(layers)


def _layers(model: PeftModel) -> list[Any]:
    found = getattr(getattr(model.get_base_model(), "model", None), "layers", None)
    if found is None or len(found) == 0:
        raise ConfigError(
            f"train.sharding: full, but the layers of {type(model.get_base_model()).__name__} are not known",
            hint="set train.sharding to none",
            option="train.sharding",
        )
    return list(found)
