"""One look for all progress: a rich bar on a terminal, a line now and then where output goes to a file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

console = Console(stderr=True, highlight=False)
"""Where progress and messages go; results go to standard output."""

QUIET_SECONDS = 15.0
"""Seconds between lines where the output is no terminal."""


class Bar(Protocol):
    """What a step may say while it works."""

    def advance(self, amount: float = 1) -> None:
        """So many more units are done."""

    def note(self, text: str) -> None:
        """Replace the remark behind the bar, such as the current loss."""


class _RichBar:
    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1) -> None:
        self._progress.advance(self._task, amount)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)  # type: ignore[arg-type]


class _LineBar:
    def __init__(self, description: str, total: float | None) -> None:
        self._description, self._total, self._done, self._note = description, total, 0.0, ""
        self._last = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last >= QUIET_SECONDS:
            self._last = now
            total = f"/{self._total:g}" if self._total else ""
            console.print(f"  {self._description} {self._done:g}{total} {self._note}".rstrip())

    def note(self, text: str) -> None:
        self._note = text


@contextmanager
def bar(description: str, total: float | None = None, *, done: float = 0) -> Iterator[Bar]:
    """A progress bar for the length of the block.

    Args:
        description: Two or three words.
        total: Number of units, or None where it is not known.
        done: Units that an earlier, interrupted attempt has done.
    """
    if not console.is_terminal:
        line = _LineBar(description, total)
        line.advance(done)
        yield line
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total, completed=done, note="")  # type: ignore[arg-type]
        yield _RichBar(progress, task)


def track(items: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """Iterate with a bar."""
    with bar(description, total) as shown:
        for item in items:
            yield item
            shown.advance()
