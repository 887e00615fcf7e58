"""Option combinations that are refused because no test proves them."""

from __future__ import annotations

import pytest

from fintune.config import Config
from fintune.errors import ConfigError
from fintune.training.combinations import check_combinations


def config(**changes):
    sections = {"model": {"name": "x"}, "train": {}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return Config.model_validate(sections)


GPUS = {"train__gpus": 2}
SHARDED = {"train__gpus": 2, "train__sharding": "full"}
UNSLOTH = {"train__backend": "unsloth"}


@pytest.mark.parametrize(
    ("mode", "changes", "option"),
    [
        (GPUS, {"adapter__kind": "full"}, "adapter.kind: full"),
        (GPUS, {"adapter__init_lora_weights": "pissa"}, "adapter.init_lora_weights: pissa"),
        (GPUS, {"train__backend": "unsloth"}, "train.backend: unsloth"),
        (SHARDED, {"model__quantization": "nf4"}, "model.quantization: nf4"),
        (SHARDED, {"train__fused_layers": "always"}, "train.fused_layers: always"),
        (
            SHARDED,
            {"train__select_checkpoint": "best_accuracy", "train__eval_steps": 5},
            "train.select_checkpoint: best_accuracy",
        ),
        (UNSLOTH, {"adapter__kind": "full"}, "adapter.kind: full"),
        (UNSLOTH, {"adapter__init_lora_weights": "pissa"}, "adapter.init_lora_weights: pissa"),
        (UNSLOTH, {"model__trust_remote_code": True}, "model.trust_remote_code"),
        (UNSLOTH, {"publish__repo_id": "a/b", "publish__each_epoch": True}, "publish.each_epoch"),
        (UNSLOTH, {"train__fused_layers": "always"}, "train.fused_layers: always"),
        (
            UNSLOTH,
            {"train__select_checkpoint": "best_accuracy", "train__eval_steps": 1},
            "train.select_checkpoint: best_accuracy",
        ),
    ],
)
def test_unproven_combination_is_refused(mode, changes, option):
    with pytest.raises(ConfigError) as raised:
        check_combinations(config(**{**changes, **mode}))
    assert option in str(raised.value)
    assert raised.value.hint
    if mode is not UNSLOTH and "train__backend" not in changes:
        check_combinations(config(**changes))


def test_proven_combinations_pass():
    for kind in ("lora", "dora"):
        check_combinations(config(adapter__kind=kind, **SHARDED))
        check_combinations(config(adapter__kind=kind, model__quantization="nf4", **GPUS))
        check_combinations(config(adapter__kind=kind, train__machines=4, train__fused_layers="always", **GPUS))


def test_sharding_needs_several_gpus():
    with pytest.raises(ConfigError, match=r"train\.sharding: full"):
        check_combinations(config(train__sharding="full"))
