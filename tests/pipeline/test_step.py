from __future__ import annotations

from dataclasses import replace

import pytest

from fintune.config import Config
from fintune.pipeline.plan import build
from fintune.pipeline.step import Selection, Step, left_out_with, selected


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return build(Config())


def test_what_is_about_the_files_is_left_out_with_them(steps: list[Step]) -> None:
    skipped = Selection(skip=["export", "report"])
    assert left_out_with(steps, skipped) == {"preflight": "export", "replay": "export"}
    left = {step.name for step in steps} - selected(steps, skipped)
    assert left == {"preflight", "export", "replay", "report"}


def test_a_step_that_the_user_names_is_not_left_out_with_another(steps: list[Step]) -> None:
    assert left_out_with(steps, Selection(skip=["export"], only=["preflight"])) == {"replay": "export"}
    assert selected(steps, Selection(only=["preflight"])) == {"preflight"}
    assert left_out_with(steps, Selection(skip=["export", "preflight", "replay"])) == {}


def test_a_step_about_none_stays(steps: list[Step]) -> None:
    alone = [replace(step, about=None) for step in steps]
    assert left_out_with(alone, Selection(skip=["export"])) == {}


def test_what_comes_before_is_not_selected_by_from(steps: list[Step]) -> None:
    assert "preflight" not in selected(steps, Selection(start="train"))
    assert "replay" in selected(steps, Selection(start="export"))
