from __future__ import annotations

import math

import pytest

from fintune.config import PredictOptions
from fintune.finqa.grammar import general
from fintune.inference.decoding_strategies import choose_prediction, decoding_from_options, make_grammars
from fintune.inference.protocol import Completion
from fintune.records import FinQARecord

TABLE = [["", "2019"], ["cash", "7"]]


def said(text, nats=None, finish_reason="stop"):
    logprobs = () if nats is None else (nats / 2, nats / 2)
    return Completion((1, 2), text, finish_reason, (0.5, 0.5), 9, 0.25, logprobs)


def predicted(strategy, *completions, grammar=None):
    several = {"num_candidates": len(completions)} if strategy in ("vote", "execution_guided") else {}
    return choose_prediction("x", completions, PredictOptions(strategy=strategy, **several), TABLE, grammar)


def test_the_most_probable_program_that_runs_is_taken():
    found = predicted(
        "execution_guided", said("add(1, 2)", -5), said("divide(1, 0)", -1), said("nothing", -2), said("add(1, 3)", -3)
    )
    assert (found.program, found.logprob) == ("add(1, 3)", -3)
    assert found.confidence == pytest.approx(math.exp(-3))
    assert found.seconds == 1.0
    assert [each.result for each in found.candidates] == [3.0, None, None, 4.0]


def test_where_none_runs_the_most_probable_is_taken():
    assert predicted("execution_guided", said("no", -5), said("never", -1)).program == "never"


def test_candidates_of_unknown_probability_keep_their_order():
    found = predicted("execution_guided", said("no"), said("add(1, 2)"), said("add(1, 3)"))
    assert (found.program, found.logprob, found.confidence) == ("add(1, 2)", None, None)
    partly = predicted("execution_guided", said("add(1, 2)", math.nan), said("add(1, 3)", -9))
    assert partly.program == "add(1, 3)"


def test_vote_takes_most_frequent_result():
    found = predicted(
        "vote", said("add(1, 2)", -9), said("subtract(5, 2)", -4), said("add(1, 1)", -1), said("greater(1, 2)", -2)
    )
    assert (found.program, found.confidence) == ("subtract(5, 2)", 0.5)


def test_of_as_many_votes_the_most_probable_wins():
    assert predicted("vote", said("add(1, 2)", -2), said("add(1, 1)", -1)).program == "add(1, 1)"


def test_vote_ignores_failed_programs():
    found = predicted("vote", said("a", -1), said("b", -1), said("c", -1), said("add(1, 2)", -9))
    assert (found.program, found.confidence) == ("add(1, 2)", 0.25)
    nobody = predicted("vote", said("a", -2), said("b", -1))
    assert (nobody.program, nobody.confidence) == ("b", 0.0)


def test_a_single_completion_has_its_probability_as_confidence():
    found = predicted("greedy", said("add(1, 2)", -1))
    assert found.confidence == pytest.approx(math.exp(-1))
    assert found.candidates == ()


def test_a_program_that_the_limit_cut_is_ended_and_its_text_kept():
    found = predicted("greedy", said("add(1, 2), divide(#0", -1, "length"), grammar=general())
    assert found.program == "add(1, 2), divide(#0, 1)"
    assert (found.text, found.finish_reason) == ("add(1, 2), divide(#0", "length")
    broken = predicted("greedy", said("table_max(caf\ufffd", -1, "length"), grammar=general())
    assert broken.program == "table_max(caf, none)"
    assert predicted("greedy", said("add(1, 2), divide(#0", -1, "length")).program == "add(1, 2), divide(#0"


def test_the_options_become_a_decoding():
    greedy = decoding_from_options(PredictOptions(temperature=2.0), None)
    assert (greedy.temperature, greedy.num_candidates, greedy.greedy_first) == (0.0, 1, False)
    assert decoding_from_options(PredictOptions(strategy="execution_guided"), None).temperature == 0.0
    guided = decoding_from_options(PredictOptions(strategy="execution_guided", num_candidates=4, temperature=2.0), None)
    assert (guided.temperature, guided.num_candidates, guided.greedy_first) == (2.0, 4, True)
    vote = decoding_from_options(PredictOptions(strategy="vote", num_candidates=4, seed=3, top_p=0.5), None)
    assert (vote.greedy_first, vote.seed, vote.top_p) == (False, 3, 0.5)


def test_grammars_are_one_for_all_or_one_a_page():
    record = FinQARecord.model_validate(
        {
            "id": "x",
            "pre_text": ["it was 31 ."],
            "post_text": [],
            "table": TABLE,
            "qa": {"question": "what of 17?", "program": "add(99, 1)", "exe_ans": 100.0},
        }
    )
    assert make_grammars(PredictOptions(), [record]) is None
    one, other = make_grammars(PredictOptions(constrain="general"), [record, record])
    assert one is other
    (page,) = make_grammars(PredictOptions(constrain="page"), [record])
    assert all(f'"{number}"' in page.lark() for number in (31, 17, 7, 2019))
    assert "99" not in page.lark()
