"""What clients connect to in front of llama.cpp's server: it limits time, size and work, and checks Host and Origin.

llama.cpp's server has one thread for each connection that it reads, so a few clients that never finish a request stop
it. Here an unfinished request costs a few kB. A whole request that is within the limits goes to llama.cpp, and its
answer comes back byte by byte. Each connection carries one request. ``/health`` never waits for other requests.

Without a key, ``Host`` and ``Origin`` must be names of this machine. Otherwise a web page whose name is bound to
127.0.0.1 (DNS rebinding) could use the model.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import h11

_HEAD_SECONDS, _BODY_SECONDS, _WRITE_SECONDS = 10.0, 30.0, 60.0
_MAX_CONNECTIONS = 512
_MAX_HEAD_BYTES = 1 << 14
_HEALTH = ("/health", "/v1/health")
_WITHOUT_MODEL = ("/tokenize", "/detokenize", "/apply-template")
_MAX_NUMBERS = {"top_logprobs": 20, "logprobs": 20, "n_probs": 20}
_MAX_LENGTHS = {"samplers": 32, "stop": 64, "logit_bias": 1024}
_MAX_PROMPTS = 128
_PASSED_HEADERS = (b"accept", b"content-type")


class HttpFront:
    """Listens on a socket in a thread of its own, and forwards to a server on this machine.

    Args:
        listening: A bound socket.
        backend: Host and port of llama.cpp's server.
        backend_key: Key that llama.cpp's server asks for.
        key: Key that clients must send; None for no key.
        parallel: Number of requests that llama.cpp computes at a time. As many more wait there, all others here.
        max_body_bytes: Longest body of a request.
    """

    def __init__(
        self,
        listening: socket.socket,
        backend: tuple[str, int],
        backend_key: str,
        *,
        key: str | None,
        parallel: int,
        max_body_bytes: int,
    ) -> None:
        self._backend, self._backend_key, self._key = backend, backend_key.encode(), key
        self._max_body_bytes = max_body_bytes
        self._is_unread: dict[asyncio.StreamWriter, bool] = {}  # of each connection, the oldest first
        self._loop = asyncio.new_event_loop()
        self._turns = {"health": asyncio.Semaphore(2), "text": asyncio.Semaphore(4)}
        self._turns["model"] = asyncio.Semaphore(2 * parallel)
        listen = asyncio.start_server(self._serve, sock=listening, backlog=_MAX_CONNECTIONS)
        self._server = self._loop.run_until_complete(listen)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @staticmethod
    def num_backend_threads(parallel: int) -> int:
        """Return the number of threads that llama.cpp needs for the requests that it gets at a time."""
        return 2 * parallel + 8

    def close(self) -> None:
        """Stop listening and drop all connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        import h11

        if len(self._is_unread) >= _MAX_CONNECTIONS:
            # The oldest that has not sent its request makes room.
            oldest = next((each for each, is_unread in self._is_unread.items() if is_unread), writer)
            self._is_unread.pop(oldest, None)
            oldest.transport.abort()
            if oldest is writer:
                return
        self._is_unread[writer] = True
        try:
            request, body = await self._read(reader, writer)
            self._is_unread[writer] = False
            work = asyncio.ensure_future(self._forward(request, body, writer))
            left = asyncio.ensure_future(_read_to_end(reader))
            try:
                await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    work.result()
            finally:
                work.cancel()
                left.cancel()
        except (_RefusedError, h11.RemoteProtocolError, asyncio.TimeoutError, OSError) as error:
            if isinstance(error, h11.RemoteProtocolError):
                error = _RefusedError(400, str(error))
            elif isinstance(error, asyncio.TimeoutError):
                error = _RefusedError(408, "the request took too long")
            with suppress(OSError, asyncio.TimeoutError):
                if isinstance(error, _RefusedError) and not writer.is_closing():
                    await _refuse(error, reader, writer)
        finally:
            self._is_unread.pop(writer, None)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[h11.Request, bytes]:
        """Return a whole request that is within the limits."""
        import h11

        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD_BYTES)

        async def next_event() -> Any:
            while (event := connection.next_event()) is h11.NEED_DATA:
                if connection.they_are_waiting_for_100_continue:
                    writer.write(connection.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                connection.receive_data(await reader.read(1 << 16))
            if isinstance(event, h11.ConnectionClosed):
                raise ConnectionResetError
            return event

        async def read_body(limit: int) -> bytes:
            parts: list[bytes] = []
            while isinstance(event := await next_event(), h11.Data):
                parts.append(bytes(event.data))
                if (limit := limit - len(event.data)) < 0:
                    raise self._too_long()
            return b"".join(parts)

        request = await asyncio.wait_for(next_event(), _HEAD_SECONDS)
        self._check_head(request)
        body = await asyncio.wait_for(read_body(self._max_body_bytes), _BODY_SECONDS)
        if body:
            _check_body(body)
        return request, body

    def _check_head(self, request: h11.Request) -> None:
        headers = {name: value.decode("latin-1") for name, value in request.headers}
        if self._key is None:
            if not _is_this_machine(f"//{headers.get(b'host', '')}"):
                raise _RefusedError(403, "the Host header does not name this machine: serve with a key")
            if b"origin" in headers and not _is_this_machine(headers[b"origin"]):
                raise _RefusedError(403, "web pages of other machines may not send requests: serve with a key")
        elif request.target.partition(b"?")[0].decode() not in _HEALTH:
            sent = headers.get(b"authorization", "").removeprefix("Bearer ") or headers.get(b"x-api-key", "")
            if not hmac.compare_digest(sent.encode(), self._key.encode()):
                raise _RefusedError(401, "invalid API key")
        if int(headers.get(b"content-length", 0)) > self._max_body_bytes:
            raise self._too_long()

    def _too_long(self) -> _RefusedError:
        return _RefusedError(
            413, f"the body has more than {self._max_body_bytes:,} bytes: serve with a longer --context"
        )

    async def _forward(self, request: h11.Request, body: bytes, writer: asyncio.StreamWriter) -> None:
        path = request.target.partition(b"?")[0].decode()
        is_light = request.method != b"POST" or path.removeprefix("/v1") in _WITHOUT_MODEL
        headers = [(name, value) for name, value in request.headers if name in _PASSED_HEADERS]
        headers += [
            (b"host", b"127.0.0.1"),
            (b"connection", b"close"),
            (b"authorization", b"Bearer " + self._backend_key),
            (b"content-length", str(len(body)).encode()),
        ]
        lines = [request.method + b" " + request.target + b" HTTP/1.1", *(b": ".join(header) for header in headers)]
        async with self._turns["health" if path in _HEALTH else "text" if is_light else "model"]:
            source, sink = await asyncio.open_connection(*self._backend)
            try:
                sink.write(b"\r\n".join((*lines, b"", body)))
                while block := await source.read(1 << 16):
                    writer.write(block)
                    await asyncio.wait_for(writer.drain(), _WRITE_SECONDS)
            finally:
                sink.close()  # llama.cpp stops computing for a client that has left


class _RefusedError(Exception):
    """A request that is not forwarded: HTTP status and message."""


async def _read_to_end(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        pass


async def _refuse(error: _RefusedError, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    status, message = error.args
    content = json.dumps({"error": {"code": status, "message": message, "type": "invalid_request_error"}}).encode()
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    writer.write_eof()
    # The client may be sending still. Closing now would reset the connection before it reads the answer.
    await asyncio.wait_for(_read_to_end(reader), 2)


def _check_body(body: bytes) -> None:
    """Refuse what would keep the server busy out of proportion to the request; llama.cpp judges everything else."""
    import pydantic_core

    try:
        content = pydantic_core.from_json(body)
    except ValueError as error:
        raise _RefusedError(400, f"the body is no JSON that can be read: {error}") from None
    if not isinstance(content, Mapping):
        raise _RefusedError(400, "the body is no JSON object")
    for name, limit in _MAX_NUMBERS.items():
        if isinstance(number := content.get(name), int | float) and number > limit:
            raise _RefusedError(400, f"{name} is at most {limit}")
    for name, limit in _MAX_LENGTHS.items():
        if isinstance(values := content.get(name), list | dict) and len(values) > limit:
            raise _RefusedError(400, f"{name} has at most {limit} entries")
    prompt = content.get("prompt")
    if isinstance(prompt, list) and len(prompt) > _MAX_PROMPTS and not all(type(token) is int for token in prompt):
        raise _RefusedError(400, f"a request has at most {_MAX_PROMPTS} prompts")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_this_machine(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False
