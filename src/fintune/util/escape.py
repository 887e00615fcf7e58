"""Text of the data on a terminal: what would steer it is shown instead."""

from __future__ import annotations

_SHOWN = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    r"""The text with every control character but line feed and tab as its escape, ``\x1b``.

    Args:
        text: Of a row, a page or a field's name.
    """
    return text.translate(_SHOWN)
