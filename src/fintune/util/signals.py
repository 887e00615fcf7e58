"""SIGTERM as Ctrl-C: what is being written is removed, and what was started is ended, before the process ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GOES_ON = "interrupted; the same command goes on from here"


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what stops a job or a container."""


@contextmanager
def as_by_ctrl_c() -> Iterator[None]:
    """For the length of the block, SIGTERM raises :class:`Terminated` in the main thread.

    A handler that is there already stays. A fork, such as a worker, is ended by SIGTERM as ever.

    Raises:
        Terminated: It came.
    """
    owner = os.getpid()

    def end(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Terminated

    free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def told(message: str) -> Iterator[None]:
    """What an interruption of the block says, unless it knows more already.

    Args:
        message: What became of the work, and what the same command does.

    Raises:
        KeyboardInterrupt: Of the kind that came, with the message.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error):
            raise
        raise type(error)(message) from None
