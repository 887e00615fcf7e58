"""The folder of a stage: what it was made from, whether it is up to date, and how it appears all at once.

A stage works in ``runs/NAME/.work/STEP``. When it is done, ``manifest.json`` is written there last and the folder is
renamed to ``runs/NAME/STEP``; so a folder under its final name is always complete, and what an interruption leaves
behind never looks finished. Beside the work lies ``key.json``, which says what the unfinished work was for. Work that
holds a manifest is finished: only its renaming was interrupted, and :meth:`Slot.settle` makes up for that.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fintune.errors import ArtifactError
from fintune.util.files import sha256_file, write_atomically

MANIFEST = "manifest.json"
KEY = "key.json"
WORK = ".work"
_LONGEST = 120
"""Letters of a value that a message shows."""

Facts = dict[str, Any]
"""What a stage found out: counts and figures, as JSON has them."""


class Key(BaseModel):
    """What decides whether a stage's result still holds.

    Attributes:
        step: Name of the step, ``predict/merged``.
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
        """Hash over all of it."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def taking(self, old: Key | None, names: Collection[str]) -> Key:
        """This key with what ``old`` has for the named options, which then do not tell the two apart."""
        kept = {name: old.options[name] for name in names if name in old.options} if old is not None else {}
        return self.model_copy(update={"options": self.options | kept})

    def differences(self, old: Key) -> list[str]:
        """What the user changed since ``old``, one phrase each; changed inputs are not named here."""
        changes = []
        for name in sorted(self.options.keys() | old.options.keys()):
            changes += _changes(name, old.options.get(name), self.options.get(name))
        for name in sorted(self.sources.keys() | old.sources.keys()):
            if self.sources.get(name) != old.sources.get(name):
                changes.append(f"the content behind {name} has changed")
        return changes


class Manifest(BaseModel):
    """What ``manifest.json`` holds.

    Attributes:
        key: What the result was made from.
        outputs: SHA-256 of each file, by path below the folder.
        facts: Counts and figures that the stage reported.
        versions: Versions of Python and of the packages that matter.
        commit: Commit of this package's checkout, with ``+`` where files were changed; None outside a checkout.
        machine: Processor, cores, memory, GPU.
        seconds: Wall time of the last attempt.
        peak_memory_bytes: Largest resident memory of the process during the last attempt.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: Key
    fingerprint: str
    outputs: dict[str, str]
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
        """Identity of the outputs: two runs that wrote the same bytes have the same."""
        return hashlib.sha256(json.dumps(self.outputs, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What became of one step.

    Attributes:
        what: "done", "up to date" or "skipped".
    """

    step: str
    what: str
    seconds: float
    facts: Facts


State = Literal["missing", "unfinished", "up to date", "inputs changed", "changed"]


@dataclass(frozen=True)
class Slot:
    """The place of one step below a run's folder."""

    run: Path
    step: str

    @property
    def folder(self) -> Path:
        """The finished folder."""
        return self.run / self.step

    @property
    def work(self) -> Path:
        """Where unfinished work lies."""
        return self.run / WORK / self.step.replace("/", "-")

    def manifest(self) -> Manifest | None:
        """The manifest of the finished result, or None. Touches nothing.

        Raises:
            ArtifactError: A manifest that cannot be read.
        """
        for path in (self.work / MANIFEST, self.folder / MANIFEST):
            try:
                return Manifest.model_validate_json(path.read_bytes())
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValidationError) as error:
                reason = str(error).splitlines()[0]
                raise ArtifactError(
                    f"{path}: not a manifest ({reason})", hint=f"--redo {self.step} makes it anew"
                ) from None
        return None

    def unfinished(self) -> Key | None:
        """What the unfinished work was for, or None where there is none."""
        try:
            return Key.model_validate_json((self.work / KEY).read_bytes())
        except (OSError, ValidationError):
            return None

    def state(self, key: Key, may_change: Collection[str] = ()) -> tuple[State, list[str]]:
        """Compare what lies there with what is wanted.

        Args:
            key: What is wanted.
            may_change: Options that are not compared.

        Returns:
            The state and, for "changed", what the user changed.
        """
        manifest = self.manifest()
        if manifest is None:
            return ("unfinished" if self.unfinished() else "missing"), []
        key = key.taking(manifest.key, may_change)
        if manifest.key == key:
            return "up to date", []
        changes = key.differences(manifest.key)
        return ("changed", changes) if changes else ("inputs changed", [])

    def begin(self, key: Key, *, resume: bool, may_change: Collection[str] = ()) -> Path:
        """Make the work folder, keeping unfinished work for the same key where ``resume`` allows."""
        unfinished = self.unfinished()
        if self.work.exists() and not (resume and unfinished == key.taking(unfinished, may_change)):
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        write_atomically(self.work / KEY, key.model_dump_json(indent=1))
        return self.work

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest and let the folder appear under its final name, replacing an older one."""
        write_atomically(self.work / MANIFEST, manifest.model_dump_json(indent=1))
        self.settle()

    def settle(self) -> None:
        """Rename finished work; what an interruption at any point of this left behind is taken up by the next call.

        Only for the process that holds the run's lock.
        """
        old = self.work.with_name(f"{self.work.name}.old")
        if (self.work / MANIFEST).exists():
            (self.work / KEY).unlink(missing_ok=True)
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(old, ignore_errors=True)
            if self.folder.exists():
                self.folder.replace(old)
            self.work.replace(self.folder)
        shutil.rmtree(old, ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but the manifest and key, by path below it."""
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in _files(folder)
        if path.name not in {MANIFEST, KEY} or path.parent != folder
    }


def folder_bytes(folder: Path) -> int:
    """Sum of the sizes of all files below."""
    return sum(path.stat().st_size for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _changes(name: str, was: Any, now: Any) -> list[str]:
    """What differs between two values as JSON has them, entry by entry where they are lists of settings."""
    if was == now:
        return []
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            each
            for key in sorted(was.keys() | now.keys())
            for each in _changes(f"{name}.{key}", was.get(key), now.get(key))
        ]
    if isinstance(was, list) and isinstance(now, list) and any(isinstance(each, dict) for each in (*was, *now)):
        if len(was) != len(now):
            entries = "1 entry" if len(was) == 1 else f"{len(was)} entries"
            return [f"{name} had {entries} and now has {len(now)}"]
        pairs = enumerate(zip(was, now, strict=True))
        return [each for number, pair in pairs for each in _changes(f"{name}[{number}]", *pair)]
    return [f"{name} was {_short(was)} and is now {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def describe(changes: list[str]) -> str:
    """Phrases as one line, the first two in full."""
    more = f" and {len(changes) - 2} more" if len(changes) > 2 else ""
    return "; ".join(changes[:2]) + more


def read_facts(folders: Mapping[str, Path]) -> dict[str, Facts]:
    """Facts of finished steps, by step name."""
    return {
        step: Manifest.model_validate_json((folder / MANIFEST).read_bytes()).facts for step, folder in folders.items()
    }
