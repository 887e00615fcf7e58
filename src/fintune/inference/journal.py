"""predictions.jsonl while it grows: safe against interruptions, and never two models' predictions in one file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from fintune.errors import ArtifactError
from fintune.records import Prediction

_SYNC_SECONDS = 5.0
_OTHER = {"prompts": "other questions or prompts"}
"""How a part of the key is told of that is not called another one."""


class Journal:
    """Predictions that are there and room for more.

    Args:
        path: The file; beside it lies ``NAME.key.json``, which says what it is for.
        key: What the predictions depend on: model, prompts, decoding.

    Raises:
        ArtifactError: The file was begun for another key, or holds a line that is no prediction.
    """

    def __init__(self, path: Path, key: Mapping[str, str]) -> None:
        self._path, self._beside = path, path.with_suffix(".key.json")
        self._check_key(dict(key))
        self.done: dict[str, Prediction] = {each.id: each for each in self._read()}
        self._file = path.open("a", encoding="utf-8")
        self._synced = time.monotonic()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def append(self, prediction: Prediction) -> None:
        """Add a line; the operating system has it at once, the disk within some seconds."""
        self._file.write(prediction.model_dump_json() + "\n")
        self._file.flush()
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()
        self.done[prediction.id] = prediction

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Bring everything to the disk and stop writing."""
        self.sync()
        self._file.close()

    def _check_key(self, key: dict[str, str]) -> None:
        if self._beside.exists():
            old = json.loads(self._beside.read_text(encoding="utf-8"))
            changed = [name for name in sorted(key.keys() | old.keys()) if key.get(name) != old.get(name)]
            if changed:
                others = ", ".join(_OTHER.get(name, f"another {name}") for name in changed)
                raise ArtifactError(
                    f"{self._path} was begun with {others}",
                    hint="remove the folder, or run the stage with --redo",
                )
        elif self._path.exists():
            raise ArtifactError(f"{self._path} does not say which model it is from", hint="remove it")
        temporary = self._beside.with_name(f".{self._beside.name}.tmp")
        temporary.write_text(json.dumps(key, indent=1), encoding="utf-8")
        temporary.replace(self._beside)

    def _read(self) -> list[Prediction]:
        if not self._path.exists():
            return []
        whole, newline, torn = self._path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self._path, len(whole) + len(newline))
        try:
            return [Prediction.model_validate_json(line) for line in whole.split(b"\n") if line]
        except ValidationError as error:
            raise ArtifactError(
                f"{self._path} holds a line that is no prediction ({str(error).splitlines()[0]})",
                hint="remove the file",
            ) from None
