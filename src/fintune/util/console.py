"""One look for all progress: a rich bar on a terminal, a line now and then where output goes to a file."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol, TypeVar

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fintune.util.escape import visible

T = TypeVar("T")

console = Console(stderr=True, highlight=False)
"""Where progress and messages go; results go to standard output."""

QUIET_SECONDS = 15.0
"""Seconds between lines where the output is no terminal."""


SILENT_SECONDS = 60.0
"""Seconds after which a slow step says where it is though nothing has moved."""


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
    def __init__(self, description: str, total: float) -> None:
        self._description, self._total, self._done, self._note = description, total, 0.0, ""
        self._last = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last >= QUIET_SECONDS:
            self._tell(now)

    def note(self, text: str) -> None:
        self._note = text

    def tell_until(self, ended: threading.Event) -> None:
        """Say it from time to time even if nothing moves, in a thread of its own."""
        while not ended.wait(max(SILENT_SECONDS - (time.monotonic() - self._last), 0.01)):
            now = time.monotonic()
            if now - self._last >= SILENT_SECONDS:
                self._tell(now)

    def _tell(self, now: float) -> None:
        self._last = now
        say(f"{self._description} {self._done:g}/{self._total:g} {self._note}".rstrip())


class _OfBars(ProgressColumn):
    """A column that stays empty in the line of a stage, which counts nothing."""

    def __init__(self, inner: ProgressColumn) -> None:
        super().__init__()
        self._inner = inner

    def render(self, task: Task) -> RenderableType:
        return Text() if task.total is None else self._inner(task)


_live: Progress | None = None
"""The live area of the stage that is at work; rich allows one at a time."""


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Show on a terminal that a stage is at work, its bars below its name; nothing of it stays."""
    with _area() as progress:
        if progress is not None:
            progress.add_task(f"[bold]{name}", total=None, note="")
        yield


@contextmanager
def _area() -> Iterator[Progress | None]:
    """The live area, made where there is none yet; None where the output is no terminal."""
    global _live  # noqa: PLW0603 - the terminal is one, too
    if _live is not None or not console.is_terminal:
        yield _live
        return
    columns = (
        TextColumn("{task.description}"),
        _OfBars(BarColumn(bar_width=30)),
        _OfBars(MofNCompleteColumn()),
        TimeElapsedColumn(),
        _OfBars(TimeRemainingColumn()),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as _live:
        try:
            yield _live
        finally:
            _live = None


@contextmanager
def bar(description: str, total: float, *, done: float = 0, slow: bool = False) -> Iterator[Bar]:
    """A progress bar for the length of the block.

    Args:
        description: Two or three words.
        total: Number of units.
        done: Units that an earlier, interrupted attempt has done.
        slow: Whether a unit may take minutes: without a terminal, a line then comes every :data:`SILENT_SECONDS`.
    """
    with _area() as progress:
        if progress is None:
            line = _LineBar(description, total)
            line.advance(done)
            with _told_now_and_then(line) if slow else nullcontext():
                yield line
            return
        task = progress.add_task(f"  {description}", total=total, completed=done, note="")  # type: ignore[arg-type]
        try:
            yield _RichBar(progress, task)
        finally:
            progress.remove_task(task)


@contextmanager
def _told_now_and_then(line: _LineBar) -> Iterator[None]:
    ended = threading.Event()
    thread = threading.Thread(target=line.tell_until, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def say(text: str) -> None:
    """A remark of a stage: one line, however long, in which brackets are no markup."""
    console.print(visible(f"  {text}"), markup=False, soft_wrap=True)


def track(items: Iterable[T], description: str, total: float) -> Iterator[T]:
    """Iterate with a bar."""
    with bar(description, total) as shown:
        for item in items:
            yield item
            shown.advance()
