"""The growing predictions.jsonl: safe against interruptions, and never with predictions of two models in one file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from fintune.errors import ArtifactError
from fintune.records import Prediction
from fintune.util.files import read_json, write_atomically
from fintune.util.text import first_line

_SYNC_SECONDS = 5.0
_CHANGES = {"prompts": "other questions or prompts"}
"""Descriptions of changed key parts; the default is "another NAME"."""


class PredictionLog:
    """A resumable JSON Lines file of predictions.

    Args:
        path: The file. ``NAME.key.json`` beside it holds the key.
        key: What the predictions depend on: model, prompts, decoding.

    Attributes:
        path: The file.
        done: Predictions in the file by the id of their example.

    Raises:
        ArtifactError: The file was started with another key, or contains a line that is not a prediction.
    """

    def __init__(self, path: Path, key: Mapping[str, str]) -> None:
        self.path, self._key_path = path, path.with_suffix(".key.json")
        self._check_key(dict(key))
        self.done: dict[str, Prediction] = {prediction.id: prediction for prediction in self._read()}
        self._file = path.open("a", encoding="utf-8")
        self._synced = time.monotonic()

    def append(self, prediction: Prediction) -> None:
        """Add a line. The operating system has it at once, the disk after at most some seconds."""
        self._file.write(prediction.model_dump_json() + "\n")
        self._file.flush()
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()
        self.done[prediction.id] = prediction

    def sync(self) -> None:
        """Flush the appended lines to the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Flush everything to the disk and close the file."""
        self.sync()
        self._file.close()

    def _check_key(self, key: dict[str, str]) -> None:
        if self._key_path.exists():
            old = read_json(self._key_path, ArtifactError)
            changed = [name for name in sorted(key.keys() | old.keys()) if key.get(name) != old.get(name)]
            if changed:
                changes = ", ".join(_CHANGES.get(name, f"another {name}") for name in changed)
                raise ArtifactError(
                    f"{self.path} was started with {changes}",
                    hint="remove the folder, or rerun the stage with --redo",
                )
        elif self.path.exists():
            raise ArtifactError(f"{self.path} does not say which model it is from", hint="remove the file")
        write_atomically(self._key_path, json.dumps(key, indent=1))

    def _read(self) -> list[Prediction]:
        if not self.path.exists():
            return []
        whole, newline, torn = self.path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self.path, len(whole) + len(newline))
        try:
            return [Prediction.model_validate_json(line) for line in whole.split(b"\n") if line]
        except ValidationError as error:
            raise ArtifactError(
                f"{self.path} contains a line that is not a prediction ({first_line(error)})", hint="remove the file"
            ) from None
