"""The optimizers that a run may choose, their memory, and where they work."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from fintune.errors import ConfigError, ResourceError

_BYTE = 1 + 4 / 256  # bitsandbytes has one scale for 256 numbers
MOMENT_BYTES: Mapping[str, float] = {
    "adamw_torch": 8,
    "adamw_8bit": 2 * _BYTE,
    "paged_adamw_8bit": 2 * _BYTE,
    "paged_adamw_32bit": 8,
    "lion_8bit": _BYTE,
    "adafactor": 0,
    "sgd": 0,
}
"""Bytes that each optimizer keeps for a trained number. Pages that could leave the GPU are counted."""


def check_optimizer(name: str, *, cuda: bool) -> None:
    """Refuse a ``train.optim`` whose package or CUDA GPU is missing; loads nothing.

    Raises:
        ResourceError: Its package is missing.
        ConfigError: It needs a GPU, and there is none.
    """
    if not name.endswith("bit"):
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError(
            f"train.optim: {name} needs bitsandbytes",
            hint="pip install bitsandbytes, or set it to adamw_torch",
            option="train.optim",
        )
    if name.startswith("paged") and not cuda:
        # bitsandbytes would print a warning and train without paging.
        raise ConfigError(
            f"train.optim: {name} pages its moments between a CUDA GPU and main memory, and there is no GPU",
            hint=f"set it to {'adamw_8bit' if name.endswith('8bit') else 'adamw_torch'}, which computes the same",
            option="train.optim",
        )
