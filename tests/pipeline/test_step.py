from __future__ import annotations

from dataclasses import replace

import pytest

from fintune.config import Config
from fintune.pipeline.step import Selection, Step, select_steps, skipped_with_others
from fintune.pipeline.steps import build_steps


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return build_steps(Config())


def test_what_is_about_the_files_is_left_out_with_them(steps: list[Step]) -> None:
    skipped = Selection(skip=["export", "report"])
    assert skipped_with_others(steps, skipped) == {"preflight": "export", "replay": "export"}
    left = {step.name for step in steps} - select_steps(steps, skipped)
    assert left == {"preflight", "export", "replay", "report"}


def test_a_step_that_the_user_names_is_not_left_out_with_another(steps: list[Step]) -> None:
    assert skipped_with_others(steps, Selection(skip=["export"], only=["preflight"])) == {"replay": "export"}
    assert select_steps(steps, Selection(only=["preflight"])) == {"preflight"}
    assert skipped_with_others(steps, Selection(skip=["export", "preflight", "replay"])) == {}


def test_a_step_about_none_stays(steps: list[Step]) -> None:
    alone = [replace(step, about=None) for step in steps]
    assert skipped_with_others(alone, Selection(skip=["export"])) == {}


def test_what_comes_before_is_not_selected_by_from(steps: list[Step]) -> None:
    assert "preflight" not in select_steps(steps, Selection(start="train"))
    assert "replay" in select_steps(steps, Selection(start="export"))
