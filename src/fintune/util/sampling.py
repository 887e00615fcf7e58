"""Samples of rows: drawn with a seed, or stratified so that every kind of row is in it."""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TypeVar

_Item = TypeVar("_Item")
_ROW_OF_FILE = re.compile(r"(.*):(\d+)(?:#\d+)?", re.DOTALL)
_LATER_SOURCE = re.compile(r"[1-9]\d*/", re.ASCII)


def draw_indices(num_items: int, number: int | None, seed: int) -> list[int]:
    """Draw ``number`` distinct indices below ``num_items``, in ascending order; None takes all."""
    if number is None or number >= num_items:
        return list(range(num_items))
    return sorted(random.Random(seed).sample(range(num_items), number))  # noqa: S311 - a sample, no secret


def stratified_indices(kinds: Sequence[Hashable], number: int) -> list[int]:
    """Choose at most ``number`` indices, ascending, so that each kind gets about the same number, at even distances.

    With a smaller number than there are kinds, kinds at even distances get one.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    chosen = _evenly(list(groups.values()), number)
    shares = [0] * len(chosen)
    num_left = min(number, len(kinds))
    while num_left:  # one more for each kind that still has rows, round by round
        for group, indices in enumerate(chosen):
            if num_left and shares[group] < len(indices):
                shares[group] += 1
                num_left -= 1
    return sorted(index for indices, share in zip(chosen, shares, strict=True) for index in _evenly(indices, share))


def _evenly(items: Sequence[_Item], number: int) -> list[_Item]:
    number = min(number, len(items))
    return [items[k * len(items) // number] for k in range(number)]


def file_of_row(row_id: str) -> str:
    """Return the file in the id of a conversation, ``rows.jsonl`` for ``rows.jsonl:7``; empty for other ids."""
    match = _ROW_OF_FILE.fullmatch(row_id)
    return match[1] if match else ""


def describe_row(row_id: str, paths: Sequence[str]) -> str:
    """Name a conversation's row as messages do: ``rows.jsonl, row 7`` for ``2/rows.jsonl:7``.

    The number before ``/`` is that of a source after the first; ``paths`` are those of the sources, in order.
    """
    match = _ROW_OF_FILE.fullmatch(row_id)
    if not match or not paths:
        return row_id
    label, row = match.groups()
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
