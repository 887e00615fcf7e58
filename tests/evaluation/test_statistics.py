from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintune.evaluation.statistics import (
    PairedComparison,
    accuracy_at,
    accuracy_by_coverage,
    compare_paired,
    summarize_losses,
    wilson,
)


def test_wilson_gives_published_intervals() -> None:
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for hits, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(hits, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(0, 300), st.integers(1, 300))
def test_wilson_contains_the_fraction(hits: int, trials: int) -> None:
    hits = min(hits, trials)
    low, high = wilson(hits, trials)
    assert 0 <= low <= hits / trials <= high <= 1


def test_compare_paired_counts_who_is_right() -> None:
    first = {"a": True, "b": True, "c": False, "d": False, "e": False, "only here": True}
    second = {"a": True, "b": False, "c": True, "d": True, "e": False, "only there": True}
    found = compare_paired(first, second)
    assert found == PairedComparison(num_both=1, num_gained=2, num_lost=1, num_neither=1)
    assert (found.num_common, found.difference, found.points) == (5, 0.2, "+20.0")


@pytest.mark.parametrize(
    ("counts", "interval"),
    [((36, 12, 2, 0), (0.0569, 0.3404)), ((20, 12, 2, 16), (0.0562, 0.3292)), ((36, 14, 0, 0), (0.1528, 0.4167))],
)
def test_paired_interval_is_newcombes_method_10(counts, interval) -> None:
    assert PairedComparison(*counts).interval == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize("counts", [(3, 0, 0, 7), (0, 0, 0, 9), (0, 8, 0, 0), (1, 5, 2, 40), (60, 1, 30, 0)])
def test_paired_interval_is_symmetric_in_its_sides(counts) -> None:
    found = PairedComparison(*counts)
    low, high = found.interval
    assert -1 <= low <= found.difference <= high <= 1 + 1e-12
    turned = PairedComparison(counts[0], counts[2], counts[1], counts[3])
    assert turned.interval == pytest.approx((-high, -low))


def test_compare_paired_without_common_ids() -> None:
    found = compare_paired({"a": True}, {"b": True})
    assert (found.num_common, found.difference, found.points, found.interval) == (0, 0.0, "0.0", (-1.0, 1.0))


def test_coverage_starts_with_the_most_confident():
    answers = [(0.1, False), (0.9, True), (0.5, False), (0.7, True)]
    assert accuracy_by_coverage(answers) == [1, 1, pytest.approx(2 / 3), 0.5]


def test_coverage_averages_equal_confidences():
    right_first, wrong_first = [(1.0, True), (1.0, False)], [(1.0, False), (1.0, True)]
    assert accuracy_by_coverage(right_first) == accuracy_by_coverage(wrong_first) == [0.5, 0.5]
    assert accuracy_by_coverage([*wrong_first, (2.0, True)]) == [1, 0.75, pytest.approx(2 / 3)]


def test_accuracy_at_covers_at_least_one_answer():
    curve = accuracy_by_coverage([(3.0, True), (2.0, True), (1.0, False), (0.0, False)])
    assert [accuracy_at(curve, share) for share in (0.0, 0.25, 0.5, 1.0)] == [1, 1, 1, 0.5]


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([2.0], (2.0, 2.0, 1)),
        ([2.0, 5.0, 1.0], (2.0, 1.0, 1)),
        ([1.4, 3.6, 3.0, 1.0, 4.2], (2.5, 2.6, 2)),
        ([3.0] * 20 + [2.0] * 20 + [1.0] * 20, (3.0, 1.0, 6)),
    ],
)
def test_summarize_losses_averages_both_ends(losses, ends):
    assert summarize_losses(losses) == pytest.approx(ends)
