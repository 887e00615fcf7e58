"""A few of many rows that show every kind: over sources and shapes, and from all of a file."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TypeVar

_Item = TypeVar("_Item")
_ROW_OF_FILE = re.compile(r"(.*):(\d+)(?:#\d+)?", re.DOTALL)
_LATER_SOURCE = re.compile(r"[1-9]\d*/", re.ASCII)


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


def place_of(id_: str, paths: Sequence[str]) -> str:
    """Where a conversation stands, as messages say it: ``rows.jsonl, row 7`` of ``2/rows.jsonl:7``.

    Args:
        id_: Of the conversation; another one is itself the answer.
        paths: Of ``data.sources``; ids of the first have no number before them.
    """
    found = _ROW_OF_FILE.fullmatch(id_)
    if not found or not paths:
        return id_
    label, row = found.groups()
    number = _LATER_SOURCE.match(label)
    is_later = number is not None and 2 <= int(number[0][:-1]) <= len(paths)
    label = label[len(number[0]) :] if number and is_later else label
    path = paths[int(number[0][:-1]) - 1] if number and is_later else paths[0]
    if path.startswith("hub:"):
        label = "hub:{}, split {}".format(*label.rsplit("/", 1))
    elif Path(path).name == label:
        label = path
    elif Path(path).is_dir():
        label = f"{path.rstrip('/')}/{label}"
    return f"{label}, row {row}"


def _evenly(items: Sequence[_Item], number: int) -> list[_Item]:
    number = min(number, len(items))
    return [items[at * len(items) // number] for at in range(number)]
