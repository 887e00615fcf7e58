"""Two sets of predictions for the same questions: how many answers the second gains and loses, and what that proves.

Both answered the same questions, so what counts is where only one of them is right: two intervals that overlap may
still belong to a clear difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fintune.evaluation.metrics import Interval, wilson


@dataclass(frozen=True)
class Paired:
    """Which of two was right, question by question.

    Attributes:
        num_both: Questions on which both are right.
        num_gained: On which only the second is.
        num_lost: On which only the first is.
        num_neither: On which neither is.
    """

    num_both: int
    num_gained: int
    num_lost: int
    num_neither: int

    @property
    def num_common(self) -> int:
        """Questions that both answered."""
        return self.num_both + self.num_gained + self.num_lost + self.num_neither

    @property
    def difference(self) -> float:
        """Accuracy of the second less that of the first, a fraction; 0 of nothing."""
        return (self.num_gained - self.num_lost) / self.num_common if self.num_common else 0.0

    @property
    def points(self) -> str:
        """The difference in percentage points, as ``+10.9``."""
        return f"{100 * self.difference:+.1f}" if self.num_gained != self.num_lost else "0.0"

    @property
    def interval(self) -> Interval:
        """95 % interval of the difference, by method 10 of Newcombe 1998 (Statistics in Medicine 17, 2635-2650)."""
        if not self.num_common:
            return -1.0, 1.0
        second, first = self.num_both + self.num_gained, self.num_both + self.num_lost
        below_second, above_second = _reach(second, self.num_common)
        below_first, above_first = _reach(first, self.num_common)
        shared = 2 * self._correlation(second, first)
        low = _root(below_second**2 - shared * below_second * above_first + above_first**2)
        high = _root(above_second**2 - shared * above_second * below_first + below_first**2)
        return self.difference - low, self.difference + high

    def _correlation(self, second: int, first: int) -> float:
        """Phi of the four counts, with Newcombe's continuity correction; 0 where one of the two is always the same."""
        number = self.num_common
        spread = second * (number - second) * first * (number - first)
        crossed = self.num_both * self.num_neither - self.num_gained * self.num_lost
        corrected = max(crossed - number / 2, 0.0) if crossed > 0 else crossed
        return corrected / math.sqrt(spread) if spread else 0.0


def paired(first: Mapping[str, bool], second: Mapping[str, bool]) -> Paired:
    """Compare two sets of verdicts over the ids that both have.

    Args:
        first: Whether the answer is right, by id.
        second: The same of the other.
    """
    sides = [(first[id_], second[id_]) for id_ in first if id_ in second]
    return Paired(
        sides.count((True, True)), sides.count((False, True)), sides.count((True, False)), sides.count((False, False))
    )


def _reach(num_hits: int, num_trials: int) -> tuple[float, float]:
    """How far Wilson's interval reaches below and above the fraction."""
    low, high = wilson(num_hits, num_trials)
    rate = num_hits / num_trials
    return rate - low, high - rate


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0))  # a rounding error below nothing is nothing
