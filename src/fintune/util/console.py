"""Progress and messages: a rich bar on a terminal, a line from time to time elsewhere."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from fintune.util.text import escape_control_chars

T = TypeVar("T")


class _Escaped:
    """A renderable whose texts cannot steer the terminal: names and texts of files may hold control characters."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self._inner, options):
            yield Segment(text if control else escape_control_chars(text), style, control)


class _EscapeHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


def make_console(**settings: Any) -> Console:
    """Return a console that escapes control characters in all that it prints; it takes the arguments of rich's."""
    made = Console(**settings)
    made.push_render_hook(_EscapeHook())
    return made


console = make_console(stderr=True, highlight=False)
"""Where progress and messages go; results go to standard output."""

QUIET_SECONDS = 15.0
"""Shortest time between two progress lines if the output is no terminal."""

SILENT_SECONDS = 60.0
"""Time after which a slow step prints a line although nothing has moved."""


class Bar(Protocol):
    """What a step may report while it works."""

    def advance(self, amount: float = 1) -> None:
        """Count more units as done."""

    def note(self, text: str) -> None:
        """Replace the remark after the bar, such as the current loss."""


def show_bytes(shown: Bar) -> Callable[[int, int], None]:
    """Return a function that turns (bytes done, bytes in all) into a bar that counts to one, and shows the speed."""
    started, share = time.monotonic(), 0.0

    def progress(num_done: int, num_total: int) -> None:
        nonlocal share
        shown.advance(num_done / num_total - share)
        share = num_done / num_total
        shown.note(f"{num_done / 1e6 / max(time.monotonic() - started, 1e-3):.0f} MB/s")

    return progress


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.advance = partial(progress.advance, task)
        self._progress, self._task = progress, task

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)


class _LineBar:
    def __init__(self, description: str, total: float) -> None:
        self._description, self._total, self._done, self._note = description, total, 0.0, ""
        self._last = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last >= QUIET_SECONDS:
            self._print(now)

    def note(self, text: str) -> None:
        self._note = text

    def print_until(self, ended: threading.Event) -> None:
        """Print a line from time to time even if nothing moves; runs in its own thread."""
        while not ended.wait(max(SILENT_SECONDS - (time.monotonic() - self._last), 0.01)):
            now = time.monotonic()
            if now - self._last >= SILENT_SECONDS:
                self._print(now)

    def _print(self, now: float) -> None:
        self._last = now
        say(f"{self._description} {self._done:g}/{self._total:g} {self._note}".rstrip())


def _bars_only(column: ProgressColumn) -> ProgressColumn:
    """Leave a column empty in the line of a stage, which has no total."""
    render = column.render
    column.render = lambda task: Text() if task.total is None else render(task)  # type: ignore[method-assign]
    return column


_live: Progress | None = None
"""The live area of the running stage; rich allows one at a time."""


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Show on a terminal that a stage is running, with its bars below its name; it vanishes at the end."""
    with _area() as progress:
        if progress is not None:
            progress.add_task(f"[bold]{name}", total=None, note="")
        yield


@contextmanager
def _area() -> Iterator[Progress | None]:
    """The live area, made on first use; None if the output is no terminal."""
    global _live  # noqa: PLW0603 - there is one terminal, too
    if _live is not None or not console.is_terminal:
        yield _live
        return
    columns = (
        TextColumn("{task.description}"),
        _bars_only(BarColumn(bar_width=30)),
        _bars_only(MofNCompleteColumn()),
        TimeElapsedColumn(),
        _bars_only(TimeRemainingColumn()),
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
        done: Units that an earlier, interrupted attempt finished.
        slow: Whether a unit may take minutes. Without a terminal, a line is then printed every :data:`SILENT_SECONDS`.
    """
    with _area() as progress:
        if progress is None:
            line = _LineBar(description, total)
            line.advance(done)
            ended = threading.Event()
            thread = threading.Thread(target=line.print_until, args=(ended,), daemon=True)
            if slow:
                thread.start()
            try:
                yield line
            finally:
                ended.set()
                if slow:
                    thread.join()
            return
        task = progress.add_task(f"  {description}", total=total, completed=done, note="")  # type: ignore[arg-type]
        try:
            yield _RichBar(progress, task)
        finally:
            progress.remove_task(task)


def say(text: str) -> None:
    """Print a remark of a stage: one line of any length, in which brackets are no markup."""
    console.print(f"  {text}", markup=False, soft_wrap=True)


def track(items: Iterable[T], description: str, total: float) -> Iterator[T]:
    """Iterate with a bar."""
    with bar(description, total) as progress:
        for item in items:
            yield item
            progress.advance()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers, PEFT, TRL and accelerate in the block: the bar and metrics.jsonl report what matters."""
    from transformers.utils import logging as hf_logging

    names = ("transformers", "peft", "trl", "accelerate", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    has_bars = hf_logging.is_progress_bar_enabled()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|peft|trl|accelerate|torch)\b")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        if has_bars:
            hf_logging.enable_progress_bar()
