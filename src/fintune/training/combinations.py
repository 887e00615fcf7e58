"""Option combinations that are refused because no test proves that they train as they should."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

from fintune.config import Config
from fintune.errors import ConfigError


class _Mode(NamedTuple):
    """A way to train that some options are not proven with.

    Attributes:
        name: As it ends the message.
        hint: How to leave the mode.
        unproven: Refused values by option.
    """

    name: str
    hint: str
    unproven: dict[str, tuple[object, ...]]


_SEVERAL_GPUS = _Mode(
    "on several GPUs",
    "set train.gpus and train.machines to 1",
    {
        "adapter.kind": ("full",),
        "adapter.init_lora_weights": ("pissa", "loftq"),
        "train.objective": ("dpo", "orpo", "kto"),
        "train.backend": ("unsloth",),
    },
)
_SHARDED = _Mode(
    "with train.sharding: full",
    "set train.sharding to none",
    {"model.quantization": ("nf4",), "train.fused_layers": ("always",), "train.select_checkpoint": ("best_accuracy",)},
)
_UNSLOTH = _Mode(
    "with train.backend: unsloth",
    "set train.backend to builtin",
    {
        "adapter.kind": ("full",),
        "adapter.init_lora_weights": ("pissa", "loftq"),
        "train.objective": ("dpo", "orpo", "kto"),
        "train.select_checkpoint": ("best_accuracy",),
        "train.fused_layers": ("always",),
        "publish.each_epoch": (True,),
        "model.trust_remote_code": (True,),
    },
)


def check_combinations(config: Config) -> None:
    """Refuse the first combination that is not proven; loads nothing.

    Raises:
        ConfigError: With the option, and the option to change.
    """
    train = config.train
    is_distributed = train.gpus * train.machines > 1
    if train.sharding == "full" and not is_distributed:
        raise ConfigError(
            "train.sharding: full divides weights among GPUs",
            hint="set train.gpus to 2 or more",
            option="train.sharding",
        )
    modes = [_SEVERAL_GPUS] if is_distributed else []
    modes += [_SHARDED] if train.sharding == "full" else []
    modes += [_UNSLOTH] if train.backend == "unsloth" else []
    for mode in modes:
        for option, refused in mode.unproven.items():
            value = reduce(getattr, option.split("."), config)
            if value in refused:
                raise ConfigError(f"{option}: {value} is not proven {mode.name}", hint=mode.hint, option=option)
