from __future__ import annotations

import gzip
import json

import pytest

from fintune.finqa.program import tokenize
from fintune.finqa.verdict import OUTCOMES, OfficialVerdict, judge
from fintune.records import Candidate, FinQARecord
from fintune.report.browser import BrowserAnswer, browser_blocks, find_used_parts, script_json
from support.example_run import NASTY, predictions, records
from support.paths import ROOT

DEV = ROOT.parent / "shared" / "finqa" / "dev.json.gz"


def record(**qa) -> FinQARecord:
    values = {"question": "q", "program": "subtract(50, 32)", "exe_ans": 18.0, "gold_inds": None, **qa}
    return FinQARecord.model_validate(
        {
            "id": "A/1/page_1.pdf-1",
            "pre_text": ["first .", "we paid $ 1,250.5 and 50% in 2010 ."],
            "post_text": ["last 32 ."],
            "table": [["", "2010", "2009"], ["a", "$ 50", "7"], ["b", "-32 ( 32 )", "50"], ["c", "1", ""]],
            "qa": values,
        }
    )


def test_operands_are_found_only_in_the_rows_that_are_evidence():
    used = find_used_parts(record(gold_inds={"table_1": "...", "table_3": "..."}))
    assert used.rows == (1, 3)
    assert used.cells == ((1, 1),)
    assert not used.derived


def test_used_parts_ignore_the_sign_of_a_cell():
    assert (2, 1) in find_used_parts(record(gold_inds={"table_2": "..."})).cells


def test_used_parts_without_gold_inds_search_the_whole_page():
    used = find_used_parts(record(program="subtract(50, 1250.5)"))
    assert used.derived
    assert used.cells == ((1, 1), (2, 2))
    assert used.sentences == {1: (3,)}


def test_a_table_operation_uses_the_filled_cells_of_its_row():
    assert find_used_parts(record(program="table_max(c, none)", gold_inds={"table_3": ""})).cells == ((3, 1),)


def test_used_parts_mark_operands_with_currency_and_percent():
    used = find_used_parts(record(program="multiply(50%, 1250.5)", gold_inds={"text_1": "", "text_2": ""}))
    assert used.sentences == {1: (3, 5), 2: ()}


def test_an_operand_in_a_first_row_that_is_no_header_is_found():
    assert find_used_parts(record(program="subtract(50, 2010)", gold_inds={"table_1": ""})).cells == ((0, 1), (1, 1))


def test_constants_and_steps_mark_nothing():
    used = find_used_parts(
        record(program="divide(7, const_1), add(#0, const_50)", gold_inds={"table_1": "", "table_2": ""})
    )
    assert used.cells == ((1, 2),)


def test_evidence_that_the_page_does_not_have_is_left_out():
    assert find_used_parts(record(gold_inds={"table_9": "", "text_77": "", "odd": ""})).rows == ()


@pytest.mark.skipif(not DEV.exists(), reason="needs FinQA's dev set beside the repository")
def test_used_parts_find_nearly_all_operands_of_dev():
    items = [FinQARecord.model_validate(row) for row in json.loads(gzip.decompress(DEV.read_bytes()))]
    marked = [used for used in map(find_used_parts, items) if used.cells or any(used.sentences.values())]
    assert len(marked) >= 0.99 * len(items)


@pytest.mark.parametrize(
    ("tokens", "outcome"),
    [
        (tokenize("subtract(50, 32)"), "equal_program"),
        (tokenize("add(32, 50), subtract(#0, 64)"), "other_program"),
        (tokenize("add(50, 32)"), "wrong_result"),
        (["subtract(", "50", "32", ")"], "no_result"),
        (tokenize("subtract(50, x)"), "invalid"),
    ],
)
def test_browser_index_has_outcome_and_step_values(tokens, outcome):
    item = record()
    verdict, _ = judge(item, tokens)
    answers = {"predicted": {item.id: BrowserAnswer(tokens, verdict.program, verdict)}}
    [answer] = json.loads(browser_blocks([item], answers, {})[0])["examples"][0]["m"]
    assert OUTCOMES[answer["c"]] == verdict.outcome == outcome
    assert (answer["s"] == []) == (outcome == "no_result")


def test_script_json_cannot_leave_its_element():
    text = script_json({"x": NASTY})
    assert not set("<>&\u2028\n") & set(text)
    assert json.loads(text) == {"x": NASTY}


def test_pages_that_questions_share_are_stored_once():
    one, other = record(), record(question="another").model_copy(update={"id": "A/1/page_1.pdf-2"})
    index, pages = browser_blocks([one, other, *records(2)], {}, {})
    assert len(pages.split("\n")) == 3
    assert [example["page"] for example in json.loads(index)["examples"]] == [0, 0, 1, 2]
    assert json.loads(pages.split("\n")[0])["t"][1] == ["a", "$ 50", "7"]


def test_browser_index_has_verdicts_cuts_and_missing_answers():
    items = records(3)
    invalid = OfficialVerdict(
        id=items[0].id, exe_correct=False, program_correct=False, invalid=True, result="n/a", outcome="invalid"
    )
    first, second = predictions(items, "base")[:2]
    answers = {
        first.id: BrowserAnswer.from_prediction(first.model_copy(update={"finish_reason": "length"}), invalid),
        second.id: BrowserAnswer.from_prediction(
            second.model_copy(update={"finish_reason": "stop", "text": "so: x"}), None
        ),
    }
    index = json.loads(browser_blocks(items, {"base": answers}, {items[1].id: 4})[0])
    one, two, three = index["examples"]
    assert index["kinds"] == ["base"]
    assert one["s"] == ["30", "0.3"]
    assert OUTCOMES[one["m"][0]["c"]] == "invalid"
    assert one["m"][0]["cut"]
    assert "c" not in two["m"][0]
    assert "cut" not in two["m"][0]
    assert two["m"][0]["t"] == "so: x"
    assert two["cut"] == 4
    assert three["m"] == [None]


def test_browser_index_has_the_confidence_of_an_answer():
    items = records(3)
    alone, voted, unknown = predictions(items, "adapter")
    results = (2.0, 2.0, 5.0, None)
    candidates = tuple(
        Candidate(program=f"add({place}, 2)", logprob=-1.0, result=result, num_tokens=5)
        for place, result in enumerate(results)
    )
    voted = voted.model_copy(update={"confidence": 0.5, "program": "add(1, 2)", "candidates": candidates})
    made = (alone.model_copy(update={"confidence": 0.414}), voted, unknown)
    answers = {each.id: BrowserAnswer.from_prediction(each, None) for each in made}
    examples = json.loads(browser_blocks(items, {"adapter": answers}, {})[0])["examples"]
    assert [example["m"][0].get("k") for example in examples] == [
        "confidence 41 %",
        "confidence 50 %: 2 of 4 candidates have this result",
        None,
    ]
