from __future__ import annotations

import gzip
import json
from collections import Counter
from urllib.parse import unquote

import pytest

from fintune.evaluation.metrics import compute_scores
from fintune.evaluation.scoring import ScoreResult
from fintune.finqa.program import tokenize
from fintune.finqa.verdict import judge
from fintune.records import FinQARecord
from fintune.report.score_page import render_score
from fintune.report.sections import errors
from support.browser import needs_chromium, opened
from support.example_run import NASTY, records
from support.outline import Outline, outline
from support.paths import ROOT

SHARED = ROOT.parent / "shared" / "finqa"

RECORDS = records(8)
RIGHT = RECORDS[0].qa.program
NEW, OLD = 130 + 11 * 3, 100 + 7 * 3
PREDICTED = [
    tokenize(RIGHT),
    tokenize(f"{RECORDS[1].qa.program}, add(#1, 0)"),
    tokenize(RECORDS[2].qa.program.replace("subtract", "add")),
    ["divide(", str(NEW), str(OLD), ")", "subtract(", "#0", "1", ")", "EOF"],
    tokenize(NASTY),
    ["add(", "1", "2", ")"],
]


def record(*, table, post_text, program, gold_inds):
    base = RECORDS[0]
    qa = base.qa.model_copy(update={"program": program, "gold_inds": gold_inds, "exe_ans": 20.0})
    return base.model_copy(update={"pre_text": (), "table": table, "post_text": post_text, "qa": qa})


def scored(programs: list[list[str]] = PREDICTED, items: list[FinQARecord] = RECORDS, **more) -> ScoreResult:
    score, verdicts = compute_scores(items, [(item.id, tokens) for item, tokens in zip(items, programs, strict=False)])
    return ScoreResult(score, verdicts, records=items, tokens=programs, **more)


def page(*args, **more) -> str:
    digests = {"<p>.json": "ab" * 32, "gold.json": "cd" * 32}
    return render_score(scored(*args, **more), "<p>.json", "gold.json", digests)


@pytest.fixture(scope="module")
def html() -> str:
    return page(num_unscored={"no <id>": 2}, problems=["<p>.json, row 9: no id"])


@pytest.fixture(scope="module")
def parsed(html) -> Outline:
    return outline(html)


def test_headline_has_both_denominators_with_intervals_and_n(parsed):
    figures = scored().score
    for words in (
        "50.0\u00a0%",
        "37.5\u00a0%",
        "16.7\u00a0%",
        "12.5\u00a0%",
        "on 6 predictions",
        "without a prediction 2",
    ):
        assert words in parsed.text
    assert f"{100 * figures.execution_accuracy_interval[0]:.1f}\u2013" in parsed.text
    assert f"{100 * figures.whole_file.execution_accuracy_interval[0]:.1f}\u2013" in parsed.text


def test_tolerant_views_stand_under_their_own_names(parsed):
    assert "not official" in parsed.text
    for name in (
        "right up to the sign",
        "right up to a factor of 100",
        "within 1 %",
        "agrees with the annotator's answer",
    ):
        assert name in parsed.text


def test_score_page_has_unique_ids_and_valid_links(html, parsed):
    ids = [attrs["id"] for _, attrs in parsed.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    links = [unquote(attrs["href"][1:]) for tag, attrs in parsed.tags if tag == "a"]
    answers = [each["m"][0] for each in json.loads(parsed.blocks["example-index"])["examples"]]
    assert set(links) <= set(ids) | {f"error:{each['e']}" for each in answers if "e" in each}
    assert all(attrs[name].startswith("#") for _, attrs in parsed.tags for name in ("src", "href") if name in attrs)
    assert "url(http" not in html


def test_what_the_files_hold_cannot_become_markup(html, parsed):
    assert "&lt;p&gt;.json" in html
    assert "no &lt;id&gt; 2" in html
    assert NASTY not in html
    assert not [attrs for tag, attrs in parsed.tags if tag == "img"]


def test_score_page_shows_the_first_prediction_for_an_id(parsed):
    assert len(json.loads(parsed.blocks["example-index"])["examples"]) == len(PREDICTED)
    items = [RECORDS[0], RECORDS[0]]
    figures, verdicts = compute_scores(RECORDS, [(item.id, PREDICTED[k]) for k, item in enumerate(items)])
    result = ScoreResult(figures, verdicts, records=RECORDS, tokens=PREDICTED[:2])
    shown = outline(render_score(result, "p", "g"))
    [example] = json.loads(shown.blocks["example-index"])["examples"]
    assert example["m"][0]["p"] == RIGHT
    assert "1 are duplicates" in shown.text


def test_all_right_leaves_the_errors_out():
    shown = outline(page([tokenize(item.qa.program) for item in RECORDS]))
    assert "errors" not in [attrs["id"] for tag, attrs in shown.tags if tag == "section"]
    assert not [attrs for tag, attrs in shown.tags if attrs.get("value") == "noresult"]


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("subtract(100, 130), divide(#0, 100)", "other sign"),
        ("subtract(130, 100), divide(#0, const_1)", "100 times off"),
        ("divide(301, 1000)", "within 1 %"),
        ("subtract(100, 130), divide(#0, 130)", "right numbers, other steps"),
        ("divide(-130, 100), multiply(#0, const_7)", "right numbers, other steps"),
        ("divide(130, 99)", "some other numbers"),
        ("add(1, 2)", "other numbers"),
        ("table_max(revenue, none)", "other numbers"),
        ("average(1, 2)", "unknown operation"),
        ("add(1,2)", "broken form"),
        ("add(x, 2)", "operand is no number"),
        ("add(const_x, 2)", "unknown constant"),
        ("add(#3, 2)", "no such earlier step"),
        ("divide(1, 0)", "division by zero"),
        ("exp(1000, 1000)", "result too large"),
        ("greater(2, 1), add(#0, 1)", "yes or no as operand"),
        ("table_max(profit, none)", "no such table row"),
        ("", "no complete step"),
    ],
)
def test_each_error_has_a_kind(program, kind):
    verdict, _ = judge(RECORDS[0], tokenize(program))
    assert errors.error_kind(verdict) == kind


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/finqa beside the repository")
def test_every_error_of_the_official_vectors_has_a_kind():
    with gzip.open(SHARED / "dev.json.gz", "rt", encoding="utf-8") as file:
        gold = {row["id"]: FinQARecord.model_validate(row) for row in json.load(file)}
    with gzip.open(SHARED / "evaluator_vectors_dev.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row for line in file if not (row := json.loads(line))["exe_correct"]][::5]
    kinds = Counter(errors.error_kind(judge(gold[row["id"]], row["tokens"])[0]) for row in rows)
    assert errors.OTHER_REASON not in kinds
    assert len(kinds) >= 12


@needs_chromium
def test_browser_shows_gold_and_prediction_side_by_side(html, tmp_path):
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    shown = opened(tmp_path / "page.html", f"example:{RECORDS[2].id}", tmp_path / "profile")
    assert "1 of 6 examples" in shown
    assert '<span class="differs">add</span>(152, 114)' in shown
    assert '<td class="mono num">38</td>' in shown
    assert '<td class="mono num">266</td>' in shown
    assert 'class="used read"' in shown
    assert "revenue · " in shown


@needs_chromium
def test_browser_marks_numbers_from_other_cells_or_nowhere(tmp_path):
    item = record(
        table=(("", "2010", "2009"), ("revenue", "50", "40"), ("costs", "30", "20")),
        post_text=("taxes were 7 .",),
        program="subtract(50, 30)",
        gold_inds={"table_1": "", "table_2": ""},
    )
    file = tmp_path / "page.html"
    file.write_text(page([tokenize("subtract(50, 20), add(#0, 7), add(#1, 99)")], [item]), "utf-8")
    shown = opened(file, f"example:{item.id}", tmp_path / "profile")
    assert '<td class="used read" title="read by both">50</td>' in shown
    assert '<td class="used" title="read by the gold program">30</td>' in shown
    assert '<td class="read" title="read by the prediction">20</td>' in shown
    assert ">50: revenue · 2010<" in shown
    assert ">20: costs · 2009<" in shown
    assert "text_0, read by the prediction alone" in shown
    assert '<mark class="read">7</mark>' in shown
    assert '99: <b class="odd">nowhere on the page</b>' in shown
    assert "wrong: some other numbers" in shown


@needs_chromium
def test_browser_lists_the_examples_of_a_kind_of_error(html, tmp_path):
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    shown = opened(tmp_path / "page.html", "error:no%20complete%20step", tmp_path / "profile")
    assert "1 of 6 examples" in shown


@needs_chromium
def test_browser_filters_count_what_the_score_counts(tmp_path):
    items = records(1147)
    result = scored(
        [PREDICTED[k % 6] if k % 6 > 3 else tokenize(RECORDS[k % 2].qa.program) for k in range(1147)], items
    )
    click = """<script>
      const found = [];
      for (const input of document.querySelectorAll("input[name=filter]")) {
        input.click();
        found.push(input.value + " " + document.getElementById("count").textContent);
      }
      document.title = found.join("; ");
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(render_score(result, "p", "g").replace("</body>", click), encoding="utf-8")
    title = opened(file, "", tmp_path / "profile").split("<title>")[1].split("</title>")[0]
    outcomes = result.score.outcomes
    expected = {
        "all": 1147,
        "executable": outcomes["wrong_result"],
        "invalid": outcomes["invalid"],
        "noresult": outcomes["no_result"],
        "other": outcomes.get("other_program", 0),
    }
    assert title == "; ".join(f"{name} {number} of 1147 examples" for name, number in expected.items())
