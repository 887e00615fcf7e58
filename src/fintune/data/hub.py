"""Read datasets of the Hugging Face hub through ``datasets``: cached, retried, and resumed by the next process.

Files come into the hub's own cache (``HF_HOME``), so a second run reads them without a network. Nothing is returned
before a split is complete.

``huggingface_hub`` resumes a download within one process, but deletes the part when it gives up or is stopped. So the
part is kept here, in this package's cache folder under the file's hash. The complete file becomes the blob that
``huggingface_hub`` would have written to the hub's cache.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from fintune.config import SourceOptions
from fintune.data.licences import join_licences
from fintune.data.readers import Row, dataset_rows
from fintune.errors import DataError, ResourceError
from fintune.util.console import bar, say
from fintune.util.disk import disk_full_error, is_disk_full, name_full_disk, require_space
from fintune.util.files import ANOTHER_CACHE, cache_folder, sha256_file
from fintune.util.hub import error_chain, is_transient, offline_unless_resolved, quiet_hub, status_of

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from datasets import Dataset
    from huggingface_hub import HfFileMetadata

PREFIX = "hub:"
PAUSES = (1.0, 4.0, 15.0)
"""Seconds before each further attempt."""
TIMEOUT_SECONDS = 60
_REFUSED = (401, 403)
_NO_REASON = "An error occurred while generating the dataset"
_SCHEME = "hf://datasets/"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ETAG = re.compile(r"[\w.-]+")
_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class HubSplit:
    """A split of a hub dataset.

    Attributes:
        name: ``OWNER/NAME``.
        split: The split; ``train`` if empty.
        subset: Configuration of a dataset that has several.
        revision: Branch, tag or commit; None for the newest.
    """

    name: str
    split: str = ""
    subset: str = ""
    revision: str | None = None

    @classmethod
    def of_source(cls, source: SourceOptions) -> HubSplit:
        """Return the split that an entry of ``data.sources`` names."""
        return cls(source.path.removeprefix(PREFIX), source.split, source.subset, source.revision)

    @property
    def location(self) -> str:
        """How messages call it."""
        return f"{PREFIX}{self.name}, split {self.split or 'train'}"


def read_split(split: HubSplit) -> Iterator[Row]:
    """Yield all rows of a split.

    Raises:
        DataError: There is no such dataset, split or subset, its files cannot be read, or it contains code to run.
        ResourceError: The hub refuses, or it cannot be reached and the cache has no complete copy.
    """
    yield from dataset_rows(split.location, _load(split))


def check_split(split: HubSplit) -> None:
    """Refuse a split that is not in the cache if the hub's name does not resolve. Otherwise, nothing is fetched.

    Raises:
        ResourceError: The split can neither be fetched nor read from the cache.
    """
    with offline_unless_resolved() as unresolved:
        pass
    if unresolved:
        _load(split)


def read_licence(split: HubSplit) -> str:
    """Return the licence on the dataset's card; empty if the card has none or the hub cannot be reached."""
    import huggingface_hub

    try:
        with offline_unless_resolved():
            path = huggingface_hub.hf_hub_download(
                split.name, "README.md", repo_type="dataset", revision=split.revision or "main"
            )
        licence = huggingface_hub.DatasetCard.load(path).data.get("license")
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError):
        return ""
    return join_licences(map(str, licence)) if isinstance(licence, list) else str(licence or "")


def _load(split: HubSplit) -> Dataset:
    import datasets  # noqa: F401 - so that it is set offline, too

    with offline_unless_resolved() as unresolved, quiet_hub():
        for attempt, pause in enumerate((*PAUSES, None), 1):
            try:
                return _load_once(split)
            except (DataError, ResourceError):
                raise
            except Exception as error:  # the libraries raise the errors of whichever network library they use
                if unresolved:
                    raise _unresolved(split, unresolved) from error
                if not is_transient(error):
                    raise _refusal(split, error) from error
                if pause is None:
                    raise _unreachable(split, error, attempt) from error
                say(f"{split.location}: {_reason(error)}; attempt {attempt + 1} of {len(PAUSES) + 1} in {pause:g} s")
                time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _load_once(split: HubSplit) -> Dataset:
    import datasets

    is_shown, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # a failure is reported here, in one line
    try:
        with _name_full_hub_cache(split.location):
            builder = datasets.load_dataset_builder(split.name, split.subset or None, revision=split.revision)
        for addresses in (builder.config.data_files or {}).values():
            for address in addresses:
                fetch_file(str(address))
        builder.download_and_prepare()
    finally:
        datasets.logging.set_verbosity(verbosity)
        if is_shown:
            datasets.enable_progress_bars()
    splits = list(builder.info.splits or ())
    name = split.split or "train"
    if name not in splits:
        hint = f"set split to {' or '.join(splits)}"
        raise DataError(f"there is no split {name!r}", path=split.location, hint=hint)
    return builder.as_dataset(name)


def _refusal(split: HubSplit, error: BaseException) -> DataError | ResourceError:
    import datasets

    kinds = {type(cause).__name__ for cause in error_chain(error)}
    if any(map(_is_disk_full, error_chain(error))):
        # The files have come by then, into other folders. This is the table that is made from them.
        folder = Path(datasets.config.HF_DATASETS_CACHE)
        return disk_full_error(folder, split.location, way_out=_another_disk("HF_DATASETS_CACHE"))
    text = " ".join(str(cause) for cause in error_chain(error)).lower()
    if "GatedRepoError" in kinds or "gated dataset" in text:
        hint = "accept its terms on its page and log in with `hf auth login`"
        return ResourceError(f"the hub gives {split.name} only to those who accepted its terms", hint=hint)
    if status_of(error) in _REFUSED and "RepositoryNotFoundError" not in kinds:
        return ResourceError(f"the hub refuses {split.name} ({_reason(error)})", hint="log in with `hf auth login`")
    if "RevisionNotFoundError" in kinds:
        return DataError(f"the hub has no revision {split.revision} of {split.name}", hint="check data.sources")
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        hint = "check the spelling; for a private dataset log in with `hf auth login`"
        return DataError(f"there is no dataset {split.name} on the hub", hint=hint)
    return DataError(f"cannot be read as a dataset ({_reason(error)})", path=split.location, hint="look at its page")


def _is_disk_full(error: BaseException) -> bool:
    # The error that datasets raises before it begins has no error number.
    return is_disk_full(error) or (isinstance(error, OSError) and str(error).startswith("Not enough disk space"))


def _unresolved(split: HubSplit, host: str) -> ResourceError:
    return ResourceError(
        f"{split.location}: the name {host} does not resolve, and the cache has no complete copy",
        hint="check the network, or set HF_ENDPOINT or HTTPS_PROXY",
    )


def _unreachable(split: HubSplit, error: BaseException, num_attempts: int) -> ResourceError:
    return ResourceError(
        f"{split.location}: the download failed {num_attempts} times ({_reason(error)}); nothing was trained on a part "
        "of it",
        hint="run the same command again with a stable connection: the part that has come is kept",
    )


def _reason(error: BaseException) -> str:
    status = status_of(error)
    causes = list(error_chain(error))
    if type(error).__name__ == "DatasetGenerationError":  # only its cause says what happened
        causes.reverse()
    lines = (line.strip() for cause in causes for line in str(cause).splitlines())
    first = next((line for line in lines if line and not line.startswith(_NO_REASON)), type(causes[0]).__name__)
    return f"HTTP status {status}" if status is not None else first[:160]


def fetch_file(address: str) -> None:
    """Download a file of a dataset into the hub's cache, unless it is there.

    Args:
        address: ``hf://datasets/OWNER/NAME@COMMIT/path``, as ``datasets`` lists them. Others are left to it.

    Raises:
        ResourceError: The file differs from what the hub announced, or a disk is too small.
        OSError: The connection broke or the server refused. The part that came is kept for the next call.
    """
    import huggingface_hub as hub

    owner_name, at, rest = address.removeprefix(_SCHEME).partition("@")
    revision, slash, name = rest.partition("/")
    if not (address.startswith(_SCHEME) and at and slash):
        return
    if isinstance(hub.try_to_load_from_cache(owner_name, name, repo_type="dataset", revision=revision), str):
        return
    metadata = hub.get_hf_file_metadata(hub.hf_hub_url(owner_name, name, repo_type="dataset", revision=revision))
    if metadata.etag is None or metadata.size is None or not _ETAG.fullmatch(metadata.etag):
        return
    blob = _hub_cache() / f"datasets--{owner_name.replace('/', '--')}" / "blobs" / metadata.etag
    part = cache_folder() / "downloads" / f"{metadata.etag}.part"
    with name_full_disk(part.parent, f"{name} of {owner_name}", way_out=ANOTHER_CACHE):
        part.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(part.with_suffix(".lock")):
            if not blob.exists():
                _download(metadata, metadata.size, part, name)
                with _name_full_hub_cache(f"{name} of {owner_name}"):
                    _move_to_cache(part, blob, metadata.etag, name)


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _name_full_hub_cache(what: str) -> AbstractContextManager[None]:
    """Name the folder in the error if the disk of the hub's cache is full."""
    return name_full_disk(_hub_cache(), what, way_out=_another_disk("HF_HUB_CACHE"))


def _another_disk(variable: str) -> str:
    """Return the hint for a full folder of the hub: the variable that named it, or the one of the folder above it."""
    return f"set {variable if variable in os.environ else 'HF_HOME'} to a folder on another disk"


def _download(metadata: HfFileMetadata, size: int, part: Path, name: str) -> None:
    done = part.stat().st_size if part.exists() else 0
    if done > size:
        part.unlink()
        done = 0
    require_space(part.parent, size - done, name, way_out=ANOTHER_CACHE)
    if done == size:
        part.touch()  # a file of no bytes has no part yet
        return
    with bar(f"download {name}", size, done=done) as shown, _open_url(metadata.location, done) as response:
        is_resumed = response.status == 206
        if done and not is_resumed:
            shown.advance(-done)
            done = 0
        with part.open("ab" if is_resumed else "wb") as file:
            while block := response.read(_BLOCK_BYTES):
                file.write(block)
                file.flush()
                shown.advance(len(block))
                done += len(block)
    if done != size:
        raise ConnectionError(f"{name} broke off at {done / 1e6:.1f} of {size / 1e6:.1f} MB")


def _open_url(url: str, done: int) -> HTTPResponse:
    import huggingface_hub as hub
    from huggingface_hub import constants

    headers = {"User-Agent": "fintune", "Accept-Encoding": "identity"}
    token = hub.get_token()
    if token and url.startswith(constants.ENDPOINT):  # URLs of the hub's stores are signed already
        headers["Authorization"] = f"Bearer {token}"
    if done:
        headers["Range"] = f"bytes={done}-"
    if not url.startswith(("https://", "http://")):
        raise ResourceError(f"the hub points to {url[:60]}, which is no web address")
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - checked above
    response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310
    return response


def _move_to_cache(part: Path, blob: Path, etag: str, name: str) -> None:
    # The name of a large file is its SHA-256, which proves a file that came in parts.
    if _SHA256.fullmatch(etag) and sha256_file(part) != etag:
        part.unlink()
        raise ResourceError(f"{name} came damaged and was removed", hint="run the same command again")
    blob.parent.mkdir(parents=True, exist_ok=True)
    incomplete = blob.with_name(f"{blob.name}.fintune.incomplete")
    try:
        shutil.move(part, incomplete)
    except BaseException:
        incomplete.unlink(missing_ok=True)  # half of a copy to another disk
        raise
    incomplete.replace(blob)
