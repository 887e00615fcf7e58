"""Where a source's licence is found, and which forbid commercial use."""

from __future__ import annotations

import pytest

from fintune.sources.licences import combined, hub_name, is_non_commercial, is_on_hub, licence_of


@pytest.mark.parametrize("name", ["CC-BY-NC-4.0", "cc-by-nc-sa-4.0", "Non-Commercial use only", "noncommercial"])
def test_licences_without_commercial_use_are_known(name):
    assert is_non_commercial(name)


@pytest.mark.parametrize("name", ["MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "not stated", "franc"])
def test_other_licences_are_not_taken_for_such(name):
    assert not is_non_commercial(name)


def test_what_the_user_says_comes_before_what_is_known_and_that_before_the_card():
    name = "FinLang/investopedia-instruction-tuning-dataset"
    assert licence_of("MIT", hub_name=name, card="x").name == "MIT"
    assert licence_of("", hub_name=name, card="x").name == "CC-BY-NC-4.0"
    assert licence_of("", hub_name="other/set", card="cc0-1.0").origin == "its card"
    assert licence_of("").name == "not stated"


def test_a_card_or_licence_file_beside_the_data_is_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    (tmp_path / "LICENSE.txt").write_text("\nMIT License\n\nCopyright", encoding="utf-8")
    assert licence_of("", path=tmp_path).name == "MIT License"
    assert licence_of("", path=file).name == "not stated", "a licence file of a folder may be about something else"
    (tmp_path / "README.md").write_text("---\ntags: [x]\nlicense: cc-by-nc-4.0\n---\n# Data\n", encoding="utf-8")
    assert licence_of("", path=file).model_dump() == {
        "name": "cc-by-nc-4.0",
        "origin": "README.md",
        "non_commercial": True,
    }


@pytest.mark.parametrize(
    ("base", "data", "expected"),
    [
        ("apache-2.0", ["MIT", "CC-BY-4.0", "Public Domain"], "apache-2.0"),
        ("llama3.2", ["MIT"], "llama3.2"),
        ("apache-2.0", ["CC-BY-NC-4.0", "MIT"], "cc-by-nc-4.0"),
        ("llama3.2", ["CC-BY-NC-4.0"], "llama3.2-and-cc-by-nc-4.0"),
        ("mit", ["not stated"], "unknown"),
        ("not stated", ["MIT"], "unknown"),
        ("mit", ["CC-BY-SA-4.0", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        ("apache-2.0", ["Mitsui in-house, do not copy"], "mitsui-in-house-do-not-copy"),
    ],
)
def test_a_model_has_its_bases_licence_and_those_of_its_data_that_ask_for_more(base, data, expected):
    assert combined(base, data) == expected


def test_names_are_written_as_the_hub_writes_them_and_known_where_it_knows_them():
    assert hub_name("CC BY-NC 4.0") == "cc-by-nc-4.0"
    assert all(map(is_on_hub, ("apache-2.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "llama3.1", "gemma", "unknown")))
    assert not any(map(is_on_hub, ("llama3.2-and-cc-by-nc-4.0", "house-licence")))
