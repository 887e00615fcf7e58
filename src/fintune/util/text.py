"""Text for messages: sizes, durations, first lines, and control characters made harmless."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

_MAX_CHARACTERS = 300
"""Longest line that a message repeats from another library."""

_MAX_LINE = 500
MAX_REMARKS = 20
"""Remarks that are printed in full; the others are counted."""

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_REORDERING = (0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES |= {code: f"\\u{code:04x}" for code in _REORDERING}


def escape_control_chars(text: str) -> str:
    r"""Replace every control character but line feed and tab by its escape, such as ``\x1b`` or ``\u202e``.

    Text of a data file may otherwise steer the terminal that prints it, or turn the order of its letters.
    """
    return text.translate(_ESCAPES)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text in plain words, or its class name if it has no text."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        return f"{field}: {first['msg']}"[:_MAX_CHARACTERS] if field else first["msg"][:_MAX_CHARACTERS]
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text, byte {error.start}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    lines = str(error).strip().splitlines()
    return lines[0][:_MAX_CHARACTERS] if lines else type(error).__name__


def abridge_line(line: str) -> str:
    """Return a line of at most 500 letters: what happened is at its begin, and the way out at its end."""
    return line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE - 190]} ... {line[-160:]}"


def abridge_remarks(remarks: Sequence[str], source: str = "") -> list[str]:
    """Return the first remarks for the terminal, and a line that counts the others.

    Args:
        remarks: One line each.
        source: A phrase that says where all of them are; empty if they are nowhere else.
    """
    num_more = len(remarks) - MAX_REMARKS
    if num_more <= 1:
        return [escape_control_chars(remark) for remark in remarks]
    shown = map(escape_control_chars, remarks[:MAX_REMARKS])
    return [*shown, f"and {num_more} more remarks{source and f'; {source}'}"]


def format_duration(seconds: float) -> str:
    """Format seconds for people, as ``4 min 5 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_bytes(num_bytes: float) -> str:
    """Format a number of bytes for people, as ``1.3 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        digits = 0 if unit in {"B", "kB"} or round(num_bytes, 1) >= 100 else 1
        if round(num_bytes, digits) < 1000:
            return f"{num_bytes:.{digits}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.{0 if num_bytes >= 100 else 1}f} TB"
