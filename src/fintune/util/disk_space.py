"""Room on the disk: asked for before the work that takes it, and told in the same words where it runs out meanwhile."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fintune.errors import ResourceError
from fintune.util.system import size


def require_space(folder: Path, needed_bytes: int, what: str, *, way_out: str = "") -> None:
    """Refuse to start what would fill the disk.

    Args:
        folder: Where it will be written; need not be there yet.
        needed_bytes: How much it takes.
        what: It, as it follows "no space for".
        way_out: What else can be done than to free some.

    Raises:
        ResourceError: Less than that is free.
    """
    free = shutil.disk_usage(existing(folder)).free
    if free < needed_bytes:
        raise ResourceError(
            f"no space for {what}: it needs about {size(needed_bytes)} in {folder}, {size(free)} is free",
            hint=_advice(way_out),
        )


@contextmanager
def told_when_full(folder: Path, what: str, *, way_out: str = "") -> Iterator[None]:
    """Name the folder where the disk is full, which the error of the file system does not.

    Args:
        folder: Where all is written that is written here.
        what: As for :func:`require_space`.
        way_out: As for :func:`require_space`.

    Raises:
        ResourceError: The disk, or what the user may have of it, is full.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise full(folder, what, way_out=way_out) from error


def full(folder: Path, what: str, *, way_out: str = "") -> ResourceError:
    """What :func:`told_when_full` raises."""
    return ResourceError(f"no space for {what} in {folder}: the disk is full", hint=_advice(way_out))


def is_full(error: BaseException) -> bool:
    """Whether the file system refuses for want of room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def existing(path: Path) -> Path:
    """The path, or the nearest folder over it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _advice(way_out: str) -> str:
    return f"free some, or {way_out}" if way_out else "free some"
