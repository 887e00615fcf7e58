"""A file of the hub into the hub's own cache, with what an interruption left taken up by the next process.

``huggingface_hub`` goes on within one process, but throws a part away when it gives up or is stopped. So the part is
kept here, in this package's cache folder under the file's hash, and the whole file becomes the blob of the hub's cache
that ``huggingface_hub`` would have made; from then on it is the hub's.
"""

from __future__ import annotations

import os
import re
import shutil
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from fintune.errors import ResourceError
from fintune.util.console import bar
from fintune.util.disk import name_full_disk, require_space
from fintune.util.files import ANOTHER_CACHE, cache_folder, sha256_file

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from huggingface_hub import HfFileMetadata

TIMEOUT_SECONDS = 60
_SCHEME = "hf://datasets/"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ETAG = re.compile(r"[\w.-]+")
_BLOCK_BYTES = 1 << 18


def fetch(address: str) -> None:
    """Download a dataset's file into the hub's cache, unless it is there.

    Args:
        address: ``hf://datasets/OWNER/NAME@COMMIT/path``, as ``datasets`` lists them; any other is left to it.

    Raises:
        ResourceError: What came is not the file that the hub announced, or a disk is too small.
        OSError: The line broke off or the server refused; what came is kept for the next call.
    """
    import huggingface_hub as hub

    owner_name, at, rest = address.removeprefix(_SCHEME).partition("@")
    revision, slash, name = rest.partition("/")
    if not (address.startswith(_SCHEME) and at and slash):
        return
    if isinstance(hub.try_to_load_from_cache(owner_name, name, repo_type="dataset", revision=revision), str):
        return
    about = hub.get_hf_file_metadata(hub.hf_hub_url(owner_name, name, repo_type="dataset", revision=revision))
    if about.etag is None or about.size is None or not _ETAG.fullmatch(about.etag):
        return
    blob = _hub_cache() / f"datasets--{owner_name.replace('/', '--')}" / "blobs" / about.etag
    part = cache_folder() / "downloads" / f"{about.etag}.part"
    with name_full_disk(part.parent, f"{name} of {owner_name}", way_out=ANOTHER_CACHE):
        part.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(part.with_suffix(".lock")):
            if not blob.exists():
                _download(about, about.size, part, name)
                with full_hub_cache(f"{name} of {owner_name}"):
                    _place(part, blob, about.etag, name)


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def full_hub_cache(what: str) -> AbstractContextManager[None]:
    """Tells that the disk of the hub's cache is full, where it is."""
    return name_full_disk(_hub_cache(), what, way_out=another_disk("HF_HUB_CACHE"))


def another_disk(variable: str) -> str:
    """What to do where one of the hub's folders is full: set the variable that named it, or the folder over it."""
    return f"set {variable if variable in os.environ else 'HF_HOME'} to a folder on another disk"


def _download(about: HfFileMetadata, size: int, part: Path, name: str) -> None:
    done = part.stat().st_size if part.exists() else 0
    if done > size:
        part.unlink()
        done = 0
    require_space(part.parent, size - done, name, way_out=ANOTHER_CACHE)
    if done == size:
        part.touch()  # nothing made the part of a file of no bytes
        return
    with bar(f"download {name}", size, done=done) as shown, _open(about.location, done) as answer:
        goes_on = answer.status == 206
        if done and not goes_on:
            shown.advance(-done)
            done = 0
        with part.open("ab" if goes_on else "wb") as file:
            while block := answer.read(_BLOCK_BYTES):
                file.write(block)
                file.flush()
                shown.advance(len(block))
                done += len(block)
    if done != size:
        raise ConnectionError(f"{name} broke off at {done / 1e6:.1f} of {size / 1e6:.1f} MB")


def _open(location: str, done: int) -> HTTPResponse:
    import huggingface_hub as hub
    from huggingface_hub import constants

    headers = {"User-Agent": "fintune", "Accept-Encoding": "identity"}
    token = hub.get_token()
    if token and location.startswith(constants.ENDPOINT):  # the addresses of its stores are signed themselves
        headers["Authorization"] = f"Bearer {token}"
    if done:
        headers["Range"] = f"bytes={done}-"
    if not location.startswith(("https://", "http://")):
        raise ResourceError(f"the hub points to {location[:60]}, which is no web address")
    request = urllib.request.Request(location, headers=headers)  # noqa: S310 - checked above
    answer: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310
    return answer


def _place(part: Path, blob: Path, etag: str, name: str) -> None:
    # Large files are named by their SHA-256, so that what was put together from pieces can be proved.
    if _SHA256.fullmatch(etag) and sha256_file(part) != etag:
        part.unlink()
        raise ResourceError(f"{name} came damaged and was removed", hint="run the same command again")
    blob.parent.mkdir(parents=True, exist_ok=True)
    beside = blob.with_name(f"{blob.name}.fintune.incomplete")
    try:
        shutil.move(part, beside)
    except BaseException:
        beside.unlink(missing_ok=True)  # half of a copy to another disk
        raise
    beside.replace(blob)
