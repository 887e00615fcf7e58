"""Samples that depend on a seed and on nothing else."""

from __future__ import annotations

import random


def draw_indices(num_items: int, number: int | None, seed: int) -> list[int]:
    """Draw distinct positions below ``num_items``, in ascending order.

    Args:
        num_items: How many items there are.
        number: How many positions to draw; None or a number above ``num_items`` takes all.
        seed: The same seed draws the same positions.
    """
    if number is None or number >= num_items:
        return list(range(num_items))
    return sorted(random.Random(seed).sample(range(num_items), number))  # noqa: S311 - a sample, no secret
