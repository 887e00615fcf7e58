from __future__ import annotations

import pytest

from fintune.errors import DataError
from fintune.evaluation.agreement import NEAR_TIE_NATS, compare_predictions
from fintune.records import Prediction


def said(id_: str, program: str, tokens: tuple[int, ...] = (), margins: tuple[float, ...] = (), **more) -> Prediction:
    values = {"text": program, "finish_reason": "stop", "seconds": 0.1, "num_prompt_tokens": 5, **more}
    return Prediction(id=id_, program=program, token_ids=tokens, margins=margins, **values)


def test_identical_predictions_agree_in_everything():
    both = [said("a", "add(1, 2)", (1, 2)), said("b", "add(1, 3)", (1, 3))]
    found = compare_predictions(both, both, verdicts_a={"a": True, "b": False}, verdicts_b={"a": True, "b": False})
    assert (found.num_common, found.num_same_completion, found.num_same_program, found.num_same_verdict) == (2, 2, 2, 2)
    assert found.differences == ()
    assert found.faithful


def test_the_first_differing_token_and_both_gaps_are_told():
    a = [said("a", "add(1, 2)", (7, 1, 2, 9), (3.0, 2.0, 0.04, 5.0))]
    b = [said("a", "add(1, 5)", (7, 1, 5, 9), (3.0, 2.0, 0.02, 5.0))]
    (difference,) = compare_predictions(a, b, verdicts_a={"a": True}, verdicts_b={"a": False}).differences
    assert (difference.position, difference.token_a, difference.token_b) == (2, 2, 5)
    assert (difference.margin_a, difference.margin_b) == (0.04, 0.02)
    assert difference.near_tie is True
    assert (difference.correct_a, difference.correct_b) == (True, False)


@pytest.mark.parametrize(("gap_a", "gap_b"), [(0.02, 3.0), (3.0, 0.02), (NEAR_TIE_NATS, 0.01)])
def test_a_gap_that_is_wide_on_one_side_is_no_near_tie(gap_a, gap_b):
    found = compare_predictions([said("a", "x", (1,), (gap_a,))], [said("a", "y", (2,), (gap_b,))])
    assert found.differences[0].near_tie is False
    assert found.unexplained == found.differences
    assert not found.faithful


def test_the_threshold_can_be_chosen():
    a, b = [said("a", "x", (1,), (0.3,))], [said("a", "y", (2,), (0.4,))]
    assert not compare_predictions(a, b).faithful
    assert compare_predictions(a, b, threshold_nats=0.5).faithful


def test_a_gap_that_is_not_known_explains_nothing():
    found = compare_predictions([said("a", "x", (1,), (0.01,))], [said("a", "y", (2,))])
    assert found.differences[0].near_tie is None
    assert not found.faithful


def test_compare_predictions_without_token_ids_compares_text():
    found = compare_predictions([said("a", "x"), said("b", "z")], [said("a", "y"), said("b", "z")])
    assert found.num_same_completion == 1
    assert found.differences[0].position is None
    assert found.differences[0].near_tie is None


def test_a_completion_that_goes_on_differs_where_the_other_ended():
    a, b = [said("a", "x", (1, 2), (2.0, 0.05))], [said("a", "x, y", (1, 2, 3), (2.0, 0.05, 0.03))]
    (difference,) = compare_predictions(a, b).differences
    assert (difference.position, difference.token_a, difference.token_b) == (2, None, 3)
    assert difference.near_tie is None


def test_compare_predictions_ignores_a_missing_end_token():
    assert compare_predictions([said("a", "x", (1, 2))], [said("a", "x", (1,))]).num_same_completion == 1


def test_faithful_allows_other_text_around_the_program():
    a, b = said("a", "x", (1,), (2.0,), text="x"), said("a", "x", (4,), (2.0,), text="so x")
    found = compare_predictions([a], [b])
    assert found.num_same_program == 1
    assert found.differences[0].same_program
    assert found.program_differences == ()
    assert found.faithful


def test_faithful_needs_the_same_examples():
    found = compare_predictions([said("a", "x"), said("b", "x")], [said("b", "x"), said("c", "x"), said("d", "x")])
    assert (found.num_common, found.num_only_a, found.num_only_b) == (1, 1, 2)
    assert not found.faithful


def test_verdicts_count_only_where_both_sides_were_scored():
    both = [said("a", "x"), said("b", "x")]
    found = compare_predictions(both, both, verdicts_a={"a": True, "b": True}, verdicts_b={"a": False})
    assert (found.num_scored, found.num_same_verdict) == (1, 0)


def test_compare_predictions_refuses_a_duplicate_id():
    with pytest.raises(DataError, match="row 2, id a"):
        compare_predictions([said("a", "x"), said("a", "y")], [])
