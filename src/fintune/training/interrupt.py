"""Ctrl-C during training: finish the current step, write a checkpoint, then stop.

Before the first step, and on several GPUs, a signal ends the training at once as it ends any stage.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fintune.training import checkpoints, distributed
from fintune.util.console import say
from fintune.util.signals import Terminated

_SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


class StopAfterStep:
    """A request to write a checkpoint and stop after the current step."""

    is_requested = False
    kind: type[KeyboardInterrupt] = KeyboardInterrupt


@contextmanager
def stopping_after_step(request: StopAfterStep, folder: Path) -> Iterator[None]:
    """Within the block, the first SIGINT or SIGTERM requests a stop after the step; the second one stops at once.

    Args:
        request: The recorder of :func:`fintune.training.callbacks.make_recorder` obeys it.
        folder: Folder of the checkpoints.

    Raises:
        KeyboardInterrupt: After the block, if a stop was requested. The message says where the next attempt resumes.
    """
    handlers: dict[signal.Signals, Any] = {}
    printers: list[threading.Thread] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        request.kind = _SIGNALS[signal.Signals(number)]
        if request.is_requested:
            raise request.kind
        request.is_requested = True
        # Printed from a thread: the signal may have come during a write to the same stream.
        name = signal.Signals(number).name
        message = f"{name}: stopping after this step, with a checkpoint (a second signal stops at once)"
        printers.append(threading.Thread(target=say, args=(message,), daemon=True))
        printers[-1].start()

    if distributed.world_size() == 1 and threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
        if request.is_requested:
            raise request.kind
    except KeyboardInterrupt as error:
        raise type(error)(_resume_message(folder)) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for printer in printers:
            printer.join()


def _resume_message(folder: Path) -> str:
    complete = checkpoints.complete_checkpoints(folder)
    if not complete:
        return "interrupted before the first checkpoint; rerunning the same command starts again"
    return f"interrupted; rerun the same command to resume from step {checkpoints.step_of(complete[-1])}"
