from __future__ import annotations

import pytest

from fintune.config import PredictOptions, split_kind_and_mode
from fintune.config.load import flat, load
from fintune.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "constrain", "modes"),
    [
        ("page", "page", ("page",)),
        ("[page]", "page", ("page",)),
        ("[none, page]", ("none", "page"), ("none", "page")),
    ],
)
def test_constrain_takes_one_mode_or_several(given, constrain, modes) -> None:
    options = load(None, [f"predict.constrain={given}"]).config.predict
    assert (options.constrain, options.decoding_modes) == (constrain, modes)


def test_a_single_mode_is_stored_as_text() -> None:
    assert flat(load(None, ["predict.constrain=[general]"]).config)["predict.constrain"] == "general"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("exmple", r"predict\.constrain: got \"exmple\": input should be 'none', 'general' or 'page'"),
        ("[none, exmple]", r"predict\.constrain: got \"exmple\": input should be 'none', 'general' or 'page'"),
        ("[[none]]", r"predict\.constrain: got \[\"none\"\]: input should be 'none', 'general' or 'page'"),
        ("[none, none]", "predict.constrain names none twice; name each mode once"),
        ("[]", "predict.constrain is an empty list; name a mode"),
    ],
)
def test_unknown_modes_are_refused_by_name(given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [f"predict.constrain={given}"])


def test_named_modes_give_the_first_the_kinds_own_name() -> None:
    named = PredictOptions(constrain=("general", "none")).named_modes("Q4_K_M")
    assert named == [("Q4_K_M", "general"), ("Q4_K_M+none", "none")]
    assert [split_kind_and_mode(name) for name, _ in named] == [("Q4_K_M", ""), ("Q4_K_M", "none")]


@pytest.mark.parametrize("name", ["a+b", "runs+1/predictions.jsonl", "+page", "merged"])
def test_a_plus_before_another_word_is_part_of_the_name(name) -> None:
    assert split_kind_and_mode(name) == (name, "")
