"""Ctrl-C while training: a checkpoint behind the current step first, then the end.

Until the first step is done, and on several GPUs, a signal ends the training as it ends any stage.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fintune.training import checkpoints, ranks
from fintune.util.console import say
from fintune.util.signals import Terminated

if TYPE_CHECKING:
    from transformers import TrainerCallback

_SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


class Stop:
    """Whether the user asked for the end."""

    asked = False
    kind: type[KeyboardInterrupt] = KeyboardInterrupt

    def callback(self) -> TrainerCallback:
        """Lets transformers' Trainer write a checkpoint behind the step, and end, where it was asked for."""
        from transformers import TrainerCallback

        stop = self

        class StopBehindStep(TrainerCallback):  # type: ignore[misc]
            """Looks behind every step."""

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if stop.asked:  # logged as well, or the losses since the last line would be lost
                    control.should_log = control.should_save = control.should_training_stop = True

        return StopBehindStep()


@contextmanager
def behind_the_step(stop: Stop, folder: Path) -> Iterator[None]:
    """For the length of the block, the first SIGINT or SIGTERM only sets ``stop.asked``; the second ends it at once.

    Args:
        stop: Whose callback the trainer has.
        folder: Of the checkpoints.

    Raises:
        KeyboardInterrupt: Behind the block, where it was asked for; says from where the next attempt goes on.
    """
    before: dict[signal.Signals, Any] = {}
    told: list[threading.Thread] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        stop.kind = _SIGNALS[signal.Signals(number)]
        if stop.asked:
            raise stop.kind
        stop.asked = True
        # From a thread, since the signal may have come amid a write to the same stream.
        what = f"{signal.Signals(number).name}: stops behind this step, with a checkpoint; once more stops at once"
        told.append(threading.Thread(target=say, args=(what,), daemon=True))
        told[-1].start()

    if ranks.count() == 1 and threading.current_thread() is threading.main_thread():
        before = {each: signal.signal(each, ask) for each in _SIGNALS}
    try:
        yield
        if stop.asked:
            raise stop.kind
    except KeyboardInterrupt as error:
        raise type(error)(_told(folder)) from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for thread in told:
            thread.join()


def _told(folder: Path) -> str:
    kept = checkpoints.complete(folder)
    if not kept:
        return "interrupted before the first checkpoint; the same command begins training anew"
    return f"interrupted; the same command goes on from step {checkpoints.step_of(kept[-1])}"
