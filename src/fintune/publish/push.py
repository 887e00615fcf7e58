"""Push files to a repository of the Hugging Face hub, at once or in the background of training.

A push is one commit, so the repository shows all of it or nothing. Unchanged files are not sent again, and neither are
large files that an interrupted push has already stored. So the same call resumes a push. ``upload_folder`` of
huggingface_hub does not fit: it may split a push into several commits, does not repeat a failed commit, and does not
refuse a repository that everybody can read. ``tests/publish/test_hub_library.py`` shows the differences.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fintune.config import PublishOptions, is_hub_name
from fintune.errors import ConfigError, FintuneError, ResourceError
from fintune.util.console import bar, quiet_libraries, say
from fintune.util.hub import RETRY_PAUSES, call_hub, full_repo_name, quiet_hub, require_token

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from transformers import TrainerCallback

LARGE_BYTES = 5_000_000
"""A file of this size is stored before the commit, one at a time. An interruption then loses one file at most."""
MAIN_BRANCH = "main"

FINISH_SECONDS = 600.0
"""Longest wait of :meth:`BackgroundPush.finish`."""
_FAILED = "could not push {label}, training continues: {error}"
_FAILED_AT_END = "could not push the weights at the end of training: {error}"
_FAILED_IN_RUN = (
    "could not push the adapter: {error}; it is in the run's folder and can be pushed with `fintune publish`"
)


@dataclass(frozen=True)
class PushTarget:
    """The repository ``OWNER/NAME`` and branch of a push. A new branch starts from the main one.

    ``private`` is for a new repository. ``must_be_private`` refuses one that everybody can read.
    """

    repo: str
    private: bool = True
    branch: str = MAIN_BRANCH
    must_be_private: bool = False


@dataclass(frozen=True)
class Upload:
    """A file to push: its name in the repository and its path on this machine."""

    name: str
    path: Path

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class PushResult:
    """The result of a push: the commit's id and URL, and the names of sent, unchanged (kept) and deleted files."""

    commit: str
    address: str
    sent: tuple[str, ...]
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    num_sent_bytes: int


def push(
    target: PushTarget,
    uploads: Sequence[Upload],
    *,
    message: str,
    remove: Collection[str] = (),
    what: str = "",
    pauses: Sequence[float] = RETRY_PAUSES,
) -> PushResult:
    """Push files to a repository, which is created if it does not exist.

    Args:
        target: The repository.
        uploads: Files that the repository will hold.
        message: First line of the commit message.
        remove: Names of files to delete, as far as the repository holds them.
        what: Beginning of the message of an error.
        pauses: Seconds before each further attempt after an error of the network.

    Raises:
        ResourceError: There is no token, the hub refuses the push or cannot be reached, or everybody can read the
            repository of files that must be private.
    """
    from huggingface_hub import HfApi

    require_token()
    api = HfApi()

    def open_repo() -> None:
        api.create_repo(target.repo, private=target.private, exist_ok=True)
        if target.must_be_private and not api.repo_info(target.repo).private:
            raise ResourceError(
                f"{target.repo} can be read by everybody, but the files to push are private",
                hint="make the repository private in its settings on the hub, or set publish.private=false",
            )
        if target.branch != MAIN_BRANCH:
            api.create_branch(target.repo, branch=target.branch, exist_ok=True)

    what = what or f"{target.repo} was not pushed"
    with quiet_hub():
        call_hub(open_repo, what, pauses)
        return call_hub(lambda: _commit(api, target, uploads, message, remove), what, pauses)


def push_files(repo: str, files: Sequence[Path]) -> str:
    """Push files of one folder to a repository, which is private if it is new, and return the commit's URL.

    Raises:
        ResourceError: The hub refuses the push or cannot be reached.
    """
    what = f"{repo} was not pushed; everything is in {files[0].parent}"
    uploads = [Upload(path.name, path) for path in files]
    return push(PushTarget(repo), uploads, message="Upload with fintune", what=what).address


def uploads_of(folder: Path, below: str = "") -> list[Upload]:
    """Return every file under a folder as an upload, with ``below`` as the folder in the repository."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [Upload((Path(below) / path.relative_to(folder)).as_posix(), path) for path in paths]


def _commit(
    api: HfApi, target: PushTarget, uploads: Sequence[Upload], message: str, remove: Collection[str]
) -> PushResult:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    names = [upload.name for upload in uploads]
    before = _blob_ids(api, target.repo, [*names, *remove], target.branch)
    removed = sorted(set(remove) & before.keys())
    additions = [CommitOperationAdd(upload.name, str(upload.path)) for upload in uploads]
    sizes = {upload.name: upload.num_bytes for upload in uploads}
    with bar("push (MB)", sum(sizes.values()) / 1e6) as progress:
        for name, addition in zip(names, additions, strict=True):
            progress.note(name)
            if sizes[name] >= LARGE_BYTES:
                api.preupload_lfs_files(target.repo, [addition], revision=target.branch, free_memory=False)
            progress.advance(sizes[name] / 1e6)
        # Drops unchanged files. If nothing changes, it makes no commit and returns the newest one.
        commit = api.create_commit(
            target.repo,
            [*additions, *(CommitOperationDelete(name) for name in removed)],
            commit_message=message,
            revision=target.branch,
        )
    after = _blob_ids(api, target.repo, names, commit.oid)
    sent = tuple(name for name in names if before.get(name) != after.get(name))
    kept = tuple(name for name in names if name not in sent)
    num_sent_bytes = sum(sizes[name] for name in sent)
    return PushResult(commit.oid, str(commit.commit_url), sent, kept, tuple(removed), num_sent_bytes)


def _blob_ids(api: HfApi, repo: str, names: Sequence[str], revision: str) -> dict[str, str]:
    """Return name -> git hash of the files that a revision holds."""
    from huggingface_hub import RepoFile

    infos = api.get_paths_info(repo, list(names), revision=revision)
    return {info.path: info.blob_id for info in infos if isinstance(info, RepoFile)}


class _Snapshot(NamedTuple):
    folder: Path
    label: str
    failure: str


class BackgroundPush:
    """Pushes snapshots in a thread, so that neither a slow hub nor an error stops training.

    One snapshot is sent at a time. If another one is waiting, a newer one replaces it. The repository's name may lack
    the owner. ``below`` is a folder in the repository.
    """

    def __init__(self, target: PushTarget, below: str = "") -> None:
        self._target, self._below = target, below
        self._lock = threading.Lock()
        self._waiting: _Snapshot | None = None
        self._thread: threading.Thread | None = None

    def push(self, save: Callable[[Path], None], label: str, failure: str = _FAILED) -> None:
        """Save a snapshot now and push it in the background.

        Args:
            save: Creates the folder of this name and writes the files into it.
            label: Commit message, and name of the snapshot in messages.
            failure: Message of an error, with the fields ``{label}`` and ``{error}``.
        """
        folder: Path | None = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="fintune-push-"))
            save(folder / "files")
        except Exception as error:  # a full disk is an OSError or an error of the library that writes
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            say(failure.format(label=label, error=f"it could not be saved ({_save_error(error)})"))
            return
        with self._lock:
            if self._waiting is not None:
                shutil.rmtree(self._waiting.folder, ignore_errors=True)
                say(f"{self._waiting.label} was not pushed: an earlier push is still running, and {label} is newer")
            self._waiting = _Snapshot(folder, label, failure)
            if self._thread is None:
                # A daemon, so that a hub that does not answer cannot keep the process alive.
                self._thread = threading.Thread(target=self._push_waiting, daemon=True)
                self._thread.start()

    def finish(self, seconds: float = FINISH_SECONDS) -> None:
        """Wait until every snapshot is sent, but not longer than ``seconds``."""
        if (thread := self._thread) is not None:
            thread.join(seconds)
            if thread.is_alive():
                say(f"the last push to {self._target.repo} is not done after {seconds:g} s and is given up")

    def _push_waiting(self) -> None:
        while True:
            with self._lock:
                snapshot, self._waiting = self._waiting, None
                if snapshot is None:
                    self._thread = None
                    return
            try:
                if "/" not in self._target.repo:
                    self._target = replace(self._target, repo=full_repo_name(self._target.repo))
                # No further attempts: after a longer failure of the network, the next snapshot is pushed.
                uploads = uploads_of(snapshot.folder / "files", self._below)
                result = push(self._target, uploads, message=snapshot.label, pauses=())
                say(f"{snapshot.label} pushed: {result.address}")
            except Exception as error:  # the thread must stay alive for later snapshots
                # Of other errors only the class: their text may hold the headers of a request, and so the token.
                text = error if isinstance(error, FintuneError) else type(error).__name__
                say(snapshot.failure.format(label=snapshot.label, error=text))
            finally:
                shutil.rmtree(snapshot.folder, ignore_errors=True)


def _save_error(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # SafetensorError quotes the operating system. Of other errors only the class is printed, as in `_push_waiting`.
    is_quoted = isinstance(error, FintuneError) or type(error).__module__.partition(".")[0].startswith("safetensors")
    return " ".join(str(error).split()) if is_quoted else type(error).__name__


class EpochPushes:
    """Pushes of the adapter during a run's own training.

    ``save`` creates the folder of this name and writes the present adapter into it.
    """

    def __init__(self, options: PublishOptions, save: Callable[[Path], None]) -> None:
        target = PushTarget(options.repo_id or "", options.private, options.branch, must_be_private=options.private)
        self._pushes, self._save = BackgroundPush(target, options.adapter_folder), save

    def push_epoch(self, epoch: int, step: int) -> None:
        """Push after an epoch, but not after the last step, whose weights may not be the selected ones."""
        self._pushes.push(self._save, f"epoch {epoch}, step {step}")

    def finish(self) -> None:
        """Push the weights that training selected, and wait for the push."""
        self._pushes.push(self._save, "end of training", _FAILED_IN_RUN)
        self._pushes.finish()


@cache
def push_callback_class() -> type[TrainerCallback]:
    """Return the class ``PushToHubEachEpoch``. A function, because transformers loads only when it is called."""
    from transformers import TrainerCallback

    class PushToHubEachEpoch(TrainerCallback):  # type: ignore[misc]
        """Push the adapter, or a whole model without adapter, after every epoch and at the end of training.

        A snapshot is saved at once and sent in the background. If a push fails, one line is printed, training
        continues, and the next epoch is pushed. A token is never printed.

        Args:
            repo_id: ``OWNER/NAME``, or ``NAME`` for a repository of the user. It is created if it does not exist.
            private: Whether a new repository is private. If so, an existing one that everybody can read is refused.
            branch: The branch. It is created if it does not exist.

        Raises:
            ConfigError: ``repo_id`` is no valid name of a repository.
        """

        def __init__(self, repo_id: str, *, private: bool = True, branch: str = MAIN_BRANCH) -> None:
            if not is_hub_name(repo_id):
                raise ConfigError(f"repo_id: {repo_id!r} is no valid name on the hub", hint="write OWNER/NAME")
            self._pushes = BackgroundPush(PushTarget(repo_id, private, branch, must_be_private=private))

        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self._push(state, model, f"epoch {state.epoch:.0f}, step {state.global_step}")

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self._pushes.finish()
            # With load_best_model_at_end the weights may differ from the last epoch's. If not, no commit is made.
            self._push(state, model, f"end of training, step {state.global_step}", _FAILED_AT_END)
            self._pushes.finish()

        def _push(self, state: Any, model: Any, label: str, failure: str = _FAILED) -> None:
            if state.is_world_process_zero:
                self._pushes.push(lambda folder: _save_model(model, folder), label, failure)

    return PushToHubEachEpoch


def _save_model(model: Any, folder: Path) -> None:
    with quiet_libraries():
        model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT writes an empty form
