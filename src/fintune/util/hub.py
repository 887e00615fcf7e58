"""Access to the Hugging Face hub: token, retries, and errors as one line. A token is never printed."""

from __future__ import annotations

import logging
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from fintune.errors import FintuneError, ResourceError
from fintune.util.console import say

_Result = TypeVar("_Result")

RETRY_PAUSES = (1.0, 4.0, 15.0)
"""Seconds before each further attempt."""

_XET_REFUSAL = "XetAuthenticationError"
_TRANSIENT = {"ConnectionError", "TransportError", "TimeoutError", "HTTPError", "HTTPException", "URLError"}


def require_token() -> None:
    """Check that there is a token, without asking the hub.

    Raises:
        ResourceError: There is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise ResourceError(
            "pushing to the hub needs a token, and there is none", hint="run `hf auth login`, or set HF_TOKEN"
        )


def full_repo_name(name: str, *, pauses: Sequence[float] = ()) -> str:
    """Check the token with the hub, and complete a repository's name with its owner: ``OWNER/NAME``.

    Raises:
        ResourceError: There is no token, the hub refuses it, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    require_token()
    user = call_hub(lambda: HfApi().whoami()["name"], "the hub does not say whose token this is", pauses)
    return name if "/" in name else f"{user}/{name}"


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors from which it was raised."""
    visited: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in visited:
        visited.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the server's answer, or None if the server did not answer."""
    for cause in error_chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", getattr(cause, "code", None))
        if isinstance(status, int):
            return status
    return None


def is_transient(error: BaseException) -> bool:
    """Return whether another attempt may help: the network or the server failed, and nothing was refused."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return bool(_TRANSIENT & {kind.__name__ for cause in error_chain(error) for kind in type(cause).__mro__})


def call_hub(call: Callable[[], _Result], what: str, pauses: Sequence[float]) -> _Result:
    """Call the hub, and repeat the call after errors of the network.

    huggingface_hub repeats only some of its requests by itself, and a commit is not among them.

    Args:
        call: The call. It must start from the state that it finds.
        what: Beginning of the message of an error.
        pauses: Seconds before each further attempt.

    Raises:
        ResourceError: The hub refuses the call or cannot be reached.
    """
    for attempt, pause in enumerate((*pauses, None), 1):
        try:
            return call()
        except FintuneError:
            raise
        except Exception as error:  # of huggingface_hub, of its network library, or of hf_xet
            if not _is_hub_error(error):
                raise
            if pause is None or not _is_transient_upload(error):
                attempts = f" {attempt} times" if attempt > 1 else ""
                raise _hub_error(error, what, attempts) from None
            say(f"the hub: {_short_reason(error)}; attempt {attempt + 1} of {len(pauses) + 1} in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _is_hub_error(error: Exception) -> bool:
    """Return whether the hub or the network failed. Any other error is a bug and keeps its traceback."""
    is_known = any(isinstance(e, OSError) or type(e).__name__ == _XET_REFUSAL for e in error_chain(error))
    return is_known or status_of(error) is not None or _is_transient_upload(error)


def _is_transient_upload(error: Exception) -> bool:
    # hf_xet raises a plain RuntimeError for an error of the network.
    return is_transient(error) or (status_of(error) is None and type(list(error_chain(error))[-1]) is RuntimeError)


def _hub_error(error: Exception, what: str, attempts: str) -> FintuneError:
    """Describe an error of the hub in one line. Only the server's message is quoted, because it holds no secret."""
    status, message = status_of(error), _server_message(error)
    login = "run `hf auth login` with a token that may write there"
    if status in (401, 403) or type(error).__name__ == _XET_REFUSAL:
        reason, hint = f"the hub refuses the token (status {status or 401}){message}", login
    elif status == 404:
        reason = "the hub has no such repository or branch, or hides it from this token (status 404)"
        hint = f"check the spelling, or {login}"
    elif status is not None:
        reason, hint = f"the hub answers with status {status}{attempts}{message}", "try again later"
    else:
        reason = f"the hub cannot be reached{attempts} ({_short_reason(error)})"
        hint = "check the network and try again"
    return ResourceError(f"{what}: {reason}", hint=hint)


def _server_message(error: Exception) -> str:
    from huggingface_hub import get_token

    message = next((text for cause in error_chain(error) if (text := getattr(cause, "server_message", None))), "")
    lines = str(message).strip().splitlines()
    return f": {lines[0][:160].replace(get_token() or chr(0), '***')}" if lines else ""


def _short_reason(error: BaseException) -> str:
    status = status_of(error)
    return f"status {status}" if status is not None else type(list(error_chain(error))[-1]).__name__


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence bars and warnings of huggingface_hub, because warnings may hold signed addresses of its store."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    library = logging.getLogger("huggingface_hub")
    level, has_bars = library.level, not are_progress_bars_disabled()
    library.setLevel(logging.CRITICAL)
    if has_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        library.setLevel(level)
        if has_bars:
            enable_progress_bars()


@contextmanager
def offline_unless_resolved() -> Iterator[str]:
    """Use the cache alone if the hub's name does not resolve, because the libraries would retry for minutes.

    Yields:
        The name that does not resolve; empty if it does, or if a proxy resolves it.
    """
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname or ""
    has_proxy = urllib.request.getproxies().keys() & {"http", "https", "all"}
    if constants.HF_HUB_OFFLINE or has_proxy or _resolves(host):
        yield ""
        return
    # datasets keeps a copy of the setting.
    modules = [constants, *([sys.modules["datasets"].config] if "datasets" in sys.modules else [])]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield host
    finally:
        for module, is_offline in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = is_offline


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
