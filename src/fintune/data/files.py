"""Local data files: which files a path in ``data.sources`` names, and the text of a JSON file, plain or gzip."""

from __future__ import annotations

import glob
import re
import zlib
from pathlib import Path

from fintune.config import SourceOptions
from fintune.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
"""Suffixes of the files that are read in a folder, also with ``.gz`` after them."""
WORKBOOKS = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers")
"""Suffixes of spreadsheet programs' files, which are not read."""
KNOWN_SUFFIXES = f"the known suffixes are {' '.join(SUFFIXES)}, also with .gz"
"""The hint of a message about a file of another kind."""
COPY_AGAIN = "copy or download it again"
"""The hint of a message about a damaged file."""
_BESIDE_DATA = ("_success", "readme", "license", "licence", "copying", "makefile", "dockerfile")
"""Beginnings of the names of files that nobody takes for data."""
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files of other programs beside data, which describe it."""
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Words in names of files and folders by the split that they mean, as on the hub."""
_NUM_NAMED = 5
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 16


def find_files(path: str) -> list[Path]:
    """Find the data files that a path means: itself, the matches of a pattern, or the files of a folder.

    A folder that ``datasets.save_to_disk`` wrote counts as one file, also below the path.

    Raises:
        DataError: There is no such file.
    """
    target = Path(path).expanduser()
    if target.is_file() or is_saved_dataset(target):
        return [target]
    if target.is_dir():
        files, others = _divide(target)
        if not files:
            only = f", only {_list_names(target, others)}" if others else ""
            raise DataError(f"the folder holds no data file{only}", path=path, hint=KNOWN_SUFFIXES)
        return files
    matches = sorted(Path(match) for match in glob.glob(str(target), recursive=True))  # noqa: PTH207 - may be absolute
    if files := [match for match in matches if match.is_file() or is_saved_dataset(match)]:
        return files
    raise DataError("no such file or folder", path=path, hint=_missing_hint(path))


def find_split_files(path: str, split: str = "") -> list[tuple[Path, bool]]:
    """Find the data files of a split, each with whether it is for evaluation by its name.

    Args:
        path: A file, folder or pattern.
        split: ``train``, ``validation`` or ``test``: only files of this name. If empty, all files, of which those
            called test or validation are for evaluation, unless there are no others.

    Raises:
        DataError: There is no such file or split, or one file has no splits.
    """
    files = find_files(path)
    splits = [split_of(file, Path(path).expanduser()) for file in files]
    if not split or (len(files) == 1 and is_saved_dataset(files[0])):
        has_others = any(name in ("", "train") for name in splits)
        return [(file, has_others and name in ("validation", "test")) for file, name in zip(files, splits, strict=True)]
    chosen = [file for file, name in zip(files, splits, strict=True) if name == _SPLIT_WORDS.get(split, split)]
    if chosen:
        return [(file, False) for file in chosen]
    known = sorted({name for name in splits if name})
    hint = f"set split to {' or '.join(known)}" if known else "remove split; no file is named after one"
    raise DataError(f"has no split {split!r}", path=path, hint=hint)


def split_of(file: Path, root: Path) -> str:
    """Return the split that a file's name means, or the nearest of its folders below the root; empty if none does."""
    below = file.relative_to(root) if root.is_dir() and file != root else Path(file.parent.name, file.name)
    for part in (file.name.split(".")[0], *reversed(below.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return ""


def describe_unread(path: str) -> str:
    """Describe the files of a folder that are not read, for the user. Empty if there is nothing to say.

    Args:
        path: The path of an entry of ``data.sources``.
    """
    folder = Path(path).expanduser()
    others = _divide(folder)[1] if folder.is_dir() and not is_saved_dataset(folder) else []
    if not others:
        return ""
    files = "1 file" if len(others) == 1 else f"{len(others):,} files"
    return f"{files} not read: {_list_names(folder, others)} ({KNOWN_SUFFIXES})"


def local_files(source: SourceOptions) -> list[Path]:
    """List every local file that an entry of ``data.sources`` reads; none for a hub dataset.

    Raises:
        DataError: There is no such file.
    """
    if source.path.startswith("hub:"):
        return []
    files: list[Path] = []
    for path in find_files(source.path):
        files += sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return files


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def data_suffix(path: Path) -> str:
    """Return the suffix in lower case, without a ``.gz`` after it."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def describe_tried(path: Path | str) -> str:
    """Say where a relative path was looked for, as the end of a message. Empty for an absolute path."""
    full = Path(path).expanduser()
    return "" if full.is_absolute() else f", {full.absolute()} was tried"


def _divide(folder: Path) -> tuple[list[Path], list[Path]]:
    """Divide a folder's visible files into those with rows, and those that somebody could take for data."""
    files, others = [], []
    saved = {path.parent for name in ("state.json", "dataset_dict.json") for path in folder.rglob(name)}
    saved = {path for path in saved if is_saved_dataset(path) and not any(above in saved for above in path.parents)}
    for path in sorted((*saved, *(path for path in folder.rglob("*") if path.is_file()))):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if is_hidden or any(above in saved for above in path.parents):
            continue
        is_data = path in saved or (data_suffix(path) in SUFFIXES and path.name not in _NOT_ROWS)
        if is_data and (path in saved or path.stat().st_size):
            files.append(path)
        # A text called readme.txt may well be meant as data.
        elif data_suffix(path) == ".txt" or not path.name.lower().startswith(_BESIDE_DATA):
            others.append(path)
    return files, others


def _list_names(folder: Path, files: list[Path]) -> str:
    more = f" and {len(files) - _NUM_NAMED:,} more" if len(files) > _NUM_NAMED else ""
    return ", ".join(file.relative_to(folder).as_posix() for file in files[:_NUM_NAMED]) + more


def _missing_hint(path: str) -> str:
    tried = describe_tried(path)
    if any(letter in path for letter in "*?["):
        return f"nothing matches the pattern{tried}"
    if path.endswith("/"):
        return f"put files there, or set data.sources=YOUR_FILE{tried}"
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return f"check its name{tried}; a dataset of the hub is written hub:{path}"
    return f"check its name{tried}"


def read_text(path: Path, *, hint: str, encoding_hint: str | None = None) -> tuple[str, str | None]:
    """Read a text file, plain or gzip. Of a damaged gzip file, read what comes before the damage.

    Args:
        path: The file. Its content decides whether it is gzip, not its name.
        hint: Hint of an error about the form of the file.
        encoding_hint: Hint of an error about its encoding; ``hint`` if None.

    Returns:
        The text, which is not blank, and a description of the damage, or None.

    Raises:
        DataError: The file is missing, unreadable, empty or not UTF-8.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", path=path, hint="check its name") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", path=path) from None
    damage = None
    if data.startswith(_GZIP_MAGIC):
        data, damage = _unzip(data)
    try:
        text = data.decode("utf-8-sig", errors="strict" if damage is None else "ignore")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text (byte {error.start})", path=path, hint=encoding_hint or hint) from None
    if not text.strip():
        raise DataError(damage or "the file is empty", path=path, hint=COPY_AGAIN if damage else hint)
    return text, damage


def read_whole_text(path: Path, *, hint: str, encoding_hint: str | None = None) -> str:
    """Read a text file as :func:`read_text` does, but refuse a damaged one.

    Raises:
        DataError: The file is missing, unreadable, empty, not UTF-8 or damaged.
    """
    text, damage = read_text(path, hint=hint, encoding_hint=encoding_hint)
    if damage:
        raise DataError(damage, path=path, hint=COPY_AGAIN)
    return text


def _unzip(data: bytes) -> tuple[bytes, str | None]:
    parts: list[bytes] = []
    while data:
        unzip = zlib.decompressobj(wbits=31)
        try:
            # Chunks keep what comes before damage.
            for start in range(0, len(data), _CHUNK_BYTES):
                parts.append(unzip.decompress(data[start : start + _CHUNK_BYTES]))
                if unzip.eof:
                    break
        except zlib.error as error:
            return b"".join(parts), f"damaged gzip file ({error})"
        if not unzip.eof:
            return b"".join(parts), "truncated gzip file"
        rest = unzip.unused_data + data[start + _CHUNK_BYTES :]
        data = rest.lstrip(b"\0")
    return b"".join(parts), None
