"""Disk space: checked before work that needs it, and one clear error when the disk is full in the middle."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fintune.errors import ResourceError
from fintune.util.text import format_bytes


def require_space(folder: Path, needed_bytes: int, what: str, *, way_out: str = "") -> None:
    """Refuse to start what would fill the disk; ``folder`` need not exist yet.

    Args:
        folder: The folder that will be written.
        needed_bytes: How much the work will write.
        what: The work, as it follows "no space for".
        way_out: What the user can do instead of freeing space.

    Raises:
        ResourceError: Less than ``needed_bytes`` is free.
    """
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < needed_bytes:
        raise ResourceError(
            f"no space for {what}: it needs about {format_bytes(needed_bytes)} in {folder}, "
            f"{format_bytes(free)} is free",
            hint=_advice(way_out),
        )


@contextmanager
def name_full_disk(folder: Path, what: str, *, way_out: str = "") -> Iterator[None]:
    """Name the folder if the disk fills up in the block; the file system's own error does not.

    Raises:
        ResourceError: The disk, or the user's quota, is full.
    """
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise disk_full_error(folder, what, way_out=way_out) from error


def disk_full_error(folder: Path, what: str, *, way_out: str = "") -> ResourceError:
    """Return the error that :func:`name_full_disk` raises."""
    return ResourceError(f"no space for {what} in {folder}: the disk is full", hint=_advice(way_out))


def is_disk_full(error: BaseException) -> bool:
    """Whether the file system refused for lack of space."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def nearest_existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _advice(way_out: str) -> str:
    return f"free some, or {way_out}" if way_out else "free some"
