"""Results to the Hugging Face hub; whether they may go there is found out before any work. No token is ever shown."""

from __future__ import annotations

from pathlib import Path

from fintune.errors import FintuneError, ResourceError


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
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ResourceError(
            "pushing to the hub needs a token, and there is none", hint="run `hf auth login`, or set HF_TOKEN"
        )
    try:
        owner = HfApi().whoami()["name"]
    except Exception as error:  # the hub's errors, the network's, and those of whichever library carries them
        raise _told(error, "the hub does not say whose token this is") from None
    wanted = name or folder.resolve().name
    return wanted if "/" in wanted else f"{owner}/{wanted}"


def push(repo: str, folder: Path, *, leave_out: tuple[str, ...] = ()) -> str:
    """Upload a folder's files; the repository is private where it is made now.

    Args:
        repo: From :func:`check`.
        folder: What is pushed.
        leave_out: Patterns of paths that stay.

    Returns:
        The commit's address.

    Raises:
        ResourceError: The hub refuses it, or cannot be reached; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=str(folder), ignore_patterns=list(leave_out))
    except Exception as error:
        raise _told(error, f"{repo} was not pushed; everything is in {folder}") from None
    return str(done.commit_url)


def _told(error: Exception, what: str) -> FintuneError:
    """The status alone: a message may hold what was sent."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return ResourceError(
            f"{what}: the hub refuses the token (status {status})",
            hint="run `hf auth login` with a token that may write, or leave out --push_to_hub",
        )
    if status is not None:
        return ResourceError(f"{what}: the hub answers with status {status}", hint="try again later")
    return ResourceError(f"{what}: the hub cannot be reached ({type(error).__name__})", hint="look at the network")
