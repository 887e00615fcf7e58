"""Risk and coverage: how accurate a model is when it withholds the answers that it is least sure of.

After El-Yaniv and Wiener 2010 (On the foundations of noise-free selective classification, JMLR 11). Standard library
only.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby


def answered_accuracy(answers: Iterable[tuple[float, bool]]) -> list[float]:
    """Accuracy of the most confident answers, by how many of them are given.

    Args:
        answers: Confidence and verdict of each answer, in any order.

    Returns:
        The accuracy of 1, 2, ... all answers. Of equally confident ones each is as likely to be among the first: the
        accuracy is the expected one, and their order does not matter.
    """
    found: list[float] = []
    num_right = 0.0
    ordered = sorted(answers, key=lambda answer: -answer[0])
    for _, equals in groupby(ordered, key=lambda answer: answer[0]):
        group = list(equals)
        share = sum(right for _, right in group) / len(group)
        for _ in group:
            num_right += share
            found.append(num_right / (len(found) + 1))
    return found


def at_coverage(accuracies: list[float], coverage: float) -> float:
    """Accuracy when this share of the answers is given (at least one), from :func:`answered_accuracy`."""
    return accuracies[max(1, round(coverage * len(accuracies))) - 1]
