from __future__ import annotations

import pytest

from fintune.config import PredictOptions, kind_and_way
from fintune.config.load import flat, load
from fintune.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "constrain", "ways"),
    [
        ("example", "example", ("example",)),
        ("[example]", "example", ("example",)),
        ("[none, example]", ("none", "example"), ("none", "example")),
    ],
)
def test_completions_are_constrained_in_one_way_or_in_several(given, constrain, ways) -> None:
    options = load(None, [f"predict.constrain={given}"]).config.predict
    assert (options.constrain, options.ways) == (constrain, ways)


def test_one_way_stands_in_manifests_as_it_always_did() -> None:
    assert flat(load(None, ["predict.constrain=[general]"]).config)["predict.constrain"] == "general"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("exmple", r"predict\.constrain: got \"exmple\": input should be 'none', 'general' or 'example'"),
        ("[none, exmple]", r"predict\.constrain: got \"exmple\": input should be 'none', 'general' or 'example'"),
        ("[[none]]", r"predict\.constrain: got \[\"none\"\]: input should be 'none', 'general' or 'example'"),
        ("[none, none]", "predict.constrain names none twice; name each way once"),
        ("[]", "predict.constrain is an empty list; name a way"),
    ],
)
def test_ways_that_are_none_are_refused_by_name(given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [f"predict.constrain={given}"])


def test_the_first_way_has_the_kinds_own_name_and_each_name_tells_its_way() -> None:
    named = PredictOptions(constrain=("general", "none")).named_ways("Q4_K_M")
    assert named == [("Q4_K_M", "general"), ("Q4_K_M+none", "none")]
    assert [kind_and_way(name) for name, _ in named] == [("Q4_K_M", ""), ("Q4_K_M", "none")]


@pytest.mark.parametrize("name", ["a+b", "runs+1/predictions.jsonl", "+example", "merged"])
def test_a_plus_before_another_word_is_part_of_the_name(name) -> None:
    assert kind_and_way(name) == (name, "")
