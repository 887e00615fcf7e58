"""What the errors of the hub's libraries mean: each wraps another, of several network libraries."""

from __future__ import annotations

from collections.abc import Iterator

from fintune.errors import FintuneError, ResourceError

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
    return ResourceError(f"{what}: the hub cannot be reached{tried} ({short(error)})", hint="look at the network and try again")


def _said(error: Exception) -> str:
    from huggingface_hub import get_token

    found = next((text for each in chain(error) if (text := getattr(each, "server_message", None))), "")
    first = str(found).strip().splitlines()[0][:160] if str(found).strip() else ""
    return f": {first.replace(get_token() or chr(0), '***')}" if first else ""


def short(error: BaseException) -> str:
    """The status, or the kind of the error."""
    status = status_of(error)
    return f"status {status}" if status is not None else type(list(chain(error))[-1]).__name__
