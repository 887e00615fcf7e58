"""The folder of a stage: what its result depends on, whether it is up to date, and how it becomes final.

A stage works in ``runs/NAME/.work/STEP``. At the end ``manifest.json`` is written there, and the folder is renamed to
``runs/NAME/STEP``. So a folder with its final name is always complete, and an interrupted stage never looks complete.
``key.json`` in the work folder says what the unfinished work is for. Work that holds a manifest is finished: only its
renaming was interrupted, and :meth:`Slot.finalize` completes that.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fintune.errors import ArtifactError
from fintune.util.files import flush_folder, flush_to_disk, sha256_file, write_atomically
from fintune.util.text import first_line

MANIFEST = "manifest.json"
KEY = "key.json"
WORK = ".work"
_MAX_CHARACTERS = 120
"""Characters of a value that a message shows."""

Facts = dict[str, Any]
"""What a stage reports: counts and figures, as JSON values."""


class Key(BaseModel):
    """What a stage's result depends on.

    Attributes:
        options: Values by dotted key that can change the result.
        sources: Fingerprints of things outside the run (data files, base model), by option name.
        inputs: Digests of the stages that this one reads, by step name.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: str
    options: dict[str, Any]
    sources: dict[str, str]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """The hash of all fields."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def with_values_of(self, old: Key | None, names: Collection[str]) -> Key:
        """Return this key with the values of ``old`` for the named options, which then make no difference."""
        kept = {name: old.options[name] for name in names if name in old.options} if old is not None else {}
        return self.model_copy(update={"options": self.options | kept})

    def differences(self, old: Key) -> list[str]:
        """Return what the user changed since ``old``, one phrase a change; changed inputs are not named here."""
        changes = []
        for name in sorted(self.options.keys() | old.options.keys()):
            changes += _changes(name, old.options.get(name), self.options.get(name))
        for name in sorted(self.sources.keys() | old.sources.keys()):
            if self.sources.get(name) != old.sources.get(name):
                changes.append(f"the content of {name} changed")
        return changes


class Manifest(BaseModel):
    """The content of ``manifest.json``.

    Attributes:
        key: What the result depends on.
        outputs: SHA-256 of each file, by path below the folder.
        output_bytes: Size of each file, likewise; empty in a manifest of an earlier version.
        facts: Counts and figures that the stage reported.
        commit: Commit of this package's checkout, with ``+`` if files differ from it; None outside a checkout.
        seconds: Wall time of the last attempt.
        peak_memory_bytes: Largest resident memory of the process during the last attempt.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: Key
    fingerprint: str
    outputs: dict[str, str]
    output_bytes: dict[str, int] = {}
    facts: Facts
    versions: dict[str, str]
    commit: str | None
    machine: dict[str, str]
    seed: int
    finished: str
    seconds: float
    peak_memory_bytes: int

    @property
    def digest(self) -> str:
        """The identity of the outputs: two runs that wrote the same bytes have the same digest."""
        return hashlib.sha256(json.dumps(self.outputs, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """The outcome of one step: "done", "up to date" or "skipped"."""

    step: str
    what: str
    seconds: float
    facts: Facts


State = Literal["missing", "unfinished", "up to date", "inputs changed", "changed"]


@dataclass(frozen=True)
class Slot:
    """The folder of one step below a run's folder."""

    run: Path
    step: str

    @property
    def folder(self) -> Path:
        """The finished folder."""
        return self.run / self.step

    @property
    def work(self) -> Path:
        """The folder of unfinished work."""
        return self.run / WORK / self.step.replace("/", "-")

    def manifest(self) -> Manifest | None:
        """Return the manifest of the finished result, or None. Touches nothing.

        Raises:
            ArtifactError: A manifest that cannot be read.
        """
        for path in (self.work / MANIFEST, self.folder / MANIFEST):
            try:
                return Manifest.model_validate_json(path.read_bytes())
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValidationError) as error:
                raise ArtifactError(
                    f"{path}: not a manifest ({first_line(error)})", hint=f"rerun the stage with --redo {self.step}"
                ) from None
        return None

    def unfinished(self) -> Key | None:
        """Return the key of the unfinished work, or None if there is none."""
        try:
            return Key.model_validate_json((self.work / KEY).read_bytes())
        except (OSError, ValidationError):
            return None

    def state(self, key: Key, may_change: Collection[str] = ()) -> tuple[State, list[str]]:
        """Compare the result on disk with what it should depend on; the options ``may_change`` are not compared.

        Returns:
            The state and, if that is "changed", what the user changed.
        """
        manifest = self.manifest()
        if manifest is None:
            return ("unfinished" if self.unfinished() else "missing"), []
        key = key.with_values_of(manifest.key, may_change)
        if manifest.key == key:
            return "up to date", []
        changes = key.differences(manifest.key)
        return ("changed", changes) if changes else ("inputs changed", [])

    def damage(self) -> str:
        """Describe the first file of the finished result that is missing or has another size; "" if none is."""
        manifest = self.manifest()
        if manifest is None:
            return ""
        folder = self.work if (self.work / MANIFEST).exists() else self.folder
        for name in manifest.outputs:
            try:
                num_bytes = (folder / name).stat().st_size
            except OSError:
                return f"{folder / name} is missing"
            if num_bytes != manifest.output_bytes.get(name, num_bytes):
                return f"{folder / name} has {num_bytes:,} bytes instead of {manifest.output_bytes[name]:,}"
        return ""

    def verify(self, is_read: Callable[[str], bool]) -> None:
        """Compare the content of the files that a step is about to read with the manifest.

        Raises:
            ArtifactError: A file is missing or was changed.
        """
        manifest, damage = self.manifest(), self.damage()
        for name, digest in manifest.outputs.items() if manifest is not None else ():
            if not damage and is_read(name) and sha256_file(self.folder / name) != digest:
                damage = f"{self.folder / name} was changed after {self.step} wrote it"
        if damage:
            raise ArtifactError(damage, hint=f"rerun the stage with --redo {self.step}")

    def start(self, key: Key, *, resume: bool, may_change: Collection[str] = ()) -> Path:
        """Make the work folder and return it; with ``resume``, keep unfinished work for the same key."""
        unfinished = self.unfinished()
        if self.work.exists() and not (resume and unfinished == key.with_values_of(unfinished, may_change)):
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        write_atomically(self.work / KEY, key.model_dump_json(indent=1))
        return self.work

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest and give the folder its final name, replacing an older result."""
        flush_folder(self.work)  # a manifest that survives a power cut must not vouch for files that do not
        write_atomically(self.work / MANIFEST, manifest.model_dump_json(indent=1))
        self.finalize()

    def finalize(self) -> None:
        """Rename finished work. If this is interrupted at any point, the next call completes it.

        Only the process that holds the run's lock may call this.
        """
        old = self.work.with_name(f"{self.work.name}.old")
        if (self.work / MANIFEST).exists():
            (self.work / KEY).unlink(missing_ok=True)
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(old, ignore_errors=True)
            if self.folder.exists():
                self.folder.replace(old)
            self.work.replace(self.folder)
            flush_to_disk(self.folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, except manifest and key, by path below the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    own = (folder / MANIFEST, folder / KEY)
    return {str(path.relative_to(folder)): sha256_file(path) for path in files if path not in own}


def _changes(name: str, was: Any, now: Any) -> list[str]:
    """Describe how two JSON values differ, entry by entry if they are lists of settings."""
    if was == now:
        return []
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            change
            for key in sorted(was.keys() | now.keys())
            for change in _changes(f"{name}.{key}", was.get(key), now.get(key))
        ]
    if isinstance(was, list) and isinstance(now, list) and any(isinstance(entry, dict) for entry in (*was, *now)):
        if len(was) != len(now):
            entries = "1 entry" if len(was) == 1 else f"{len(was)} entries"
            return [f"{name} had {entries} and now has {len(now)}"]
        pairs = enumerate(zip(was, now, strict=True))
        return [change for number, pair in pairs for change in _changes(f"{name}[{number}]", *pair)]
    return [f"{name} was {_short(was)} and is now {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 4]} ..."
