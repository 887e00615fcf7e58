"""The optimisers that a run may choose, and where each of them works."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from fintune.errors import ConfigError, ResourceError

NAMES: Mapping[str, str] = {
    "adamw_torch": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "lion_8bit": "lion_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
"""``train.optim`` and what transformers' ``TrainingArguments.optim`` calls it."""

_BYTE = 1 + 4 / 256  # bitsandbytes scales every 256 numbers
MOMENT_BYTES: Mapping[str, float] = {
    "adamw_torch": 8,
    "adamw_8bit": 2 * _BYTE,
    "paged_adamw_8bit": 2 * _BYTE,
    "paged_adamw_32bit": 8,
    "lion_8bit": _BYTE,
    "adafactor": 0,
    "sgd": 0,
}
"""What each keeps for a trained number, in bytes; pages that could leave the GPU are counted."""


def check(name: str, *, cuda: bool) -> None:
    """Refuse an optimiser whose package or machine is missing; loads nothing.

    Args:
        name: ``train.optim``.
        cuda: Whether there is a CUDA GPU to train on.

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
        # bitsandbytes would warn and go on without the paging that was asked for.
        raise ConfigError(
            f"train.optim: {name} pages its moments between a CUDA GPU and main memory, and there is no GPU",
            hint=f"set it to {'adamw_8bit' if name.endswith('8bit') else 'adamw_torch'}, which computes the same",
            option="train.optim",
        )
