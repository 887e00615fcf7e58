"""The error tree: location, hint and option."""

from __future__ import annotations

import pytest

from fintune.config.load import load
from fintune.errors import ConfigError, DataError, ResourceError


def test_config_error_message_has_location_and_hint() -> None:
    error = ConfigError("train.x: got 1", hint="set it to 2", option="train.x", location="a.yaml:3")
    assert str(error) == "a.yaml:3: train.x: got 1: set it to 2"
    assert (error.option, error.location) == ("train.x", "a.yaml:3")


def test_renamed_replaces_whole_keys_only() -> None:
    message = "train.eval and train.eval_steps and data.train.eval and train.eval.more; train.eval=3"
    error = ResourceError(message, hint="set train.eval: 1", option="train.eval").renamed("--eval")
    assert error.message == "--eval and train.eval_steps and data.train.eval and train.eval.more; --eval=3"
    assert (error.hint, error.option) == ("set --eval: 1", "--eval")
    assert isinstance(error, ResourceError)


def test_renamed_leaves_the_location_out() -> None:
    error = ConfigError("adapter.r: got 0", option="adapter.r", location="command line").renamed("--lora_r")
    assert str(error) == "--lora_r: got 0"


def test_renamed_without_an_option_keeps_the_message() -> None:
    assert str(DataError("broken", path="a.csv", row=2).renamed("--data")) == "a.csv, row 2: broken"


@pytest.mark.parametrize(
    ("overrides", "option"),
    [
        (["train.learning_rate=x"], "train.learning_rate"),
        (["train.learning_rat=1"], "train.learning_rat"),
        (["train=1"], "train"),
        (["run.name=a/b"], "run.name"),
        (["data.source=finqa"], "data.source"),
        (["data.source=chat", "data.sources=[{path: a, wight: 1}]"], "data.sources[0].wight"),
        (["data.source=chat", "data.sources=[{path: a, weight: 0}]"], "data.sources[0].weight"),
        (["export.types=[Q9]"], "export.types"),
        (["predict.models=[base, endpoint]"], "predict.models"),
        (["adapter.kind=full", "model.quantization=nf4"], "adapter.kind"),
        (["train.early_stopping_patience=2"], "train.early_stopping_patience"),
    ],
)
def test_load_error_carries_its_option(overrides: list[str], option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    assert (caught.value.option, caught.value.location) == (option, "command line")
