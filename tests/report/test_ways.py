"""Free and constrained results side by side: the terminal's tables and the page's."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from fintune.config import Config
from fintune.pipeline.stages.report import collect
from fintune.report.page import render
from fintune.report.ways import read_scored, score_tables
from support.example_run import records, write_run
from support.outline import outline

NAMES = ("base", "base+page", "adapter", "adapter+page", "merged")
CONFIG = Config.model_validate({"run": {"name": "demo"}, "predict": {"constrain": ["none", "page"]}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ways") / "run"


@pytest.fixture(scope="module")
def inputs(folder):
    return write_run(folder, CONFIG, records(24), NAMES)


def told(tables) -> list[str]:
    console = Console(width=300)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return captured.get().splitlines()


def test_each_way_has_columns_of_its_own_and_the_first_is_called_by_name(folder, inputs) -> None:
    scored = read_scored(folder, NAMES)
    lines = told(score_tables(scored, "model", first="none"))
    assert lines[0].split() == ["none", "page"]
    assert lines[1].split().count("execution") == 2
    adapter = next(line.split() for line in lines if line.startswith("adapter"))
    shares = [f"{scored[name].score.execution_accuracy:.2%}" for name in ("adapter", "adapter+page")]
    assert [adapter[2], adapter[8]] == shares
    assert [line.split()[0] for line in lines[2:5]] == ["base", "adapter", "merged"]


def test_what_a_way_changes_is_told_for_the_kinds_that_were_measured_in_both(folder, inputs) -> None:
    lines = told(score_tables(read_scored(folder, NAMES), "model", first="none"))
    start = next(place for place, line in enumerate(lines) if line.startswith("example against none"))
    assert [line.split()[0] for line in lines[start + 2 :]] == ["base", "adapter"]


def test_without_a_kind_in_two_ways_there_is_the_one_plain_table(folder, inputs) -> None:
    tables = score_tables(read_scored(folder, ("base", "adapter+page")), "model", first="none")
    lines = told(tables)
    assert len(tables) == 1
    assert lines[0].split()[:4] == ["model", "n", "execution", "accuracy"]
    assert [line.split()[0] for line in lines[1:]] == ["base", "adapter+page"]


def test_the_page_has_a_column_group_a_way_and_the_differences(inputs) -> None:
    page = collect(CONFIG, inputs)
    parsed = outline(render(page))
    groups = [attrs for tag, attrs in parsed.tags if tag == "th" and attrs.get("scope") == "colgroup"]
    assert len(groups) == 2
    words = re.sub(r"\s+", " ", parsed.text)
    assert "What the constraint changes" in words
    assert "not measured" in words, "merged was measured in one way"
    other = page.other_modes[0]
    assert (other.way, [measured.kind for measured in other.measured]) == ("page", ["base", "adapter"])
    assert {"adapter, example", "base, example"} <= set(re.findall(r"\w+, example", words))


def test_what_else_the_page_says_is_about_the_first_way(inputs) -> None:
    both = collect(CONFIG, inputs)
    alone = collect(CONFIG.with_decoding_mode("none"), inputs)
    assert both.measured == alone.measured
    assert [pair[:2] for pair in both.agreements] == [("adapter", "merged")]
    assert alone.other_modes == []
    assert "colgroup" not in render(alone)


def test_models_disagree_only_where_models_of_one_way_do(inputs) -> None:
    html = render(collect(CONFIG, inputs))
    assert '"kinds":["base","adapter","merged","base, example","adapter, example"],"num_compared":3' in html
