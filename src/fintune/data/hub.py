"""Datasets of the Hugging Face hub, through ``datasets``: cached, taken up where a download broke off, retried.

Files come into the usual cache (``HF_HOME``), which keeps the part of a file that an interruption left; a second run
reads them from there, without a network too. Nothing is returned before all of a split is there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.data import hub_files
from fintune.data.licences import joined
from fintune.data.rows import Row
from fintune.errors import DataError, ResourceError
from fintune.util.console import say
from fintune.util.disk import disk_full_error, is_disk_full
from fintune.util.hub import error_chain, is_transient, status_of

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hub:"
PAUSES = (1.0, 4.0, 15.0)
"""Seconds before each further attempt."""
_REFUSED = (401, 403)
_NO_REASON = "An error occurred while generating the dataset"


@dataclass(frozen=True)
class HubSplit:
    """A split that was asked for.

    Attributes:
        name: ``OWNER/NAME``.
        split: ``train`` where empty.
        subset: Configuration, where the dataset has several.
        revision: Branch, tag or commit; the newest where None.
    """

    name: str
    split: str = ""
    subset: str = ""
    revision: str | None = None

    @property
    def place(self) -> str:
        """How messages call it."""
        return f"{PREFIX}{self.name}, split {self.split or 'train'}"


def read(wanted: HubSplit) -> Iterator[Row]:
    """All rows of a split.

    Raises:
        DataError: There is no such dataset, split or subset, its files cannot be read, or it wants to run code.
        ResourceError: The hub refuses, or cannot be reached and the cache holds no whole copy.
    """
    for number, row in enumerate(_load(wanted), 1):
        yield Row(wanted.place, number, row)


def licence(wanted: HubSplit) -> str:
    """What the dataset's card says; nothing where it says nothing or the hub cannot be reached."""
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(
            wanted.name, "README.md", repo_type="dataset", revision=wanted.revision or "main"
        )
        found = huggingface_hub.DatasetCard.load(path).data.get("license")
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError):
        return ""
    return joined(map(str, found)) if isinstance(found, list) else str(found or "")


def _load(wanted: HubSplit) -> Dataset:
    for attempt, pause in enumerate((*PAUSES, None), 1):
        try:
            return _once(wanted)
        except (DataError, ResourceError):
            raise
        except Exception as error:  # the libraries below raise their network's own, of several kinds
            if not is_transient(error):
                raise _refusal(wanted, error) from error
            if pause is None:
                raise _unreachable(wanted, error, attempt) from error
            say(f"{wanted.place}: {_reason(error)}; attempt {attempt + 1} of {len(PAUSES) + 1} in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _once(wanted: HubSplit) -> Dataset:
    import datasets

    shown, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what fails is told in one line of ours
    try:
        with hub_files.full_hub_cache(wanted.place):
            builder = datasets.load_dataset_builder(wanted.name, wanted.subset or None, revision=wanted.revision)
        for addresses in (builder.config.data_files or {}).values():
            for address in addresses:
                hub_files.fetch(str(address))
        builder.download_and_prepare()
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
    splits = list(builder.info.splits or ())
    split = wanted.split or "train"
    if split not in splits:
        raise DataError(f"there is no split {split!r}", path=wanted.place, hint=f"set split to {' or '.join(splits)}")
    return builder.as_dataset(split)


def _refusal(wanted: HubSplit, error: BaseException) -> DataError | ResourceError:
    import datasets

    kinds = {type(each).__name__ for each in error_chain(error)}
    if any(map(_lacks_room, error_chain(error))):
        # Its files have come by then, into other folders: this is the table that is made of them.
        folder = Path(datasets.config.HF_DATASETS_CACHE)
        return disk_full_error(folder, wanted.place, way_out=hub_files.another_disk("HF_DATASETS_CACHE"))
    text = " ".join(str(each) for each in error_chain(error)).lower()
    if "GatedRepoError" in kinds or "gated dataset" in text:
        hint = "accept its terms on its page and log in with `hf auth login`"
        return ResourceError(f"the hub gives {wanted.name} only to those who accepted its terms", hint=hint)
    if status_of(error) in _REFUSED and "RepositoryNotFoundError" not in kinds:
        return ResourceError(f"the hub refuses {wanted.name} ({_reason(error)})", hint="log in with `hf auth login`")
    if "RevisionNotFoundError" in kinds:
        return DataError(f"the hub has no revision {wanted.revision} of {wanted.name}", hint="check data.sources")
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        hint = "check the spelling; for a private dataset log in with `hf auth login`"
        return DataError(f"there is no dataset {wanted.name} on the hub", hint=hint)
    return DataError(f"cannot be read as a dataset ({_reason(error)})", path=wanted.place, hint="look at its page")


def _lacks_room(error: BaseException) -> bool:
    # What datasets finds before it begins has no number.
    return is_disk_full(error) or (isinstance(error, OSError) and str(error).startswith("Not enough disk space"))


def _unreachable(wanted: HubSplit, error: BaseException, attempts: int) -> ResourceError:
    return ResourceError(
        f"{wanted.place}: the download failed {attempts} times ({_reason(error)}); nothing was trained on a part of it",
        hint="run the same command again with a stable connection: what has come so far is kept and not fetched again",
    )


def _reason(error: BaseException) -> str:
    status = status_of(error)
    causes = list(error_chain(error))
    if type(error).__name__ == "DatasetGenerationError":  # it says no more than that there was one
        causes.reverse()
    lines = (line.strip() for each in causes for line in str(each).splitlines())
    first = next((line for line in lines if line and not line.startswith(_NO_REASON)), type(causes[0]).__name__)
    return f"HTTP status {status}" if status is not None else first[:160]
