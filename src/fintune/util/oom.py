"""Memory that runs out, on a GPU or on the CPU, as one line with what to change instead of a traceback.

torch raises ``torch.OutOfMemoryError`` for a GPU, a plain ``RuntimeError`` for the CPU's allocator and for what lies
below it (cuBLAS, another device), and Python and numpy a ``MemoryError``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fintune.errors import ResourceError

_SIGNS = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cannot allocate memory|_ALLOC_FAILED", re.IGNORECASE
)
_PLACE_IN_TORCH = re.compile(r"^\[enforce fail at [^\]]*\]\s*(?:err == 0\.\s*)?")
_NUM_CHARACTERS = 160


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device; torch need not be loaded."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and _SIGNS.search(str(error)) is not None


@contextmanager
def advice_on_memory(advice: str | Callable[[], str | None], *, during: str = "") -> Iterator[None]:
    """Within it, running out of memory is a user's error; all others pass.

    Args:
        advice: What to change, as the hint says it; a function is called only when memory has run out.
        during: What was at work, such as "decoding".

    Raises:
        ResourceError: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        doing = f" while {during}" if during else ""
        reason = _reason(error)
        hint = advice if isinstance(advice, str) else advice()
        raise ResourceError(f"out of memory{doing}" + (f" ({reason})" if reason else ""), hint=hint) from None


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return _PLACE_IN_TORCH.sub("", lines[0])[:_NUM_CHARACTERS].rstrip() if lines else ""
