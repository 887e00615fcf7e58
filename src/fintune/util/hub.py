"""Files to a repository of the Hugging Face hub, through ``huggingface_hub``; no token is ever shown.

A push is one commit: the repository shows all of it or none. What lies there with the same hash is not sent again,
neither are large files that an interrupted push has brought to the hub's store, so the same call goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ResourceError
from fintune.util.console import bar
from fintune.util.hub_errors import attempted, quiet_hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

PAUSES = (1.0, 4.0, 15.0)
"""Seconds before each further attempt."""
LARGE_BYTES = 5_000_000
"""A file of this size goes to the hub's store by itself, so that an interruption loses no other."""
MAIN = "main"


@dataclass(frozen=True)
class Target:
    """Where files go.

    Attributes:
        repo: ``OWNER/NAME``.
        private: Whether the repository is private where it is made now.
        branch: Made from the main one where it is not there.
        must_be_private: Refuse a repository that everybody can read.
    """

    repo: str
    private: bool = True
    branch: str = MAIN
    must_be_private: bool = False


@dataclass(frozen=True)
class Upload:
    """A file.

    Attributes:
        name: Path in the repository.
        path: The file here.
        sha256: Its hash, where it is known.
    """

    name: str
    path: Path
    sha256: str | None = None

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        commit: The hub's id of it.
        address: Its page.
        sent: Files that it brought; of large ones the hub may have had the content already.
        kept: Files that were there already.
        removed: Files that were deleted there.
        num_sent_bytes: Sum over ``sent``.
    """

    commit: str
    address: str
    sent: tuple[str, ...]
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    num_sent_bytes: int


def check(name: str | None, folder: Path) -> str:
    """Ask the hub who the user is.

    Args:
        name: ``OWNER/NAME``, or ``NAME``, or None for the folder's name.
        folder: What will be pushed.

    Returns:
        ``OWNER/NAME``.

    Raises:
        ResourceError: No token, the hub refuses it, or it cannot be reached.
    """
    user = owner()
    wanted = name or folder.resolve().name
    return wanted if "/" in wanted else f"{user}/{wanted}"


def owner(pauses: Sequence[float] = ()) -> str:
    """Whose token it is.

    Args:
        pauses: Seconds before each further attempt.

    Raises:
        ResourceError: No token, the hub refuses it, or it cannot be reached.
    """
    from huggingface_hub import HfApi

    require_token()
    what = "the hub does not say whose token this is"
    return str(attempted(lambda: HfApi().whoami()["name"], what, pauses))


def full_name(name: str) -> str:
    """``OWNER/NAME`` of a name that may lack its owner, who is then the user.

    Raises:
        ResourceError: No token, the hub refuses it, or it cannot be reached.
    """
    require_token()
    return name if "/" in name else f"{owner(PAUSES)}/{name}"


def require_token() -> None:
    """Refuse at once what needs a token; asks nobody.

    Raises:
        ResourceError: There is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise ResourceError(
            "pushing to the hub needs a token, and there is none", hint="run `hf auth login`, or set HF_TOKEN"
        )


def push(repo: str, files: Sequence[Path]) -> str:
    """Upload files under their names, and nothing else that lies beside them; a repository made now is private.

    Args:
        repo: From :func:`check`.
        files: What is pushed, all in one folder.

    Returns:
        The commit's address.

    Raises:
        ResourceError: The hub refuses it, or cannot be reached; the folder is as it was.
    """
    what = f"{repo} was not pushed; everything is in {files[0].parent}"
    return send(
        Target(repo), [Upload(path.name, path) for path in files], message="Upload with fintune", what=what
    ).address


def files_of(folder: Path) -> list[Upload]:
    """Every file below a folder, under its path there."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [Upload(path.relative_to(folder).as_posix(), path) for path in paths]


def send(
    target: Target,
    uploads: Sequence[Upload],
    *,
    message: str,
    remove: Collection[str] = (),
    what: str = "",
    pauses: Sequence[float] = PAUSES,
) -> Pushed:
    """Bring files to a repository, which is made where there is none.

    Args:
        target: Where to.
        uploads: Files that it shall have.
        message: First line of the commit.
        remove: Files that it shall no longer have; those that it lacks are passed over.
        what: Beginning of the line that tells a failure.
        pauses: Seconds before each further attempt after the network has failed; every attempt sends what is missing.

    Raises:
        ResourceError: The hub refuses it, cannot be reached, or shows to everybody what was to be private.
    """
    from huggingface_hub import HfApi

    what = what or f"{target.repo} was not pushed"
    api = HfApi()
    with quiet_hub():
        attempted(lambda: _open(api, target), what, pauses)
        return attempted(lambda: _send(api, target, uploads, message, remove), what, pauses)


def _open(api: HfApi, target: Target) -> None:
    api.create_repo(target.repo, private=target.private, exist_ok=True)
    if target.must_be_private and not api.repo_info(target.repo).private:
        raise ResourceError(
            f"{target.repo} can be read by everybody, and what is pushed was to be private",
            hint="make it private in its settings on the hub, or ask for a public one",
        )
    if target.branch != MAIN:
        api.create_branch(target.repo, branch=target.branch, exist_ok=True)


def _send(api: HfApi, target: Target, uploads: Sequence[Upload], message: str, remove: Collection[str]) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, RepoFile

    asked = [*(each.name for each in uploads), *remove]
    found = api.get_paths_info(target.repo, asked, revision=target.branch)
    there = {each.path: each for each in found if isinstance(each, RepoFile)}
    missing = [each for each in uploads if not _is_there(each, there.get(each.name))]
    removed = sorted(set(remove) & there.keys())
    kept = tuple(each.name for each in uploads if each not in missing)
    if not missing and not removed:
        commit = api.repo_info(target.repo, revision=target.branch).sha or ""
        return Pushed(commit, f"{api.endpoint}/{target.repo}/commit/{commit}", (), kept, (), 0)
    additions = [CommitOperationAdd(each.name, str(each.path)) for each in missing]
    num_bytes = sum(each.num_bytes for each in missing)
    with bar("push (MB)", num_bytes / 1e6) as shown:
        for each, addition in zip(missing, additions, strict=True):
            shown.note(each.name)
            if each.num_bytes >= LARGE_BYTES:
                api.preupload_lfs_files(target.repo, [addition], revision=target.branch, free_memory=False)
            shown.advance(each.num_bytes / 1e6)
        done = api.create_commit(
            target.repo,
            [*additions, *(CommitOperationDelete(name) for name in removed)],
            commit_message=message,
            revision=target.branch,
        )
    sent = tuple(each.name for each in missing)
    return Pushed(done.oid, str(done.commit_url), sent, kept, tuple(removed), num_bytes)


def _is_there(upload: Upload, remote: RepoFile | None) -> bool:
    """Large files are known on the hub by their SHA-256, others by git's hash of them."""
    if remote is None or remote.size != upload.num_bytes:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == (upload.sha256 or _hash(upload.path, hashlib.sha256())))
    blob = hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False)
    return bool(remote.blob_id == _hash(upload.path, blob))


def _hash(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())
