"""Memory of this process: measured, released, and one clear error when it runs out.

torch raises ``torch.OutOfMemoryError`` for a GPU and a plain ``RuntimeError`` for the CPU's allocator, cuBLAS and other
devices. Python and numpy raise ``MemoryError``.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fintune.errors import ResourceError

_SIGNS = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cannot allocate memory|_ALLOC_FAILED", re.IGNORECASE
)
_PREFIX_OF_TORCH = re.compile(r"^\[enforce fail at [^\]]*\]\s*(?:err == 0\.\s*)?")
_NUM_CHARACTERS = 160


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device; torch need not be loaded."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and _SIGNS.search(str(error)) is not None


@contextmanager
def advice_on_memory(advice: str | Callable[[], str | None], *, during: str = "") -> Iterator[None]:
    """Turn an out-of-memory error of the block into one line with advice; other errors pass.

    Args:
        advice: What to change, as the hint says it. A function is called only when memory has run out.
        during: What was running, such as "decoding".

    Raises:
        ResourceError: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        doing = f" while {during}" if during else ""
        lines = str(error).strip().splitlines()
        reason = _PREFIX_OF_TORCH.sub("", lines[0])[:_NUM_CHARACTERS].rstrip() if lines else ""
        hint = advice if isinstance(advice, str) else advice()
        raise ResourceError(f"out of memory{doing}" + (f" ({reason})" if reason else ""), hint=hint) from None


def release_memory() -> None:
    """Release what a finished stage no longer uses: cycles of Python, free blocks of glibc, the GPU's cache.

    glibc keeps freed blocks below 32 MB. After training the built-in model, 5 GB of them stayed with the process while
    the next stages loaded their models.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reset_peak_memory() -> None:
    """Reset the peak of :func:`peak_memory_bytes` if the kernel allows it (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process since the last reset (Linux) or its start (elsewhere)."""
    if (peak := _linux_status_bytes("VmHWM")) is not None:
        return peak
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory_bytes() -> int:
    """Return the resident memory of this process, or its peak if the system does not report it."""
    resident = _linux_status_bytes("VmRSS")
    return peak_memory_bytes() if resident is None else resident


def _linux_status_bytes(field: str) -> int | None:
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
    return None
