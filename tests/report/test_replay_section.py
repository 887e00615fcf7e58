from __future__ import annotations

import dataclasses

import pytest

from fintune.config import Config
from fintune.pipeline.stages.report import collect
from fintune.report.run_data import RunData
from fintune.report.run_page import render_run
from fintune.report.sections.agreement import replay_section
from support.example_run import records, write_run
from support.outline import outline

REPLAYED = {
    "reference": "base + adapter",
    "num_examples": 16,
    "num_positions": 204,
    "min_same_share": {"merged": 0.98, "F16": 0.98, "Q8_0": 0.9, "Q4_K_M": 0.5},
    "replayed": {
        "adapter": {"mean_kl": 0.0, "same_best_token_share": 1.0, "perplexity": 1.2},
        "merged": {"mean_kl": 7e-8, "same_best_token_share": 1.0, "perplexity": 1.2001},
        "F16": {"mean_kl": 1.2e-5, "same_best_token_share": 0.995, "perplexity": 1.2002},
        "Q8_0": {"mean_kl": 2.1e-4, "same_best_token_share": 0.981, "perplexity": 1.21},
        "Q4_K_M": {"mean_kl": 0.0123, "same_best_token_share": 0.951, "perplexity": 1.31},
    },
}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> RunData:
    config = Config.model_validate({"run": {"name": "demo"}})
    return collect(config, write_run(tmp_path_factory.mktemp("run"), config, records(12)))


def test_replay_section_has_kl_agreement_and_perplexity(page):
    found = replay_section(dataclasses.replace(page, replay=REPLAYED))
    accuracy = {results.kind: results.figures.execution_accuracy for results in page.scored}
    assert [tuple(row[:4]) for row in found["table"].texts()] == [
        ("adapter", "reference", "", "1.2000"),
        ("merged", "< 0.000001", "100.0\u00a0%", "1.2001"),
        ("GGUF F16", "0.000012", "99.5\u00a0%", "1.2002"),
        ("GGUF Q8_0", "0.000210", "98.1\u00a0%", "1.2100"),
        ("GGUF Q4_K_M", "0.0123", "95.1\u00a0%", "1.3100"),
    ]
    assert found["table"].texts()[2][4] == f"{100 * accuracy['F16']:.1f}\u00a0%"
    assert found["table"].texts()[3][4] == ""


def test_the_page_says_what_would_have_failed_the_run(page):
    text = outline(render_run(dataclasses.replace(page, replay=REPLAYED))).text
    assert "The completions of 16 held-out examples (204 tokens)" in text
    limits = "98.0 % for merged and GGUF F16, 90.0 % for GGUF Q8_0, 50.0 % for GGUF Q4_K_M."
    assert limits in text.replace("\u00a0", " ")


def test_without_verdicts_there_is_no_column_of_accuracy(page):
    html = render_run(dataclasses.replace(page, replay=REPLAYED, results=()))
    section = html.split('<section id="replay"')[1].split("</section>")[0]
    assert "execution<br>accuracy" not in section
    assert "GGUF Q8_0" in section


def test_without_a_replay_there_is_no_such_part(page):
    assert 'id="replay"' not in render_run(page)


def test_replay_section_refers_to_trained_weights(page):
    figures = {"trained": REPLAYED["replayed"]["adapter"], "F16": REPLAYED["replayed"]["F16"]}
    found = replay_section(dataclasses.replace(page, replay=REPLAYED | {"replayed": figures}))
    assert [tuple(row[:2]) for row in found["table"].texts()] == [("trained", "reference"), ("GGUF F16", "0.000012")]
