"""What the loss was at the beginning of a training and at its end: that of single steps says little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FEWEST = 3


class Ends(NamedTuple):
    """Two means.

    Attributes:
        first: Of the first ``num`` losses.
        last: Of the last ``num``.
        num: How many.
    """

    first: float
    last: float
    num: int


def loss_ends(losses: Sequence[float]) -> Ends:
    """Means over the first and the last tenth of the logged losses, three at least; never over more than half of them.

    Args:
        losses: In the order of the steps, one at least.
    """
    num = max(1, min(max(FEWEST, len(losses) // 10), len(losses) // 2))
    return Ends(sum(losses[:num]) / num, sum(losses[-num:]) / num, num)
