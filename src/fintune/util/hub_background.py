"""Pushes beside other work: what is saved now is sent by a thread, and no failure of it stops anything."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fintune.errors import FintuneError
from fintune.util.console import say
from fintune.util.hub import Target, Upload, files_of, full_name, send

END_SECONDS = 600.0
"""How long :meth:`BackgroundPush.finish` waits."""
GOES_ON = "{label} was not pushed, and training goes on: {error}"
"""How a failure is told while training is at work."""


@dataclass(frozen=True)
class _Saved:
    folder: Path
    label: str
    failure: str


class BackgroundPush:
    """Sends one snapshot at a time; of those that wait, the newest alone.

    Args:
        target: Where to; its name may lack the owner.
        below: Folder in the repository.
    """

    def __init__(self, target: Target, below: str = "") -> None:
        self._target, self._below = target, below
        self._lock = threading.Lock()
        self._waiting: _Saved | None = None
        self._thread: threading.Thread | None = None

    def push(self, save: Callable[[Path], None], label: str, failure: str = GOES_ON) -> None:
        """Save a snapshot and let it be sent.

        Args:
            save: Writes the files into a folder of that name, which it makes.
            label: What the snapshot is, for the commit and for messages.
            failure: The line on a failure, with places for ``{label}`` and ``{error}``.
        """
        place: Path | None = None
        try:
            place = Path(tempfile.mkdtemp(prefix="fintune-push-"))
            save(place / "files")
        except Exception as error:  # no room is an OSError to one library and an error of its own to another
            if place is not None:
                shutil.rmtree(place, ignore_errors=True)
            say(failure.format(label=label, error=f"it could not be saved ({_why(error)})"))
            return
        with self._lock:
            if self._waiting is not None:
                shutil.rmtree(self._waiting.folder, ignore_errors=True)
                say(f"{self._waiting.label} was not pushed: an earlier one is still on its way, and {label} is newer")
            self._waiting = _Saved(place, label, failure)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="fintune-push", daemon=True)
                self._thread.start()

    def finish(self, seconds: float = END_SECONDS) -> None:
        """Wait until all is sent, so long at most."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(seconds)
            if thread.is_alive():
                say(f"the last push to {self._target.repo} is not done after {seconds:g} s and is given up")

    def _work(self) -> None:
        while True:
            with self._lock:
                saved, self._waiting = self._waiting, None
                if saved is None:
                    self._thread = None
                    return
            try:
                self._send(saved)
            except FintuneError as error:
                say(saved.failure.format(label=saved.label, error=error))
            except Exception as error:  # a thread that ended would push no later one either, without a word
                # Its kind alone: the text of a client's error may hold the request's headers, and so the token.
                say(saved.failure.format(label=saved.label, error=type(error).__name__))
            finally:
                shutil.rmtree(saved.folder, ignore_errors=True)

    def _send(self, saved: _Saved) -> None:
        self._target = replace(self._target, repo=full_name(self._target.repo))
        below = f"{self._below}/" if self._below else ""
        uploads = [Upload(f"{below}{each.name}", each.path) for each in files_of(saved.folder / "files")]
        # The library tries each request again by itself; a network that is away for longer has until the next one.
        done = send(self._target, uploads, message=saved.label, pauses=())
        say(f"{saved.label} pushed: {done.address}")


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # SafetensorError tells what the disk said. Of others the kind alone, see `_work`.
    named = isinstance(error, FintuneError) or type(error).__module__.partition(".")[0].startswith("safetensors")
    return " ".join(str(error).split()) if named else type(error).__name__
