"""The label of an answer that stands alone: whether it is desired, as KTO learns from (arXiv 2402.01306)."""

from __future__ import annotations

import difflib
import math

from fintune.data.rows import BrokenRowError

_WORDS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_MEANT = "write true for a desired answer and false for an undesired one"
_ELSE = "where the column says something else, name the source's format, as format: prompt_completion"


def label_of(value: object) -> bool:
    """A label as a truth value: true and false, 0 and 1, also as text in any case.

    Args:
        value: As it was parsed.

    Raises:
        BrokenRowError: It is missing or anything else. Words of praise are refused, since which of them is the good one
            is a guess.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BrokenRowError("no label", "missing or empty", field="label", hint=_MEANT)
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        if value in (0, 1):
            return value == 1
        if isinstance(value, float) and math.isnan(value):
            raise BrokenRowError("no label", "missing or empty", field="label", hint=_MEANT)
        # Of an integer that no float can hold, the first digits.
        told = f"{value:g} is no label" if isinstance(value, float) else f"{value!s:.40} is no label"
        hint = f"{_MEANT}, of a rating by a threshold; {_ELSE}"
        raise BrokenRowError("bad label", told, field="label", hint=hint)
    if not isinstance(value, str):
        raise BrokenRowError("bad label", "holds more than one value", field="label", hint=_MEANT)
    word = value.strip().casefold()
    if word in _WORDS:
        return _WORDS[word]
    near = difflib.get_close_matches(word, ("true", "false"), n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else f"{_MEANT}; {_ELSE}"
    raise BrokenRowError("bad label", f"{value!r:.40} is no label", field="label", hint=hint)
