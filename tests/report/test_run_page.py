from __future__ import annotations

import dataclasses
import json
import re

import pytest

from fintune.config import Config
from fintune.pipeline.stages.report import collect
from fintune.report.run_data import ModelResults, RunData
from fintune.report.run_page import render_run
from fintune.report.sections.accuracy import headline
from support.example_run import KINDS, NASTY, predictions, records, write_run
from support.outline import Outline, outline


@pytest.fixture(scope="module")
def config() -> Config:
    return Config.model_validate({"run": {"name": "<demo>"}, "train": {"num_train_epochs": 2.0}})


@pytest.fixture(scope="module")
def page(tmp_path_factory, config) -> RunData:
    inputs = write_run(tmp_path_factory.mktemp("run"), config, records(24))
    return collect(config, inputs)


@pytest.fixture(scope="module")
def html(page) -> str:
    return render_run(page)


@pytest.fixture(scope="module")
def parsed(html) -> Outline:
    return outline(html)


def test_the_page_needs_no_network(html, parsed):
    places = [attrs[name] for _, attrs in parsed.tags for name in ("src", "href", "action") if name in attrs]
    assert places
    assert all(place.startswith("#") for place in places)
    assert "url(http" not in html
    assert "@import" not in html
    policy = next(attrs["content"] for tag, attrs in parsed.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_labels_and_links_have_their_targets(parsed):
    ids = [attrs["id"] for _, attrs in parsed.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    named = {attrs[name] for _, attrs in parsed.tags for name in ("aria-labelledby", "for") if name in attrs}
    links = {
        attrs["href"][1:] for tag, attrs in parsed.tags if tag == "a" and not attrs["href"].startswith("#example:")
    }
    assert named | links <= set(ids)


def test_tables_have_headers_with_a_scope(parsed):
    headers = [attrs for tag, attrs in parsed.tags if tag == "th"]
    assert len(headers) > 50
    assert all(attrs.get("scope") in {"row", "col"} for attrs in headers)


def test_page_lists_every_kind_with_its_figures(page, parsed):
    low, high = page.scored[1].figures.execution_accuracy_interval
    assert f"{100 * low:.1f}\u2013{100 * high:.1f}" in parsed.text
    for words in ("base", "adapter", "merged", "GGUF F16", "GGUF Q4_K_M", "n = 24", "0.1", "0.3"):
        assert words in parsed.text
    assert f"{100 * page.scored[1].figures.execution_accuracy:.1f}\u00a0%" in parsed.text


def test_every_pair_of_trained_kinds_is_compared(parsed):
    kinds = ("adapter", "merged", "GGUF F16", "GGUF Q4_K_M")
    pairs = [f"{a} and {b}" for index, a in enumerate(kinds) for b in kinds[index + 1 :]]
    assert all(pair in parsed.text for pair in pairs)
    assert "base and" not in parsed.text


def test_page_shows_token_and_gaps_of_a_difference(page, config):
    one = predictions(page.records, "adapter")[0]
    moved = one.model_copy(
        update={
            "program": "add(1, 1)",
            "text": "add(1, 1)",
            "token_ids": (*one.token_ids[:1], 77),
            "margins": (3.0, 0.0123),
        }
    )
    first = one.model_copy(update={"margins": (3.0, 0.0456, *one.margins[2:])})
    results = [ModelResults("adapter", "", {one.id: first}), ModelResults("merged", "", {one.id: moved})]
    shown = dataclasses.replace(page, results=results, token_names={77: " abc"})
    text = outline(render_run(shown)).text
    assert "0.0456" in text
    assert "0.0123" in text
    assert "\u2423abc" in text
    assert "near-tie" in text
    assert "1 completion that differs" in text


def test_data_of_the_run_cannot_become_markup(html, parsed):
    assert "&lt;demo&gt;" in html
    assert not [attrs for tag, attrs in parsed.tags if tag == "img"]
    assert NASTY not in html
    index = json.loads(parsed.blocks["example-index"])
    texts = [answer["p"] for example in index["examples"] for answer in example["m"]]
    assert any("</script><img" in text for text in texts)
    assert "innerHTML" not in html


def test_the_browser_has_every_example_and_its_filters(page, parsed):
    index = json.loads(parsed.blocks["example-index"])
    assert [example["id"] for example in index["examples"]] == [record.id for record in page.records]
    values = [attrs["value"] for tag, attrs in parsed.tags if attrs.get("name") == "filter"]
    assert values == ["all", "wrong", "executable", "invalid", "disagree"]
    lines = parsed.blocks["example-pages"].split("\n")
    assert all(json.loads(line)["t"] for line in lines)


def test_changed_options_come_with_their_default(html):
    row = re.search(r"<code>train\.num_train_epochs</code>.*?</tr>", html, re.DOTALL)[0]
    assert "2.0" in row
    assert "3.0" in row


def test_origin_names_commit_seed_versions_and_machine(parsed):
    for words in (
        "7530404abcde+",
        "with uncommitted changes",
        "Test CPU",
        "17",
        "2.13.0",
        "abababababababab",
        "861.0",
        "1.83 GB",
    ):
        assert words in parsed.text


def test_data_shows_drops_cuts_lengths_and_finqas_distribution(html, parsed):
    for words in ("dropped: program does not run", "800 of 24,800", "1,599 of 1,600", "No page of the evaluation"):
        assert words in parsed.text
    assert "&lt;b&gt;program" in html
    assert "divide 50.0% (FinQA 46.3%)" in html


def test_page_leaves_out_sections_of_skipped_stages(page):
    unscored = [ModelResults(results.kind, "", results.predictions) for results in page.results]
    less = dataclasses.replace(page, data={}, metrics=(), results=unscored, records=(), manifests={})
    found = outline(render_run(less))
    assert [attrs["id"] for tag, attrs in found.tags if tag == "section"] == ["agreement", "provenance"]
    assert [attrs["href"] for tag, attrs in found.tags if tag == "a"][1:3] == ["#agreement", "#provenance"]


@pytest.mark.parametrize("kinds", [("base",), ("adapter",), ("base", "merged"), ("F16", "Q4_K_M"), KINDS])
def test_headline_of_any_set_of_kinds_has_its_accuracies(page, kinds):
    shown = dataclasses.replace(page, results=[results for results in page.results if results.kind in kinds])
    figures = [f"{100 * results.figures.execution_accuracy:.1f}\u00a0%" for results in shown.scored]
    expected = figures[:2] if "base" in kinds else figures[:1]
    assert [text for text in (headline(shown)["before"], headline(shown)["after"]) if text] == expected


def test_a_run_with_nothing_done_still_says_how_it_is_set_up(config):
    text = outline(render_run(RunData(config))).text
    assert "This run has no measurements yet." in text
    assert "train.num_train_epochs" in text


def test_page_shows_options_as_they_were_set():
    rows, hub = {"path": "rows.jsonl"}, {"path": "hub:a/b", "weight": 2.0}
    config = Config.model_validate({"run": {"name": "mine"}, "data": {"source": "chat", "sources": [rows, hub]}})
    html = render_run(RunData(config))
    assert '["rows.jsonl", {"path": "hub:a/b", "weight": 2.0}]' in outline(html).text
    assert "<code>data.sources</code></th>" in html
    assert "tbody th > code { white-space: nowrap; }" in html


def test_page_shows_the_warning_about_the_evaluation(page, parsed):
    results = [results for results in page.results if results.kind == "base"]
    warned = dataclasses.replace(
        page, results=results, metrics=(), records=(), data={**page.data, "eval_warning": "3 shared"}
    )
    assert "Caution: 3 shared" in " ".join(outline(render_run(warned)).text.split())
    assert "Caution" not in parsed.text
