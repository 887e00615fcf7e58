"""Where a source's licence is found, and which forbid commercial use."""

from __future__ import annotations

import pytest

from fintune.config import SourceOptions
from fintune.data.licences import combine_licences, hub_name, is_non_commercial, is_on_hub, licence_of
from fintune.data.load import source_licence


@pytest.mark.parametrize("name", ["CC-BY-NC-4.0", "cc-by-nc-sa-4.0", "Non-Commercial use only", "noncommercial"])
def test_licences_without_commercial_use_are_known(name):
    assert is_non_commercial(name)


@pytest.mark.parametrize("name", ["MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "not stated", "franc"])
def test_other_licences_are_not_taken_for_such(name):
    assert not is_non_commercial(name)


def test_licence_of_config_wins_over_known_and_card():
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


@pytest.fixture
def datasets(tmp_path):
    """Two data sets in folders of their own below one, each with a card; and one whose licence nobody says."""
    for name, said in (("investopedia", "cc-by-nc-4.0"), ("own", "mit"), ("quotes", "")):
        (tmp_path / "datasets" / name).mkdir(parents=True)
        (tmp_path / "datasets" / name / "train.csv").write_text("question,answer\nwhat,1\n", encoding="utf-8")
        if said:
            card = f"---\nlicense: {said}\n---\n"
            (tmp_path / "datasets" / name / "README.md").write_text(card, encoding="utf-8")
    return tmp_path / "datasets"


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("", "cc-by-nc-4.0 and mit and not stated"),
        ("*/train.csv", "cc-by-nc-4.0 and mit and not stated"),
        ("**/*.csv", "cc-by-nc-4.0 and mit and not stated"),
        ("[io]*/*.csv", "cc-by-nc-4.0 and mit"),
        ("investopedia", "cc-by-nc-4.0"),
        ("investopedia/*.csv", "cc-by-nc-4.0"),
        ("investopedia/train.csv", "cc-by-nc-4.0"),
        ("own/*.csv", "mit"),
        ("q*/train.csv", "not stated"),
    ],
)
def test_every_folder_that_is_read_is_asked_for_its_licence(datasets, pattern, name):
    found = source_licence(SourceOptions(path=str(datasets / pattern)))
    assert (found.name, found.non_commercial) == (name, "nc" in name)


def test_licence_in_subfolder_adds_to_the_one_above(datasets):
    (datasets / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    (datasets / "own" / "README.md").unlink()
    (datasets / "own" / "LICENSE").write_text("Apache License\n", encoding="utf-8")
    assert source_licence(SourceOptions(path=str(datasets))).model_dump() == {
        "name": "mit and cc-by-nc-4.0 and Apache License",
        "origin": "README.md, investopedia/README.md, own/LICENSE",
        "non_commercial": True,
    }
    assert source_licence(SourceOptions(path=str(datasets / "own" / "*.csv"))).name == "not stated", (
        "above the pattern's folder"
    )


@pytest.mark.parametrize(
    ("front", "name"),
    [
        ("license:\n- mit\n- cc-by-nc-4.0\ntags:\n- finance", "mit and cc-by-nc-4.0"),
        ("license: [mit, 'cc-by-nc-4.0']", "mit and cc-by-nc-4.0"),
        ("license: other\nlicense_name: house-nc", "house-nc"),
        ('licence: "Ours, do not copy"', "Ours, do not copy"),
    ],
)
def test_a_card_may_name_several_licences_or_one_of_its_own(tmp_path, front, name):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8")
    assert licence_of("", path=tmp_path / "rows.csv").name == name


@pytest.mark.parametrize(
    ("base", "data", "expected"),
    [
        ("apache-2.0", ["MIT", "CC-BY-4.0", "Public Domain"], "apache-2.0"),
        ("llama3.2", ["MIT"], "llama3.2"),
        ("apache-2.0", ["CC-BY-NC-4.0", "MIT"], "cc-by-nc-4.0"),
        ("llama3.2", ["CC-BY-NC-4.0"], "llama3.2-and-cc-by-nc-4.0"),
        ("apache-2.0", ["mit and cc-by-nc-4.0"], "cc-by-nc-4.0"),
        ("mit", ["cc-by-sa-4.0 and not stated"], "cc-by-sa-4.0-and-unknown"),
        ("mit", ["not stated"], "unknown"),
        ("not stated", ["MIT"], "unknown"),
        ("mit", ["CC-BY-SA-4.0", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        ("apache-2.0", ["Mitsui in-house, do not copy"], "mitsui-in-house-do-not-copy"),
    ],
)
def test_combine_licences_keeps_base_and_binding_data(base, data, expected):
    assert combine_licences(base, data) == expected


def test_licence_names_as_on_hub():
    assert hub_name("CC BY-NC 4.0") == "cc-by-nc-4.0"
    assert all(map(is_on_hub, ("apache-2.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "llama3.1", "gemma", "unknown")))
    assert not any(map(is_on_hub, ("llama3.2-and-cc-by-nc-4.0", "house-licence")))
