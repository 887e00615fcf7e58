"""What the errors of the hub's libraries mean, each of which wraps another; and how often a thing is tried."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from fintune.errors import FintuneError, ResourceError
from fintune.util.console import say

T = TypeVar("T")
_PASSING = {"ConnectionError", "TransportError", "TimeoutError", "HTTPError", "HTTPException", "URLError"}


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the server answered with, where it answered."""
    for each in chain(error):
        status = getattr(getattr(each, "response", None), "status_code", getattr(each, "code", None))
        if isinstance(status, int):
            return status
    return None


def is_passing(error: BaseException) -> bool:
    """Whether another attempt may help: a broken line or a server's trouble, not a refusal or a missing thing."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return bool(_PASSING & {kind.__name__ for each in chain(error) for kind in type(each).__mro__})


def is_outside(error: Exception) -> bool:
    """Whether the hub or the network is at fault; any other error is a bug of ours and keeps its traceback."""
    kinds = {type(each).__name__ for each in chain(error)}
    known = status_of(error) is not None or any(isinstance(each, OSError) for each in chain(error))
    return known or may_pass_on_push(error) or "XetAuthenticationError" in kinds


def may_pass_on_push(error: Exception) -> bool:
    """As :func:`is_passing`, for files on their way to the hub."""
    # The library of the hub's newer store raises plain RuntimeErrors for what befalls it on the network.
    return is_passing(error) or (status_of(error) is None and type(list(chain(error))[-1]) is RuntimeError)


def told(error: Exception, what: str, tried: str = "") -> FintuneError:
    """A refusal or failure of the hub in a line; of a message only what the server said, which holds no secret."""
    status = status_of(error)
    said = _said(error)
    if status in (401, 403) or type(error).__name__ == "XetAuthenticationError":
        return ResourceError(
            f"{what}: the hub refuses the token (status {status or 401}){said}",
            hint="run `hf auth login` with a token that may write there",
        )
    if status == 404:
        return ResourceError(
            f"{what}: the hub knows no such repository or branch, or hides it from this token (status 404)",
            hint="check the spelling, or run `hf auth login` with a token that may write there",
        )
    if status is not None:
        return ResourceError(f"{what}: the hub answers with status {status}{tried}{said}", hint="try again later")
    return ResourceError(
        f"{what}: the hub cannot be reached{tried} ({short(error)})", hint="look at the network and try again"
    )


def _said(error: Exception) -> str:
    from huggingface_hub import get_token

    found = next((text for each in chain(error) if (text := getattr(each, "server_message", None))), "")
    first = str(found).strip().splitlines()[0][:160] if str(found).strip() else ""
    return f": {first.replace(get_token() or chr(0), '***')}" if first else ""


def short(error: BaseException) -> str:
    """The status, or the kind of the error."""
    status = status_of(error)
    return f"status {status}" if status is not None else type(list(chain(error))[-1]).__name__


def attempted(act: Callable[[], T], what: str, pauses: Sequence[float]) -> T:
    """Do something on the hub; what its library does not try again by itself is tried again here.

    Args:
        act: What to do; begins anew from what is there by then.
        what: Beginning of the line that tells a failure.
        pauses: Seconds before each further attempt.

    Raises:
        ResourceError: The hub refuses it, or cannot be reached.
    """
    for attempt, pause in enumerate((*pauses, None), 1):
        try:
            return act()
        except FintuneError:
            raise
        except Exception as error:  # the hub's errors, the network's, and those of whichever library carries them
            if not is_outside(error):
                raise
            if pause is None or not may_pass_on_push(error):
                tried = f" {attempt} times" if attempt > 1 else ""
                raise told(error, what, tried) from None
            say(f"the hub: {short(error)}; attempt {attempt + 1} of {len(pauses) + 1} in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Neither bars nor warnings of the library: those hold the signed addresses of its store."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    library = logging.getLogger("huggingface_hub")
    level, shown = library.level, not are_progress_bars_disabled()
    library.setLevel(logging.CRITICAL)
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        library.setLevel(level)
        if shown:
            enable_progress_bars()
