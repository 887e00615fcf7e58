"""Which files a path in ``data.sources`` means."""

from __future__ import annotations

import glob
from pathlib import Path

from fintune.config import SourceOptions
from fintune.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Files that are read in a folder, also with ``.gz`` behind."""
WORKBOOKS = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers")
"""Files of spreadsheet programs, which are not read."""
_KNOWN = f"known are {' '.join(SUFFIXES)}, also .gz"
_NO_DATA = ("readme", "license", "licence", "copying", "makefile", "dockerfile")
"""Files beside the data, of which nobody thinks that they are rows."""
_NUM_NAMED = 5


def find(path: str) -> list[Path]:
    """The files or the saved dataset that a path names: itself, what a pattern matches, what a folder holds.

    Raises:
        DataError: There is none.
    """
    named = Path(path).expanduser()
    if named.is_file() or is_saved_dataset(named):
        return [named]
    if named.is_dir():
        found = [each for each in _visible(named) if suffix_of(each) in SUFFIXES]
        if not found:
            raise DataError(f"the folder holds no data file{_but(named)}", path=path, hint=_KNOWN)
        return found
    matched = sorted(Path(each) for each in glob.glob(str(named), recursive=True))  # noqa: PTH207 - may be absolute
    if files := [each for each in matched if each.is_file()]:
        return files
    raise DataError("no such file or folder", path=path, hint=_instead(path))


def unread(path: str) -> str:
    """What a folder holds beside its data, for the user; empty where nothing is worth a word, and for all but folders.

    Args:
        path: As in an entry of ``data.sources``.
    """
    named = Path(path).expanduser()
    others = _others(named) if named.is_dir() and not is_saved_dataset(named) else []
    if not others:
        return ""
    files = "1 file" if len(others) == 1 else f"{len(others):,} files"
    return f"{files} not read: {_named(named, others)} ({_KNOWN})"


def _visible(folder: Path) -> list[Path]:
    below = sorted(each for each in folder.rglob("*") if each.is_file())
    return [each for each in below if not any(part.startswith(".") for part in each.relative_to(folder).parts)]


def _others(folder: Path) -> list[Path]:
    found = (each for each in _visible(folder) if suffix_of(each) not in SUFFIXES)
    # A text that is called readme.txt may well be meant as data.
    return [each for each in found if suffix_of(each) == ".txt" or not each.name.lower().startswith(_NO_DATA)]


def _but(folder: Path) -> str:
    others = _others(folder)
    return f", only {_named(folder, others)}" if others else ""


def _named(folder: Path, files: list[Path]) -> str:
    more = f" and {len(files) - _NUM_NAMED:,} more" if len(files) > _NUM_NAMED else ""
    return ", ".join(each.relative_to(folder).as_posix() for each in files[:_NUM_NAMED]) + more


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
    if path.endswith("/"):
        return f"put files there, or set data.sources=YOUR_FILE{tried(path)}"
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
