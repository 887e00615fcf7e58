"""Option combinations that are refused because no test proves that they train as they should."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce

from fintune.config import Config
from fintune.errors import ConfigError

Proven = Mapping[str, tuple[object, ...]]
"""The proven values of some options."""

_NEW_ADAPTER: Proven = {
    "adapter.kind": ("lora", "dora"),
    "adapter.init_lora_weights": ("default",),
    "adapter.continue_from": (None,),
    "train.objective": ("sft",),
}


def check_combinations(config: Config) -> None:
    """Refuse the first combination that is not proven; loads nothing.

    Raises:
        ConfigError: With the option, and the option to change.
    """
    train = config.train
    if train.sharding == "full" and train.gpus * train.machines == 1:
        raise ConfigError(
            "train.sharding: full divides weights among GPUs",
            hint="set train.gpus to 2 or more",
            option="train.sharding",
        )
    for mode, hint, proven in _modes(config):
        for option, values in proven.items():
            value = reduce(getattr, option.split("."), config)
            if value not in values:
                raise ConfigError(f"{option}: {value} is not proven {mode}", hint=hint, option=option)


def _modes(config: Config) -> Iterator[tuple[str, str, Proven]]:
    """Yield how the run trains, how to leave that mode, and what is proven with it."""
    train = config.train
    if train.gpus * train.machines > 1:
        yield (
            "on several GPUs",
            "set train.gpus and train.machines to 1",
            {**_NEW_ADAPTER, "train.backend": ("builtin",)},
        )
    if train.sharding == "full":
        yield (
            "with train.sharding: full",
            "set train.sharding to none",
            {
                "model.quantization": ("none",),
                "train.fused_layers": ("auto", "never"),
                "train.select_checkpoint": ("last", "best_loss"),
            },
        )
    if train.backend == "unsloth":
        yield (
            "with train.backend: unsloth",
            "set train.backend to builtin",
            {
                **_NEW_ADAPTER,
                "train.select_checkpoint": ("last", "best_loss"),
                "train.fused_layers": ("auto", "never"),
                "publish.each_epoch": (False,),
                "model.trust_remote_code": (False,),
            },
        )
