"""Text for messages."""

from __future__ import annotations

_MAX_LETTERS = 300
"""Longest line that a message repeats from another library."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its class name if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:_MAX_LETTERS] if lines else type(error).__name__
