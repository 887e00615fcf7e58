"""Files that a user names to be written: checked before the work, written whole or not at all; and lists of remarks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fintune.errors import FintuneError
from fintune.util import signals as stopping
from fintune.util.escape import visible

MAX_REMARKS = 20
"""So many remarks are shown; the others are counted."""


def check(targets: Iterable[Path | None], read: Iterable[Path]) -> None:
    """Refuse places that cannot be meant, before an hour's work is lost to a typing error.

    Args:
        targets: Files to write; None where none is wanted.
        read: Files that are read, none of which may be overwritten.

    Raises:
        FintuneError: A target is a folder, has none to stand in, is read as well, or is named twice.
    """
    sources = {path.resolve() for path in read}
    seen: set[Path] = set()
    for target in targets:
        if target is None:
            continue
        place = target.resolve()
        if target.is_dir():
            raise FintuneError(f"{target}: a folder, and no file can be written there", hint="name a file in it")
        if not target.parent.is_dir():
            raise FintuneError(f"{target}: its folder does not exist", hint="create it or name another file")
        if place in sources:
            raise FintuneError(f"{target}: is read, and would be overwritten", hint="name another file to write")
        if place in seen:
            raise FintuneError(f"{target}: would be written twice", hint="give each file a name of its own")
        seen.add(place)


def write_atomically(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: the file is the old one or the new one, never half of it."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, error: type[FintuneError] = FintuneError) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: A JSON file.
        error: The class that is raised.

    Raises:
        FintuneError: The file is missing or unreadable, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read as JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise error(f"{path} holds no JSON object")
    return content


def write(path: Path, text: str) -> None:
    r"""Write a file, replacing the one that was there when the new one is whole.

    Half of a surrogate pair, which JSON can hold and UTF-8 cannot, is written as JSON writes it, ``\ud800``.

    Raises:
        FintuneError: It cannot be written.
    """
    try:
        write_atomically(path, text.encode("utf-8", errors="backslashreplace").decode("utf-8"))
    except OSError as error:
        path.with_name(f".{path.name}.tmp").unlink(missing_ok=True)
        raise FintuneError(f"{path}: cannot be written ({error.strerror or error})") from None


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it stands in.

    Raises:
        FintuneError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FintuneError(f"{folder}: cannot be made ({error.strerror or error})") from None


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name when the work is done; what a failed attempt wrote is removed.

    Errors name that folder. While it is written, SIGTERM does as Ctrl-C does.

    Args:
        folder: Where it is to lie, or a link to there; nothing may be there but an empty folder, which gives way.

    Yields:
        A hidden folder beside it, to write into.

    Raises:
        FintuneError: Something is there, it cannot give way, or no folder can be made.
    """
    place = folder.resolve()
    gave_way = place.is_dir()
    if place.exists() and not (gave_way and not any(place.iterdir())):
        raise FintuneError(
            f"{folder}: exists, and nothing there is overwritten", hint="name another --out, or remove it"
        )
    make_folder(place.parent)
    for left in place.parent.glob(f".{place.name}.*.part"):  # of a process that was killed
        if not _runs(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    if gave_way:
        _remove_empty(place, folder)
    beside = place.parent / f".{place.name}.{os.getpid()}.part"
    try:
        with stopping.as_by_ctrl_c(), _named(folder, beside):
            try:
                beside.mkdir()
            except OSError as error:
                raise FintuneError(f"{folder}: cannot be made ({error.strerror or error})") from None
            yield beside
            beside.replace(place)
    except BaseException:
        if gave_way:
            place.mkdir(exist_ok=True)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _named(folder: Path, beside: Path) -> Iterator[None]:
    """What goes wrong names the folder that the user named, not the one that it was to come from."""
    try:
        yield
    except FintuneError as error:
        for hidden, name in ((str(beside), str(folder)), (beside.name, folder.name)):
            error.message = error.message.replace(hidden, name)
            error.hint = error.hint and error.hint.replace(hidden, name)
        raise


def _remove_empty(place: Path, folder: Path) -> None:
    """Before the work: a mount point and the like cannot be replaced when it is done."""
    why = "the current folder" if place == Path.cwd() else ""
    try:
        if not why:
            place.rmdir()
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        raise FintuneError(f"{folder}: cannot be replaced ({why})", hint="name a folder in it")


def _runs(pid: str) -> bool:
    if not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def abridged(remarks: Sequence[str], where: str = "") -> list[str]:
    """The first remarks for the terminal, and how many more there are.

    Args:
        remarks: A line each.
        where: Where all of them are, in words; nothing where nowhere.
    """
    num_more = len(remarks) - MAX_REMARKS
    if num_more <= 1:
        return [visible(each) for each in remarks]
    return [*map(visible, remarks[:MAX_REMARKS]), f"and {num_more} more remarks{where and f'; {where}'}"]
