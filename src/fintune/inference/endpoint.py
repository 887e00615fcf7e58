"""An OpenAI-compatible address and how it is asked: retries, time limits, and one clear line for each way to fail.

The key comes from the environment and is in no message, manifest or file. ``FINTUNE_API_KEY`` goes to whatever address
was named; ``OPENAI_API_KEY``, which may stand there for other programs, only where nobody else reads it: over HTTPS or
to this machine. Redirects are not followed, so that it never travels on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from fintune.errors import FintuneError, ModelError, ResourceError

OWN_KEY, COMMON_KEY = "FINTUNE_API_KEY", "OPENAI_API_KEY"

_TRY_AGAIN = (429, 500, 502, 503, 504)
"""Too many requests, a server that starts, or a gateway that lost it for a moment."""
_SLOW = "raise predict.timeout_seconds, or lower predict.batch_size (requests at a time) or predict.max_new_tokens"
_QUOTED = 300
"""Characters of a server's own message that are repeated."""


@dataclass(frozen=True)
class Endpoint:
    """A served model.

    Attributes:
        url: Where the interface begins, without a slash at the end: ``http://127.0.0.1:8080/v1``.
        model: The model's name there; None for the only one that is served.
    """

    url: str
    model: str | None = None

    @property
    def host(self) -> str:
        """Name or address of the server."""
        return urlsplit(self.url).hostname or ""

    @property
    def is_private(self) -> bool:
        """Whether nobody between here and the server can read what is sent."""
        return self.url.startswith("https:") or self.is_here

    @property
    def is_here(self) -> bool:
        """Whether the server is this machine."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost" or self.host.endswith(".localhost")


def is_endpoint(reference: str) -> bool:
    """Whether a model's name is an address: ``https://HOST/v1#MODEL``."""
    return reference.startswith(("http://", "https://"))


def parse(reference: str) -> Endpoint:
    """Read ``https://HOST/v1#MODEL``; without ``#MODEL`` the only model that is served there.

    Raises:
        ModelError: No host, a port that is none, or a user name, password or query in it.
    """
    address, _, model = reference.partition("#")
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise ModelError(
            f"{address.rpartition('@')[2]} is no address of a server", hint="write http://HOST:PORT/v1#MODEL"
        )
    if parts.username is not None or parts.query:
        where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ModelError(
            f"the address {where} comes with a password or a query", hint=f"set the environment variable {OWN_KEY}"
        )
    return Endpoint(address.rstrip("/"), model or None)


class Connection:
    """Asks one endpoint, from any number of threads.

    Args:
        endpoint: The server; its model is not looked at here.
        parallel: Requests in flight at most.
        timeout_seconds: Longest wait for an answer.
        retries: How often a request is repeated that the server is too busy for or whose connection broke, after
            0, 1, 2, 4 ... seconds or what the server asks for.
    """

    def __init__(self, endpoint: Endpoint, *, parallel: int, timeout_seconds: float, retries: int = 5) -> None:
        self.url = endpoint.url
        self._seconds = timeout_seconds
        self._key, self._withheld = _key(endpoint)
        self._pool = _pool(
            endpoint,
            maxsize=parallel,
            block=True,
            timeout=urllib3.Timeout(connect=min(20.0, timeout_seconds), read=timeout_seconds),
        )
        self._retry = urllib3.Retry(
            total=retries,
            read=1,
            redirect=0,
            status_forcelist=_TRY_AGAIN,
            allowed_methods=None,
            backoff_factor=0.5,
            raise_on_status=False,
        )

    def get(self, route: str) -> Any:
        """The answer to a GET, at once or not at all; None where the server does not know the route.

        Raises:
            ResourceError: No server, none of this kind, or it refuses the key.
        """
        status, answer = self._send("GET", route, None, self._retry.new(connect=0))
        if status in (404, 405, 501):
            return None
        if status != 200:
            raise self._refusal(status, answer)
        return answer

    def get_beside(self, route: str) -> Any:
        """The answer to a GET of what a server offers beside the interface, above its ``/v1``; None where it does not.

        Raises:
            ResourceError: No server, or it stays too busy.
        """
        status, answer = self._send("GET", route, None, self._retry.new(connect=0), self.url.removesuffix("/v1"))
        if status in _TRY_AGAIN:
            raise self._refusal(status, answer)
        return answer if status == 200 else None

    def post(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a POST.

        Raises:
            ResourceError: No server, none of this kind, it refuses the key, or it stays too busy.
            ModelError: It refuses the request or does not know the model.
        """
        status, answer = self._send("POST", route, body, self._retry)
        if status != 200 or not isinstance(answer, dict):
            raise self._refusal(status, answer)
        return answer

    def close(self) -> None:
        """Drop all connections."""
        self._pool.clear()

    def _send(
        self, method: str, route: str, body: Mapping[str, Any] | None, retry: urllib3.Retry, above: str | None = None
    ) -> tuple[int, Any]:
        headers = {"accept": "application/json", "user-agent": "fintune"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        try:
            answer = self._pool.request(
                method, f"{above or self.url}{route}", json=body, headers=headers, retries=retry, redirect=False
            )
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(error) from None
        try:
            return answer.status, json.loads(answer.data)
        except ValueError:
            return answer.status, None

    def _unreachable(self, error: urllib3.exceptions.HTTPError) -> ResourceError:
        cause: BaseException | None = getattr(error, "reason", None) or error
        exceptions = urllib3.exceptions
        # From the special to the general: in some versions a refused connection is a time limit, too.
        told = (
            (exceptions.ProxyError, "cannot be reached through the proxy", "check HTTPS_PROXY and NO_PROXY"),
            (exceptions.NameResolutionError, "has a host that is not known", "check the address"),
            (exceptions.NewConnectionError, "refuses the connection", "start the server there, or check the address"),
            (exceptions.ConnectTimeoutError, "does not answer", "check the address and the firewall"),
            (exceptions.ReadTimeoutError, f"gave no answer in {self._seconds:g} seconds", _SLOW),
            (exceptions.SSLError, "cannot prove who it is (TLS)", "check the address and its certificate"),
        )
        for kind, what, hint in told:
            if isinstance(cause, kind):
                return ResourceError(f"{self.url} {what}", hint=hint)
        return ResourceError(f"{self.url} broke the connection ({type(cause).__name__})", hint="look at its log")

    def _refusal(self, status: int, answer: object) -> FintuneError:
        if status in (401, 403):
            # Its message is not repeated: some servers quote a part of the key.
            return ResourceError(f"{self.url} refuses the key (HTTP {status})", hint=self._key_hint())
        told = self._told(answer)
        if 300 <= status < 400:
            return ResourceError(f"{self.url} sends elsewhere (HTTP {status})", hint="write the address it sends to")
        if status == 404 and told and "model" in told.lower():
            return ModelError(f"{self.url}: {told}", hint="write the model's name behind #, as in URL#MODEL")
        if status in _TRY_AGAIN:
            why = f"HTTP {status}: {told}" if told else f"HTTP {status}"
            return ResourceError(f"{self.url} stays too busy ({why})", hint="look at its log, or ask it later")
        if status == 200 or told is None or status in (404, 405, 501):
            what = "does not answer as an OpenAI-compatible server does"
            return ResourceError(f"{self.url} {what} (HTTP {status})", hint="the address mostly ends in /v1")
        return ModelError(f"{self.url} refuses the request (HTTP {status}): {told}")

    def _key_hint(self) -> str:
        if self._key:
            return f"correct the environment variable {self._key_name()}"
        if self._withheld:
            return f"{COMMON_KEY} is not sent over plain http; set {OWN_KEY} to send it nevertheless"
        return f"set the environment variable {OWN_KEY}"

    def _key_name(self) -> str:
        return OWN_KEY if os.environ.get(OWN_KEY) else COMMON_KEY

    def _told(self, answer: object) -> str | None:
        """What the server says is wrong, on one line and without the key; None where it is no answer of this kind."""
        if not isinstance(answer, dict):
            return None
        error = answer.get("error", answer)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        if not message:
            return None
        line = " ".join(str(message).split())
        return (line.replace(self._key, "***") if self._key else line)[:_QUOTED]


def _key(endpoint: Endpoint) -> tuple[str, bool]:
    """The key to send, and whether one is there that is not sent."""
    own, common = (os.environ.get(name, "").strip() for name in (OWN_KEY, COMMON_KEY))
    if own:
        return own, False
    return (common, False) if endpoint.is_private else ("", bool(common))


def _pool(endpoint: Endpoint, **options: Any) -> urllib3.PoolManager:
    scheme = endpoint.url.partition(":")[0]
    proxy = getproxies().get(scheme)
    if proxy is None or endpoint.is_here or proxy_bypass(endpoint.host):
        return urllib3.PoolManager(**options)
    return urllib3.ProxyManager(proxy, **options)
