from __future__ import annotations

import pytest

from fintune.evaluation.paired import Paired, paired


def test_each_question_counts_by_which_of_the_two_was_right() -> None:
    first = {"a": True, "b": True, "c": False, "d": False, "e": False, "only here": True}
    second = {"a": True, "b": False, "c": True, "d": True, "e": False, "only there": True}
    found = paired(first, second)
    assert found == Paired(num_both=1, num_gained=2, num_lost=1, num_neither=1)
    assert (found.num_common, found.difference, found.points) == (5, 0.2, "+20.0")


@pytest.mark.parametrize(
    ("counts", "interval"),
    [((36, 12, 2, 0), (0.0569, 0.3404)), ((20, 12, 2, 16), (0.0562, 0.3292)), ((36, 14, 0, 0), (0.1528, 0.4167))],
)
def test_the_interval_is_that_of_newcombes_method_10(counts, interval) -> None:
    assert Paired(*counts).interval == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize("counts", [(3, 0, 0, 7), (0, 0, 0, 9), (0, 8, 0, 0), (1, 5, 2, 40), (60, 1, 30, 0)])
def test_an_interval_holds_its_difference_and_turns_with_the_sides(counts) -> None:
    found = Paired(*counts)
    low, high = found.interval
    assert -1 <= low <= found.difference <= high <= 1 + 1e-12
    turned = Paired(counts[0], counts[2], counts[1], counts[3])
    assert turned.interval == pytest.approx((-high, -low))


def test_nothing_in_common_says_nothing() -> None:
    found = paired({"a": True}, {"b": True})
    assert (found.num_common, found.difference, found.points, found.interval) == (0, 0.0, "0.0", (-1.0, 1.0))
