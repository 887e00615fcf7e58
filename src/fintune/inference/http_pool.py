"""Concurrent JSON requests to one server: timeouts, retries, and one clear line for each kind of failure.

The API key comes from the environment and is never in a message, manifest or file. ``FINTUNE_API_KEY`` is sent to any
address. ``OPENAI_API_KEY``, which may be set for other programs, is sent only over HTTPS or to this machine.
Redirects are not followed, so no key travels further.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from fintune.errors import FintuneError, ModelError, ResourceError
from fintune.util.files import parse_json

if TYPE_CHECKING:
    import httpx

OWN_KEY, COMMON_KEY = "FINTUNE_API_KEY", "OPENAI_API_KEY"
"""Environment variables with an API key; the first has precedence."""

_BUSY = (429, 500, 502, 503, 504)
"""Status of a server that has too many requests or is starting, or of a gateway that lost it for a moment."""
_MAX_CONNECT_SECONDS = 20.0
_MAX_WAIT_SECONDS = 120.0
_MAX_ANSWER_BYTES = 1 << 26
_MAX_QUOTED_LETTERS = 300
"""Longest message of a server that is repeated."""
_SLOW_HINT = "raise predict.timeout_seconds, or lower predict.batch_size (requests at a time) or predict.max_new_tokens"


@dataclass(frozen=True)
class Endpoint:
    """A served model: an address such as ``http://127.0.0.1:8080/v1``, and a name there, or None for the only one."""

    url: str
    model: str | None = None

    @property
    def host(self) -> str:
        """Name or address of the server."""
        return urlsplit(self.url).hostname or ""

    @property
    def is_local(self) -> bool:
        """Whether the server is this machine."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost" or self.host.endswith(".localhost")

    def api_key(self) -> tuple[str, bool]:
        """Return the key to send ("" for none), and whether there is a key that is not sent."""
        own, common = (os.environ.get(name, "").strip() for name in (OWN_KEY, COMMON_KEY))
        if own:
            return own, False
        is_private = self.is_local or self.url.startswith("https:")
        return (common, False) if is_private else ("", bool(common))


class HttpPool:
    """Connections to one server, for any number of threads.

    Args:
        endpoint: The server.
        parallel: Maximum number of concurrent requests.
        timeout_seconds: Longest wait for an answer.
        retries: How often a request is repeated if the server is busy or the connection fails, after 0, 1, 2, 4 ...
            seconds or the time that the server asks for. After a timeout or a broken connection it is repeated once.
    """

    def __init__(self, endpoint: Endpoint, *, parallel: int, timeout_seconds: float, retries: int = 5) -> None:
        import httpx

        self.url = endpoint.url
        self._parallel, self._timeout_seconds, self._retries = parallel, timeout_seconds, retries
        self._key, self._has_withheld_key = endpoint.api_key()
        proxy = getproxies().get(urlsplit(endpoint.url).scheme)
        self._client = httpx.Client(
            headers={"accept": "application/json", "user-agent": "fintune"}
            | ({"authorization": f"Bearer {self._key}"} if self._key else {}),
            timeout=httpx.Timeout(timeout_seconds, connect=min(_MAX_CONNECT_SECONDS, timeout_seconds), pool=None),
            limits=httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel),
            # The certificates of the system, which include those of a company; httpx brings its own.
            verify=ssl.create_default_context(),
            proxy=None if endpoint.is_local or proxy_bypass(endpoint.host) else proxy,
            trust_env=False,
        )
        weakref.finalize(self, self._client.close)

    def get(self, route: str) -> Any:
        """Return the answer to a GET; None if the server does not know the route. A failed connection is not retried.

        Raises:
            ResourceError: There is no server, it is of another kind, or it refuses the key.
        """
        status, answer = self._send("GET", route, None, connect_retries=0)
        if status in (404, 405, 501):
            return None
        if status != 200:
            raise self._explain_status(status, answer)
        return answer

    def post(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a POST.

        Raises:
            ResourceError: The server cannot be reached, is of another kind, refuses the key, or stays busy.
            ModelError: It refuses the request or does not know the model.
        """
        status, answer = self._send("POST", route, body, connect_retries=self._retries)
        if status != 200 or not isinstance(answer, dict):
            raise self._explain_status(status, answer)
        return answer

    def queue(self, route: str) -> RequestQueue:
        """Return a queue of POST requests to a route."""
        return RequestQueue(lambda body: self.post(route, body), self._parallel)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _send(
        self, method: str, route: str, body: Mapping[str, Any] | None, *, connect_retries: int
    ) -> tuple[int, Any]:
        """Return status and JSON answer of a request; None for an answer that is not JSON."""
        import httpx

        num_broken = 0
        for attempt in range(self._retries + 1):
            is_last = attempt == self._retries
            wait_seconds = 2.0 ** (attempt - 1) if attempt else 0.0
            try:
                with self._client.stream(method, f"{self.url}{route}", json=body) as response:
                    content = self._read(response)
            except httpx.TransportError as error:
                is_connecting = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError)
                num_broken += not is_connecting
                if is_last or num_broken > 1 or (is_connecting and attempt >= connect_retries):
                    raise self._explain_failure(error) from None
            else:
                if response.status_code not in _BUSY or is_last:
                    try:
                        return response.status_code, parse_json(content)
                    except ValueError:
                        return response.status_code, None
                asked = _retry_after(response.headers.get("retry-after", ""))
                wait_seconds = wait_seconds if asked is None else asked
            time.sleep(min(wait_seconds, _MAX_WAIT_SECONDS))
        raise AssertionError("the last attempt returns or raises")

    def _read(self, response: httpx.Response) -> bytes:
        content = bytearray()
        for part in response.iter_bytes():
            content += part
            if len(content) > _MAX_ANSWER_BYTES:
                raise ResourceError(f"{self.url} answers with more than {_MAX_ANSWER_BYTES:,} bytes")
        return bytes(content)

    def _explain_failure(self, error: httpx.TransportError) -> ResourceError:
        import httpx

        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and len(causes) < 10:
            causes.append(cause)
        # From the special to the general: a failed name resolution is a ConnectError, too.
        kinds: tuple[tuple[type[BaseException], str, str], ...] = (
            (httpx.ProxyError, "cannot be reached through the proxy", "check HTTPS_PROXY and NO_PROXY"),
            (socket.gaierror, "has an unknown host", "check the address"),
            (ssl.SSLError, "has no valid certificate (TLS)", "check the address and its certificate"),
            (httpx.ConnectTimeout, "does not answer", "check the address and the firewall"),
            (httpx.ConnectError, "refuses the connection", "start the server there, or check the address"),
            (httpx.TimeoutException, f"gave no answer in {self._timeout_seconds:g} seconds", _SLOW_HINT),
        )
        for kind, what, hint in kinds:
            if any(isinstance(cause, kind) for cause in causes):
                return ResourceError(f"{self.url} {what}", hint=hint)
        return ResourceError(f"{self.url} broke the connection ({type(error).__name__})", hint="look at its log")

    def _explain_status(self, status: int, answer: object) -> FintuneError:
        if status in (401, 403):
            # The server's message is not repeated: some servers quote a part of the key.
            return ResourceError(f"{self.url} refuses the key (HTTP {status})", hint=self._key_hint())
        message = self._message(answer)
        if 300 <= status < 400:
            return ResourceError(f"{self.url} redirects elsewhere (HTTP {status})", hint="use the address it names")
        if status == 404 and message and "model" in message.lower():
            return ModelError(f"{self.url}: {message}", hint="write the model's name after #, as in URL#MODEL")
        if status in _BUSY:
            reason = f"HTTP {status}: {message}" if message else f"HTTP {status}"
            return ResourceError(f"{self.url} stays too busy ({reason})", hint="look at its log, or try again later")
        if status == 200 or message is None or status in (404, 405, 501):
            what = "does not answer as an OpenAI-compatible server does"
            return ResourceError(f"{self.url} {what} (HTTP {status})", hint="the address usually ends in /v1")
        return ModelError(f"{self.url} refuses the request (HTTP {status}): {message}")

    def _key_hint(self) -> str:
        if self._key:
            return f"correct the environment variable {OWN_KEY if os.environ.get(OWN_KEY) else COMMON_KEY}"
        if self._has_withheld_key:
            return f"{COMMON_KEY} is not sent over plain http; set {OWN_KEY} to send a key anyway"
        return f"set the environment variable {OWN_KEY}"

    def _message(self, answer: object) -> str | None:
        """Return the server's error message on one line without the key; None if there is none."""
        if not isinstance(answer, dict):
            return None
        error = answer.get("error", answer)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        if not message:
            return None
        line = " ".join(str(message).split())
        return (line.replace(self._key, "***") if self._key else line)[:_MAX_QUOTED_LETTERS]


class RequestQueue:
    """Sends requests from daemon threads, the earliest first.

    Nobody waits for these threads: those of ``concurrent.futures`` are joined when the interpreter ends, so Ctrl-C
    would wait for the slowest answer, which may take minutes.
    """

    def __init__(self, post: Callable[[Mapping[str, Any]], dict[str, Any]], parallel: int) -> None:
        self._post, self._parallel = post, parallel
        self._jobs: SimpleQueue[tuple[Future[dict[str, Any]], Mapping[str, Any]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, body: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """Queue a request. The future's ``result`` raises what sending it raised."""
        future: Future[dict[str, Any]] = Future()
        self._jobs.put((future, body))
        if len(self._threads) < self._parallel:
            thread = threading.Thread(target=self._work, name="fintune-request", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def close(self) -> None:
        """Send nothing more. Requests in flight end by themselves, or with the process."""
        try:
            while (job := self._jobs.get_nowait()) is not None:
                job[0].cancel()
        except Empty:
            pass
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, body = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                answer = self._post(body)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(answer)


def _retry_after(value: str) -> float | None:
    """Return the seconds of a Retry-After header, which is a number or a date; None if there is none."""
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None
