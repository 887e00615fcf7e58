"""Free and constrained results side by side: the terminal's tables and the page's."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from fintune.config import Config
from fintune.pipeline.stages.report import collect
from fintune.report.run_page import render_run
from fintune.report.sections.accuracy import accuracy_section
from fintune.report.sections.agreement import agreement_section
from fintune.report.tables import read_scored, score_tables
from support.example_run import records, write_run
from support.outline import outline

NAMES = ("base", "base+page", "adapter", "adapter+page", "merged")
CONFIG = Config.model_validate({"run": {"name": "demo"}, "predict": {"constrain": ["none", "page"]}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("modes") / "run"


@pytest.fixture(scope="module")
def inputs(folder):
    return write_run(folder, CONFIG, records(24), NAMES)


def printed_lines(tables) -> list[str]:
    console = Console(width=300)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return captured.get().splitlines()


def test_score_tables_have_a_row_for_each_kind_and_mode(folder, inputs) -> None:
    scored = read_scored(folder, NAMES)
    lines = [line.split() for line in printed_lines(score_tables(scored, "model", first="none"))]
    assert lines[0][:3] == ["model", "decoding", "n"]
    modes = [("base", "none"), ("base", "page"), ("adapter", "none"), ("adapter", "page"), ("merged", "none")]
    assert [(line[0], line[1]) for line in lines[1:6]] == modes
    assert [line[3] for line in lines[1:6]] == [f"{scored[name].score.execution_accuracy:.2%}" for name in NAMES]


def test_difference_table_has_kinds_measured_in_both_modes(folder, inputs) -> None:
    lines = printed_lines(score_tables(read_scored(folder, NAMES), "model", first="none"))
    start = next(place for place, line in enumerate(lines) if line.startswith("page against none"))
    assert [line.split()[0] for line in lines[start + 2 :]] == ["base", "adapter"]


def test_score_tables_without_two_modes_is_one_table(folder, inputs) -> None:
    tables = score_tables(read_scored(folder, ("base", "adapter+page")), "model", first="none")
    lines = printed_lines(tables)
    assert len(tables) == 1
    assert lines[0].split()[:4] == ["model", "n", "execution", "accuracy"]
    assert [line.split()[0] for line in lines[1:]] == ["base", "adapter+page"]


def test_page_has_rows_by_mode_and_differences(inputs) -> None:
    page = collect(CONFIG, inputs)
    section = accuracy_section(page)
    modes = [("base", "none"), ("base", "page"), ("adapter", "none"), ("adapter", "page"), ("merged", "none")]
    assert [tuple(row[:2]) for row in section["table"].texts()] == modes
    assert [row[:2] for row in section["differences"].texts()] == [["base", "page"], ["adapter", "page"]]
    words = re.sub(r"\s+", " ", outline(render_run(page)).text)
    assert "What the constraint changes" in words
    others = [(results.mode, results.kind) for results in page.results if results.mode]
    assert others == [("page", "base"), ("page", "adapter")]
    assert {"adapter, page", "base, page"} <= set(re.findall(r"\w+, page", words))


def test_rest_of_the_page_is_about_the_first_mode(inputs) -> None:
    both = collect(CONFIG, inputs)
    alone = collect(CONFIG.with_decoding_mode("none"), inputs)
    assert both.first_mode == alone.first_mode == list(alone.results)
    assert [row[0] for row in agreement_section(both)["table"].texts()] == ["adapter and merged"]
    assert "What the constraint changes" not in render_run(alone)


def test_browser_compares_models_of_the_first_mode(inputs) -> None:
    html = render_run(collect(CONFIG, inputs))
    assert '"kinds":["base","adapter","merged","base, page","adapter, page"],"num_compared":3' in html
