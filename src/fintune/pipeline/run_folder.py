"""A run's folder: its lock, and the options that its manifests hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from fintune.config import MODE_SEPARATOR
from fintune.config.load import fields
from fintune.errors import ArtifactError
from fintune.manifest import MANIFEST, Manifest
from fintune.util.text import first_line


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process; make it if it does not exist.

    Raises:
        ArtifactError: Another process holds the folder, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        is_file = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "a file is in its place" if is_file else (error.strerror or str(error)).lower()
        raise ArtifactError(
            f"{folder} cannot be made: {reason}", hint="set run.dir to another folder, or run.name to another name"
        ) from None
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ArtifactError(
            f"{folder} is in use by another process", hint="wait for it, or set run.name to another name"
        ) from None


def overrides_of(folder: Path, *, with_data: bool = False) -> list[str]:
    """Return the options that a run was made with, as overrides.

    Options that can change no result are not recorded, so they have their defaults.

    Args:
        folder: ``runs/NAME``, or the run's folder of an older command.
        with_data: Whether the options of the data are needed, which only ``prepare`` records.

    Raises:
        ArtifactError: The folder holds no finished stage, none that records the data, or an unreadable manifest.
    """
    recorded: dict[str, object] = {}
    predicted = [path for path in folder.glob(f"predict/*/{MANIFEST}") if MODE_SEPARATOR not in path.parent.name]
    for path in sorted([*folder.glob(f"*/{MANIFEST}"), *predicted]):  # a kind's name alone means its first mode
        try:
            recorded |= Manifest.model_validate_json(path.read_bytes()).key.options
        except (OSError, ValidationError) as error:
            raise ArtifactError(f"{path}: not a manifest ({first_line(error)})") from None
    if not recorded:
        raise ArtifactError(f"{folder} holds no finished stage", hint="name a run's folder or its configuration file")
    if with_data and "data.source" not in recorded:
        raise ArtifactError(
            f"{folder} has no result of prepare, so its data are unknown",
            hint="put it back, or name the run's configuration file",
        )
    known = {key for key, _ in fields()}
    options = [f"{key}={json.dumps(value)}" for key, value in recorded.items() if key in known and value is not None]
    run = folder.resolve()
    return [*options, f"run.name={json.dumps(run.name)}", f"run.dir={json.dumps(str(run.parent))}"]
