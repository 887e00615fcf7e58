"""Wilson's interval, paired comparison, accuracy by coverage and mean losses. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, TypeAlias

Interval: TypeAlias = tuple[float, float]

_Z_95 = 1.959963984540054
_MIN_AVERAGED_LOSSES = 3


def wilson(num_hits: int, num_trials: int) -> Interval:
    """Return the 95 % score interval of a fraction (Wilson 1927, without continuity correction).

    The interval of no trials is (0, 1).
    """
    if not num_trials:
        return 0.0, 1.0
    rate, z2 = num_hits / num_trials, _Z_95**2
    centre = rate + z2 / (2 * num_trials)
    spread = _Z_95 * math.sqrt(rate * (1 - rate) / num_trials + z2 / (4 * num_trials**2))
    scale = 1 + z2 / num_trials
    # The ends at 0 and at 1 are exact; computed, they would be off by a rounding error.
    low = (centre - spread) / scale if num_hits else 0.0
    high = (centre + spread) / scale if num_hits < num_trials else 1.0
    return low, high


@dataclass(frozen=True)
class PairedComparison:
    """Two sets of answers to the same questions: how many are right on both sides, gained, lost, and on neither side.

    The questions that only the second side (gained) or only the first (lost) answers correctly decide. Two overlapping
    intervals of single accuracies may still belong to a clear difference.
    """

    num_both: int
    num_gained: int
    num_lost: int
    num_neither: int

    @property
    def num_common(self) -> int:
        """Number of questions that both answered."""
        return self.num_both + self.num_gained + self.num_lost + self.num_neither

    @property
    def difference(self) -> float:
        """Accuracy of the second minus accuracy of the first, as a fraction; 0 without common questions."""
        return (self.num_gained - self.num_lost) / self.num_common if self.num_common else 0.0

    @property
    def points(self) -> str:
        """The difference in percentage points, such as ``+10.9``."""
        return f"{100 * self.difference:+.1f}" if self.num_gained != self.num_lost else "0.0"

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the difference: method 10 of Newcombe 1998 (Statistics in Medicine 17, 2635-2650)."""
        number = self.num_common
        if not number:
            return -1.0, 1.0
        first, second = self.num_both + self.num_lost, self.num_both + self.num_gained
        (low_1, high_1), (low_2, high_2) = wilson(first, number), wilson(second, number)
        below_1, above_1 = first / number - low_1, high_1 - first / number
        below_2, above_2 = second / number - low_2, high_2 - second / number
        # Phi of the four counts with Newcombe's continuity correction; 0 if one side is always or never right.
        crossed = self.num_both * self.num_neither - self.num_gained * self.num_lost
        corrected = max(crossed - number / 2, 0.0) if crossed > 0 else crossed
        spread = second * (number - second) * first * (number - first)
        phi = corrected / math.sqrt(spread) if spread else 0.0
        # A rounding error below 0 counts as 0.
        low = math.sqrt(max(below_2**2 - 2 * phi * below_2 * above_1 + above_1**2, 0.0))
        high = math.sqrt(max(above_2**2 - 2 * phi * above_2 * below_1 + below_1**2, 0.0))
        return self.difference - low, self.difference + high


def compare_paired(first: Mapping[str, bool], second: Mapping[str, bool]) -> PairedComparison:
    """Compare two sets of verdicts (whether the answer is right, by question id) over the ids that both have."""
    sides = [(first[id_], second[id_]) for id_ in first if id_ in second]
    return PairedComparison(
        sides.count((True, True)), sides.count((False, True)), sides.count((True, False)), sides.count((False, False))
    )


def accuracy_by_coverage(answers: Iterable[tuple[float, bool]]) -> list[float]:
    """Accuracy of the 1, 2, ... most confident answers (risk and coverage: El-Yaniv and Wiener 2010, JMLR 11).

    ``answers`` are pairs of confidence and verdict in any order. Equally confident answers are averaged, so their order
    does not matter.
    """
    accuracies: list[float] = []
    num_right = 0.0
    ordered = sorted(answers, key=lambda answer: -answer[0])
    for _, equals in groupby(ordered, key=lambda answer: answer[0]):
        group = list(equals)
        share = sum(right for _, right in group) / len(group)
        for _ in group:
            num_right += share
            accuracies.append(num_right / (len(accuracies) + 1))
    return accuracies


def accuracy_at(accuracies: Sequence[float], coverage: float) -> float:
    """Accuracy when this share of the questions is answered, at least one; see `accuracy_by_coverage`."""
    return accuracies[max(1, round(coverage * len(accuracies))) - 1]


class LossSummary(NamedTuple):
    """Mean of the first and of the last ``num`` logged losses of a training."""

    first: float
    last: float
    num: int


def summarize_losses(losses: Sequence[float]) -> LossSummary:
    """Average the first and the last tenth of the logged losses, at least one: the loss of a single step says little.

    Each mean covers at least three losses, and never more than half of them.
    """
    num = max(1, min(max(_MIN_AVERAGED_LOSSES, len(losses) // 10), len(losses) // 2))
    return LossSummary(sum(losses[:num]) / num, sum(losses[-num:]) / num, num)
