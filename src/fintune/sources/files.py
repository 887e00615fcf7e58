"""Which files a path in ``data.sources`` means."""

from __future__ import annotations

import glob
from pathlib import Path

from fintune.errors import DataError
from fintune.options import SourceOptions

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Files that are read in a folder, also with ``.gz`` behind."""


def find(path: str) -> list[Path]:
    """The files or the saved dataset that a path names: itself, what a pattern matches, what a folder holds.

    Raises:
        DataError: There is none.
    """
    named = Path(path).expanduser()
    if named.is_file() or is_saved_dataset(named):
        return [named]
    if named.is_dir():
        below = sorted(each for each in named.rglob("*") if each.is_file())
        visible = [each for each in below if not any(part.startswith(".") for part in each.relative_to(named).parts)]
        found = [each for each in visible if suffix_of(each) in SUFFIXES]
        if not found:
            raise DataError(
                "the folder holds no data file", path=path, hint=f"known are {' '.join(SUFFIXES)}, also .gz"
            )
        return found
    matched = sorted(Path(each) for each in glob.glob(str(named), recursive=True))  # noqa: PTH207 - may be absolute
    if files := [each for each in matched if each.is_file()]:
        return files
    raise DataError("no such file or folder", path=path, hint=_instead(path))


def local_files(source: SourceOptions) -> list[Path]:
    """Every file that an entry of ``data.sources`` reads here; none for a hub dataset.

    Raises:
        DataError: There is none of that name.
    """
    if source.path.startswith("hub:"):
        return []
    found = find(source.path)
    return [
        below for path in found for below in (sorted(path.rglob("*")) if path.is_dir() else [path]) if below.is_file()
    ]


def _instead(path: str) -> str:
    if any(letter in path for letter in "*?["):
        return f"nothing matches the pattern{tried(path)}"
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return f"check its name{tried(path)}; a dataset of the hub is written hub:{path}"
    return f"check its name{tried(path)}"


def tried(path: Path | str) -> str:
    """For a message: where a relative path was looked for; nothing for an absolute one."""
    full = Path(path).expanduser()
    return "" if full.is_absolute() else f", {full.absolute()} was tried"


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote it."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def suffix_of(path: Path) -> str:
    """In small letters, without a ``.gz`` behind it."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()
