from __future__ import annotations

import re

import pytest

from fintune.config import Config
from fintune.pipeline.stages.report import collect
from fintune.report.formatting import KIND_LABELS, kind_colour
from fintune.report.run_page import render_run
from fintune.report.sections.accuracy import confidence_section
from support.example_run import records, write_run
from support.outline import outline


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    config = Config.model_validate({"predict": {"strategy": "vote", "num_candidates": 4}})
    return collect(config, write_run(tmp_path_factory.mktemp("run"), config, records(8), ("base", "adapter")))


def test_every_kind_is_drawn_in_a_colour_that_the_page_has(tmp_path):
    kinds = tuple(KIND_LABELS)
    page = collect(Config(), write_run(tmp_path, Config(), records(4), kinds))
    html = render_run(sure(page, kinds))
    numbers = {kind_colour(kind) for kind in KIND_LABELS}
    assert {f"var(--s{number})" for number in numbers} == set(re.findall(r"var\(--s\d+\)", html))
    assert all(html.count(f"--s{number}: #") == 2 for number in numbers)
    assert 'id="agreement"' in html


def test_drawn_tokens_are_not_compared(page):
    assert 'id="agreement"' not in render_run(page)


def sure(page, kinds):
    """The page with a confidence for all answers of some kinds: 1 where the answer is right."""
    for results in page.results:
        for id_, each in results.predictions.items() if results.kind in kinds else ():
            right = results.correct[id_]
            results.predictions[id_] = each.model_copy(update={"confidence": float(right)})
    return page


def test_a_page_without_confidences_has_no_such_part(page):
    assert confidence_section(page) == {}
    assert 'id="confidence"' not in render_run(page)


def test_the_page_shows_the_accuracy_of_what_is_answered(page):
    html = render_run(sure(page, ["adapter"]))
    (row,) = confidence_section(page)["table"].texts()
    assert row[0] == "adapter"
    assert row[2] == f"{100 * sum(page.results[1].correct.values()) / 8:.1f}\u00a0%"
    assert row[5] == "100.0\u00a0%"
    text = " ".join(outline(html).text.split())
    assert "share of 4 sampled programs that execute to it" in text
    assert "4 sampled programs voted on the result." in text
    assert '<a href="#confidence">Confidence</a>' in html


def test_a_kind_with_an_unknown_confidence_is_left_out(page):
    sure(page, ["adapter", "base"])
    base = page.results[0].predictions
    first = next(iter(base))
    base[first] = base[first].model_copy(update={"confidence": None})
    assert [row[0] for row in confidence_section(page)["table"].texts()] == ["adapter"]
