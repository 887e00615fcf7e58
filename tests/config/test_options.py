from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fintune.config import Config, Options, is_advanced
from fintune.config.load import fields, flat, load
from fintune.config.reference import options_page
from support.paths import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_options_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == options_page(), "run: fintune config reference > docs/options.md"


def test_every_option_has_a_description() -> None:
    for key, field in fields():
        meaning = " ".join((field.description or "").split())
        assert len(meaning) > 4, key
        assert meaning.endswith("."), f"{key}: {meaning!r}"
        assert meaning[0].isupper() or meaning[0] == "`", f"{key}: {meaning!r}"
        assert "|" not in meaning, f"{key} would break the table"


def test_every_section_has_a_description() -> None:
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Options), f"{name} is an option outside any section"
        assert field.annotation.__doc__


def test_every_default_is_valid() -> None:
    assert Config.model_validate_json(Config().model_dump_json()) == Config()


def test_options_page_names_every_option_once() -> None:
    page = options_page()
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    for key, field in fields():
        section, _, name = key.rpartition(".")
        if is_advanced(field):
            assert sections["advanced"].count(f"| `{key}`") == 1, key
            assert f"| `{name}`" not in sections[section]
        else:
            assert sections[section].count(f"| `{name}`") == 1, key
    for leaked in ("typing.", "pathlib", "Annotated", "NoneType", "PydanticUndefined", "<class"):
        assert leaked not in page


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_packaged_configs_load(path: Path) -> None:
    loaded = load(path)
    assert loaded.config.run.name == path.stem
    assert set(loaded.origin) - set(Config.model_fields) <= {*flat(loaded.config), "data.statements"}


def test_options_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().train.num_train_epochs = 5  # type: ignore[misc]
