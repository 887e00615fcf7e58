"""Completions without one complete step: officially not invalid, and told wherever the invalid rate is."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.table import Table

from fintune.evaluation.metrics import Score, compute_scores
from fintune.finqa.program import tokenize
from fintune.publish.card import score_row
from fintune.report.formatting import format_invalid
from fintune.report.tables import ScoredSet, headline_table, score_tables
from support.example_run import records


def scores(*programs: str) -> Score:
    asked = records(len(programs))
    pairs = [(one.id, tokenize(program)) for one, program in zip(asked, programs, strict=True)]
    return compute_scores(asked, pairs)[0]


@pytest.fixture
def partly() -> Score:
    return scores("", "add(100, 120", "add(1, 2)", "divide(1, 0)")


def printed(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_its_share_stands_beside_the_invalid_rate(partly: Score) -> None:
    assert (partly.invalid_rate, partly.no_program_rate) == (0.25, 0.5)
    header, row, *_ = printed(score_tables({"base": ScoredSet(partly, {}, None)}, "model")[0]).splitlines()
    assert header.endswith("invalid  no program")
    assert row.split()[-2:] == ["25.00%", "50.00%"]
    assert format_invalid(partly) == "25.0\u00a0% + 50.0\u00a0% no program"
    assert "no program, not invalid       50.00%" in printed(headline_table(partly, "p.json"))
    assert score_row("base", partly)[-1] == format_invalid(partly)
    both = {"base": ScoredSet(partly, {}, None), "base+page": ScoredSet(partly, {}, None)}
    assert printed(score_tables(both, "model", first="none")[0]).count("25.00%      50.00%") == 2


def test_where_every_completion_is_a_program_nothing_is_added() -> None:
    figures = scores("add(1, 2)", "divide(1, 0)")
    assert "no program" not in printed(score_tables({"base": ScoredSet(figures, {}, None)}, "model")[0])
    assert "no program" not in printed(headline_table(figures, "p.json"))
    assert format_invalid(figures) == "50.0\u00a0%"
