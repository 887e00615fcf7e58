"""A few of many rows that show every kind: over sources and shapes, and from all of a file."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")
_ROW_OF_FILE = re.compile(r"(.*):\d+(?:#\d+)?", re.DOTALL)


def spread(kinds: Sequence[Hashable], number: int) -> list[int]:
    """Choose places, of each kind about as many, and of a kind at even distances.

    Args:
        kinds: Of every row.
        number: So many places at most; with fewer than there are kinds, kinds at even distances have one each.

    Returns:
        Places in rising order.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(place)
    chosen = _evenly(list(groups.values()), number)
    shares = [0] * len(chosen)
    left = min(number, len(kinds))
    while left:  # a round gives each kind that has more one more
        for at, places in enumerate(chosen):
            if left and shares[at] < len(places):
                shares[at] += 1
                left -= 1
    return sorted(place for places, share in zip(chosen, shares, strict=True) for place in _evenly(places, share))


def file_of(id_: str) -> str:
    """What names the file in the id of a conversation, ``rows.jsonl`` of ``rows.jsonl:7``; nothing of other ids."""
    found = _ROW_OF_FILE.fullmatch(id_)
    return found[1] if found else ""


def _evenly(items: Sequence[_Item], number: int) -> list[_Item]:
    number = min(number, len(items))
    return [items[at * len(items) // number] for at in range(number)]
