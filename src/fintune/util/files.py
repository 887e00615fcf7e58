"""Files and folders: written whole or not at all, hashed, and read as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pydantic_core
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from fintune.errors import FintuneError
from fintune.util.signals import sigterm_as_interrupt

Schema = TypeVar("Schema", bound=BaseModel)

_MAX_JSON_BYTES = 1 << 29

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
    flush_to_disk(path.parent)


def write_output(path: Path, text: str) -> None:
    r"""Write a file that the user named, as :func:`write_atomically` does; a link is followed.

    What is no regular file (a device, a FIFO, ``/dev/stdout``, the shell's ``>(...)``) is written into. Half of a
    surrogate pair, which JSON can hold and UTF-8 cannot, is written as JSON writes it, ``\ud800``.

    Raises:
        FintuneError: The file cannot be written.
    """
    content = text.encode("utf-8", errors="backslashreplace")
    is_open_file = path.absolute().parts[1:2] in (("dev",), ("proc",))  # replacing it would detach its other users
    try:
        if is_open_file or (path.exists() and not path.is_file()):
            with path.open("ab") as file:
                file.write(content)
        else:
            write_atomically(path.resolve(), content.decode("utf-8"))
    except OSError as error:
        path.resolve().with_name(f".{path.resolve().name}.tmp").unlink(missing_ok=True)
        raise FintuneError(f"{path}: cannot be written ({error.strerror or error})") from None


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, so that a power cut cannot undo them."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush every file and folder below a folder, and the folder itself."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            flush_to_disk(path)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex. An unchanged file is read once in a process."""
    stat = path.stat()
    return _sha256(path.absolute(), (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


@lru_cache(maxsize=4096)
def _sha256(path: Path, _state: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from outside, nested at most 200 levels deep.

    Raises:
        ValueError: It is no JSON (then mostly a ``json.JSONDecodeError``, which has a position), or nested deeper.
    """
    try:
        # Unlike Python's own parser, this one limits the nesting by a number, not by the interpreter's stack.
        return pydantic_core.from_json(text)
    except ValueError as error:
        if "recursion limit" in str(error):
            raise ValueError("nested more than 200 levels deep") from None
    try:
        return json.loads(text)  # it accepts half of a surrogate pair, and its errors have a position
    except RecursionError:
        raise ValueError("nested more than 200 levels deep") from None


def read_json(path: Path, error: type[FintuneError] = FintuneError) -> dict[str, Any]:
    """Read a JSON object from a file of at most 512 MB, nested at most 200 levels deep.

    Args:
        path: A JSON file.
        error: The class that is raised.

    Raises:
        FintuneError: The file is missing or unreadable, or holds no JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"more than {_MAX_JSON_BYTES:,} bytes")
        content = parse_json(path.read_bytes())
    except UnicodeDecodeError as problem:
        raise error(f"{path} cannot be read as JSON (not UTF-8 text, byte {problem.start})") from problem
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise error(f"{path} cannot be read as JSON ({reason})") from problem
    if not isinstance(content, dict):
        raise error(f"{path} holds no JSON object")
    return content


def read_json_as(path: Path, schema: type[Schema], error: type[FintuneError] = FintuneError) -> Schema:
    """Read a JSON object whose fields have the types of a pydantic model. Nothing is converted.

    Raises:
        FintuneError: As for :func:`read_json`, or a field has another type or range; the message names the first.
    """
    try:
        return schema.model_validate(read_json(path, error), strict=True)
    except ValidationError as problem:
        first = problem.errors()[0]
        field, value = ".".join(map(str, first["loc"])), repr(first["input"])[:60]
        if first["type"] == "value_error":
            raise error(f"{path}: {first['ctx']['error']}") from problem
        if first["type"] == "missing":
            raise error(f"{path}: {field} is missing", hint="copy or download the file again") from problem
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise error(f"{path}: {field[:80]} is {value}: {reason}", hint="copy or download the file again") from problem


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
        FintuneError: Something is already there, another process is writing it, or no folder can be made.
    """
    target = folder.resolve()
    replaces_empty = target.is_dir()
    if target.exists() and not (replaces_empty and not any(target.iterdir())):
        raise FintuneError(
            f"{folder}: already exists, and nothing there is overwritten", hint="name another --out, or remove it"
        )
    make_folder(target.parent)
    with sigterm_as_interrupt(), _lock_output(target, folder):
        for rest in target.parent.glob(f".{target.name}.*.part"):  # of a process that was killed: its lock is free
            shutil.rmtree(rest, ignore_errors=True)
        if replaces_empty:
            _remove_empty(target, folder)
        beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            beside.mkdir()
            with _errors_name(folder, beside):
                yield beside
            flush_folder(beside)
            beside.replace(target)
            flush_to_disk(target.parent)
        except BaseException:
            if replaces_empty:
                target.mkdir(exist_ok=True)
            raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _lock_output(target: Path, folder: Path) -> Iterator[None]:
    """Hold a folder that is being written; the lock works where process numbers do not (containers, shared volumes)."""
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FintuneError(f"{folder}: another process is writing it", hint="name another --out, or wait") from None
    except OSError as error:
        raise FintuneError(f"{folder}: cannot be made ({error.strerror or error})") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


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
