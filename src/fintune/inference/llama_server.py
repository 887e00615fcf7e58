"""llama.cpp's own server (package xllamacpp) for a GGUF file: for other programs, and for this package's engine.

For other programs it has an OpenAI-compatible address (:mod:`fintune.inference.http_front`). Without a key it listens
on loopback only, and web pages cannot use it.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fintune.errors import ModelError, ResourceError
from fintune.inference.http_front import HttpFront, is_loopback
from fintune.inference.http_pool import OWN_KEY

_MAGIC = b"GGUF"
_MAX_TOKENS = (1 << 31) - 1
_MAX_BODY_BYTES_PER_TOKEN, _MIN_BODY_BYTES = 64, 1 << 16
"""Far more than a prompt that fits the context needs."""


class LlamaServer:
    """A server in this process. It answers in its own threads as soon as it is created.

    Args:
        port: Port, or 0 for a free one.
        context_tokens: Longest prompt with its completion, in tokens, for each concurrent request.
        key: Key that requests must bring as ``Authorization: Bearer KEY``; None for no key.

    Attributes:
        url: Address of the OpenAI-compatible interface, ``http://HOST:PORT/v1``.
        model: Name under which the model is served: the file's name without its suffix.
        context_tokens: As asked, or the model's own context length if that is shorter.

    Raises:
        ModelError: The path is not a GGUF file, or llama.cpp cannot load it.
        ResourceError: The port is taken, the host is not this machine's or would be open to others without a key, or
            xllamacpp is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        context_tokens: int = 4096,
        threads: int = 2,
        parallel: int = 2,
        key: str | None = None,
    ) -> None:
        check_gguf(path)
        if key is None and not is_loopback(host):
            raise ResourceError(
                f"{host} can be reached from other machines, and there is no key",
                hint=f"set {OWN_KEY}, or listen on 127.0.0.1",
            )
        listening = _listen(host, port)
        self.model = path.stem
        backend_key = secrets.token_urlsafe(32)
        try:
            params = server_params(path, context_tokens=context_tokens, threads=threads, parallel=parallel)
            params.model_alias = {self.model}
            params.endpoint_slots = False
            params.cors_origins = ""
            params.hostnames, params.port = ["127.0.0.1"], 0
            params.n_threads_http = HttpFront.num_backend_threads(parallel)
            params.api_keys = [backend_key]
            self._server = start_server(params, path)
        except BaseException:
            listening.close()
            raise
        address = urlsplit(self._server.listening_address)
        self.context_tokens = self._slot_tokens(backend_key)
        self._front = HttpFront(
            listening,
            (address.hostname or "127.0.0.1", address.port or 0),
            backend_key,
            key=key,
            parallel=parallel,
            max_body_bytes=max(_MIN_BODY_BYTES, _MAX_BODY_BYTES_PER_TOKEN * self.context_tokens),
        )
        name, number = listening.getsockname()[:2]
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{number}/v1"

    def _slot_tokens(self, key: str) -> int:
        import httpx

        url, headers = f"{self._server.listening_address}/v1/models", {"authorization": f"Bearer {key}"}
        answer = httpx.get(url, headers=headers, trust_env=False, timeout=60)
        return int(answer.raise_for_status().json()["data"][0]["meta"]["n_ctx"])

    def close(self) -> None:
        """Stop listening. Never call this during a request: the library would wait for it forever."""
        self._front.close()
        self._server = None


def server_params(path: Path, *, context_tokens: int, threads: int, parallel: int) -> Any:
    """Return the parameters of a server whose ``parallel`` slots have a cache of ``context_tokens`` each.

    Raises:
        ResourceError: xllamacpp is not installed, or the contexts are too large for it.
    """
    if context_tokens * parallel > _MAX_TOKENS:
        raise ResourceError(
            f"{parallel} requests of {context_tokens} tokens are more than llama.cpp's {_MAX_TOKENS} tokens",
            hint="use a shorter context or fewer requests",
        )
    # OpenMP reads this when it is loaded: idle threads then sleep, instead of using a core that others need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import xllamacpp
    except ImportError as error:
        raise ResourceError("a GGUF file needs xllamacpp", hint='pip install "fintune[gguf]"') from error
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = parallel
    # Each slot has a cache of fixed length, so a long prompt cannot make another one fail.
    params.n_ctx = context_tokens * parallel
    params.kv_unified = False
    # Both sets of threads: prompts and single tokens are computed by different pools.
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    # Without these, earlier prompts fill up to 8 GB, and all memory is measured first.
    params.cache_ram_mib = 0
    params.fit_params = False
    params.ui = False
    params.verbosity = -1
    return params


def start_server(params: Any, path: Path) -> Any:
    """Start a server.

    Raises:
        ModelError: llama.cpp cannot load the file.
    """
    import xllamacpp

    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise ModelError(
            f"{path}: llama.cpp cannot load it: {error}",
            hint="the file may be truncated, or too large for the memory: use a shorter context or fewer requests",
        ) from error


def check_gguf(path: Path) -> None:
    """Refuse a path that is not a GGUF file.

    Raises:
        ModelError: The path is a folder, is missing, or is another kind of file.
    """
    if path.is_dir():
        raise ModelError(f"{path} is a folder, llama.cpp needs a GGUF file", hint="give the .gguf file")
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    if not is_gguf(path):
        raise ModelError(f"{path}: not a GGUF file", hint="give a file that fintune export wrote")


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except socket.gaierror:
        raise ResourceError(f"{host} is not an address or name of this machine", hint="use --host 127.0.0.1") from None
    except PermissionError:
        raise ResourceError(f"port {port} is not allowed here", hint="use one above 1023: --port 8080") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ResourceError(
            f"cannot listen on {host} port {port}: {reason}", hint="use another --port, or 0 for a free one"
        ) from None
