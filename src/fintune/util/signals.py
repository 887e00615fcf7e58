"""SIGTERM handled like Ctrl-C, so that a stopped job removes what it was writing and ends its child processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RESUME_MESSAGE = "interrupted; run the same command again to resume"


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: a scheduler or a container runtime stops the job."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise :class:`Terminated` in the main thread if SIGTERM arrives during the block.

    A handler that is already set stays. A fork, such as a data worker, still ends on SIGTERM.

    Raises:
        Terminated: SIGTERM arrived.
    """
    owner = os.getpid()

    def handle(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Terminated

    is_free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def interrupt_message(message: str) -> Iterator[None]:
    """Add a message to an interruption of the block that carries none yet.

    Args:
        message: What became of the work, and what the same command does.

    Raises:
        KeyboardInterrupt: The interruption, of the class that arrived.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error):
            raise
        raise type(error)(message) from None
