"""In which requests prompts go to a server with slots, each of which still holds what it computed last."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

_PROMPTS_PER_SLOT = 4
"""Prompts without a family that one request holds for each slot; more of them would delay its answer."""


def waves(families: Sequence[Sequence[int]], num_slots: int) -> Iterator[list[int]]:
    """Requests such that a family's next prompt finds its predecessor in a slot.

    A wave holds one prompt for each slot: first those whose family has a slot already, so that no other prompt takes
    it, then first prompts of other families, then prompts without one. What is left has no family and needs no order:
    such a request is longer, and its prompts follow each other in the slots as these get free.

    Args:
        families: Places of prompts by what they share, see :func:`fintune.inference.prefixes.families`.
        num_slots: Prompts that the server computes together.
    """
    large = deque(deque(family) for family in families if len(family) > 1)
    alone = deque(deque(family) for family in families if len(family) == 1)
    going: list[deque[int]] = []
    while large or going:
        while len(going) < num_slots and (large or alone):
            going.append((large or alone).popleft())
        yield [family.popleft() for family in going]
        going = [family for family in going if family]
    rest = [family[0] for family in alone]
    size = num_slots * _PROMPTS_PER_SLOT
    yield from (rest[at : at + size] for at in range(0, len(rest), size))
