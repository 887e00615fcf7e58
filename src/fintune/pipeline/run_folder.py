"""A run's folder in the place of its configuration: the options that its manifests hold."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from fintune.config import MODE_SEPARATOR
from fintune.config.load import fields
from fintune.errors import ArtifactError
from fintune.manifest import MANIFEST, Manifest


def overrides_of(folder: Path, *, with_data: bool = False) -> list[str]:
    """The options that a run was made with, as overrides; those that can change no result have their defaults.

    Args:
        folder: ``runs/NAME``, or ``run`` of what an older command made.
        with_data: Whether the options of the data are needed, which ``prepare`` alone keeps.

    Raises:
        ArtifactError: It holds no finished stage, none that tells the data, or a manifest that cannot be read.
    """
    found: dict[str, object] = {}
    predicted = [path for path in folder.glob(f"predict/*/{MANIFEST}") if MODE_SEPARATOR not in path.parent.name]
    for path in sorted([*folder.glob(f"*/{MANIFEST}"), *predicted]):  # a kind's name means its first mode
        try:
            found |= Manifest.model_validate_json(path.read_bytes()).key.options
        except (OSError, ValidationError) as error:
            raise ArtifactError(f"{path}: not a manifest ({str(error).splitlines()[0]})") from None
    if not found:
        raise ArtifactError(f"{folder} holds no finished stage", hint="name a run's folder or its configuration file")
    if with_data and "data.source" not in found:
        raise ArtifactError(
            f"{folder} has no result of prepare, so what its data are is not known",
            hint="put it back, or name the run's configuration file",
        )
    known = {key for key, _ in fields()}
    options = [f"{key}={json.dumps(value)}" for key, value in found.items() if key in known and value is not None]
    place = folder.resolve()
    return [*options, f"run.name={json.dumps(place.name)}", f"run.dir={json.dumps(str(place.parent))}"]
