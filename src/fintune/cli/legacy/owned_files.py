"""Which files of a folder the finance commands laid out, and may therefore replace or remove.

The record lies hidden in the folder. A file counts as laid out while it has the size and time that it was given then,
or, in a folder that was copied without its times, the same content; what else the user put in its place is the user's.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fintune.util.files import sha256_file, write_atomically

NAME = ".fintune-outputs"
HASHED_BYTES = 64 * 2**20
"""Larger files are told by size and time alone: the run's own lies there to be compared with."""


class _Entry(BaseModel):
    """A file.

    Attributes:
        kind: What it is part of: adapter, tokenizer, merged, gguf.
        made_from: What tells whether it would be made the same again; empty where its content is compared.
        stamps: Size in bytes and time of change in nanoseconds; two where one is about to replace the other.
        digests: SHA-256 of those that are small enough; older records have none.
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    made_from: str
    stamps: tuple[tuple[int, int], ...]
    digests: tuple[str, ...] = ()


class _Entries(BaseModel):
    files: dict[str, _Entry]


class Record:
    """The record of one folder, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        try:
            self._files = _Entries.model_validate_json(self.path.read_bytes()).files
        except (OSError, ValidationError):  # none, or damaged: then nothing is known to be ours
            self._files = {}

    def owns(self, path: Path) -> bool:
        """Whether the file that lies there is one that was laid out."""
        entry = self._files.get(path.name)
        if entry is None or path.is_symlink() or not path.is_file():
            return False
        return _stamp(path) in entry.stamps or (_same_size(path, entry) and _digest(path) in entry.digests)

    def owned(self, kind: str) -> list[Path]:
        """The files of a kind that lie there as they were laid out."""
        paths = (self.path.parent / name for name, entry in self._files.items() if entry.kind == kind)
        return sorted(path for path in paths if self.owns(path))

    def is_whole(self, kind: str, made_from: str, last: str) -> bool:
        """Whether all of a kind lies there, made from this.

        Args:
            kind: Of the files.
            made_from: As it was given to :meth:`add`.
            last: Name of the file that is laid out last.
        """
        entries = {name: entry for name, entry in self._files.items() if entry.kind == kind}
        there = {path.name for path in self.owned(kind)}
        same = all(entry.made_from == made_from for entry in entries.values())
        return last in entries and same and there == entries.keys()

    def add(self, path: Path, *, as_in: Path, kind: str, made_from: str = "") -> None:
        """Note a file that is about to get its name.

        Args:
            path: Its name.
            as_in: The file itself, under the name that it has until then.
            kind: What it is part of.
            made_from: See :meth:`is_whole`.
        """
        files = [as_in]
        if path != as_in and self.owns(path):  # an interruption may leave either of the two there
            files.append(path)
        entry = _Entry(
            kind=kind,
            made_from=made_from,
            stamps=tuple(dict.fromkeys(map(_stamp, files))),
            digests=tuple(dict.fromkeys(digest for file in files if (digest := _digest(file)))),
        )
        if self._files.get(path.name) != entry:
            self._files[path.name] = entry
            self._write()

    def remove(self, path: Path) -> None:
        """Delete a file that was laid out."""
        path.unlink()
        del self._files[path.name]
        self._write()

    def _write(self) -> None:
        write_atomically(self.path, _Entries(files=self._files).model_dump_json())


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _same_size(path: Path, entry: _Entry) -> bool:
    return path.stat().st_size in {size for size, _ in entry.stamps}


def _digest(path: Path) -> str | None:
    return sha256_file(path) if path.stat().st_size < HASHED_BYTES else None
