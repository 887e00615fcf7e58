"""Files and folders: written whole or not at all, hashed, and read as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fintune.errors import FintuneError
from fintune.util.signals import sigterm_as_interrupt

CACHE_VARIABLE = "FINTUNE_CACHE"
ANOTHER_CACHE = f"set {CACHE_VARIABLE} to a folder on another disk"
"""What the user can do if the cache folder has no space."""


def cache_folder() -> Path:
    """Return the folder for downloads, the built-in model and hashes of large files; it is not created.

    That is the folder named by ``FINTUNE_CACHE``, else the user's cache folder of the operating system.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("fintune", appauthor=False)


def check_outputs(targets: Iterable[Path | None], inputs: Iterable[Path]) -> None:
    """Refuse output paths that cannot be meant, before an hour's work is lost to a typing error.

    Args:
        targets: Files to write; None where the user wants none.
        inputs: Files that are read, none of which may be overwritten.

    Raises:
        FintuneError: A target is a folder, its parent does not exist, it is also read, or it is named twice.
    """
    read = {path.resolve() for path in inputs}
    written: set[Path] = set()
    for target in targets:
        if target is None:
            continue
        resolved = target.resolve()
        if target.is_dir():
            raise FintuneError(f"{target}: is a folder, so no file can be written there", hint="name a file in it")
        if not target.parent.is_dir():
            raise FintuneError(f"{target}: its folder does not exist", hint="create it or name another file")
        if resolved in read:
            raise FintuneError(f"{target}: is read, and would be overwritten", hint="name another file to write")
        if resolved in written:
            raise FintuneError(f"{target}: would be written twice", hint="give each file its own name")
        written.add(resolved)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it always holds the old content or the new, never half of it.

    The text goes to a hidden file beside the target, is flushed to disk, and is renamed.
    """
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_output(path: Path, text: str) -> None:
    r"""Write a file that the user named, as :func:`write_atomically` does.

    Half of a surrogate pair, which JSON can hold and UTF-8 cannot, is written as JSON writes it, ``\ud800``.

    Raises:
        FintuneError: The file cannot be written.
    """
    try:
        write_atomically(path, text.encode("utf-8", errors="backslashreplace").decode("utf-8"))
    except OSError as error:
        path.with_name(f".{path.name}.tmp").unlink(missing_ok=True)
        raise FintuneError(f"{path}: cannot be written ({error.strerror or error})") from None


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
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


def make_folder(folder: Path) -> None:
    """Make a folder and its parents.

    Raises:
        FintuneError: The folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FintuneError(f"{folder}: cannot be made ({error.strerror or error})") from None


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into; it gets its final name when the block ends without an error.

    A failed attempt leaves nothing, and its errors name the final folder. During the block SIGTERM acts like Ctrl-C.

    Args:
        folder: The final folder, or a link to it. It must not exist, or be empty.

    Raises:
        FintuneError: Something is already there, or no folder can be made.
    """
    target = folder.resolve()
    replaces_empty = target.is_dir()
    if target.exists() and not (replaces_empty and not any(target.iterdir())):
        raise FintuneError(
            f"{folder}: already exists, and nothing there is overwritten", hint="name another --out, or remove it"
        )
    make_folder(target.parent)
    for rest in target.parent.glob(f".{target.name}.*.part"):  # of a process that was killed
        if not _is_running(rest.name.split(".")[-2]):
            shutil.rmtree(rest, ignore_errors=True)
    if replaces_empty:
        _remove_empty(target, folder)
    beside = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        with sigterm_as_interrupt(), _errors_name(folder, beside):
            try:
                beside.mkdir()
            except OSError as error:
                raise FintuneError(f"{folder}: cannot be made ({error.strerror or error})") from None
            yield beside
            beside.replace(target)
    except BaseException:
        if replaces_empty:
            target.mkdir(exist_ok=True)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _errors_name(folder: Path, beside: Path) -> Iterator[None]:
    """Let errors of the block name the folder that the user named, not the hidden one."""
    try:
        yield
    except FintuneError as error:
        for hidden, name in ((str(beside), str(folder)), (beside.name, folder.name)):
            error.message = error.message.replace(hidden, name)
            error.hint = error.hint and error.hint.replace(hidden, name)
        raise


def _remove_empty(target: Path, folder: Path) -> None:
    # Before the work: a mount point or the current folder cannot be replaced when the work is done.
    reason = "the current folder" if target == Path.cwd() else ""
    try:
        if not reason:
            target.rmdir()
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise FintuneError(f"{folder}: cannot be replaced ({reason})", hint="name a folder in it")


def _is_running(pid: str) -> bool:
    if not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
