"""A GGUF file behind an OpenAI-style address: llama.cpp's own server (package xllamacpp), for other programs to ask.

Without a key it listens on loopback alone, and web pages of other origins cannot read its answers.
"""

from __future__ import annotations

import json
import os
import socket
import urllib.request
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from fintune.errors import ModelError, ResourceError

_MAGIC = b"GGUF"


class LlamaServer:
    """A server in this process, answering in threads of its own from the moment that it is made.

    Args:
        path: The file.
        host: Address or name to listen on.
        port: Port, or 0 for a free one.
        context_tokens: Longest prompt with its completion; each request in flight has room of this length.
        threads: Threads of the arithmetic.
        parallel: Requests in flight; more wait.
        key: What requests must bring as ``Authorization: Bearer KEY``; None asks for nothing.

    Attributes:
        url: Address of the OpenAI-style interface, ``http://HOST:PORT/v1``.
        model: The name under which the model is served: the file's, without its ending.
        context_tokens: As asked, or the model's own context where that is shorter.

    Raises:
        ModelError: No GGUF file, or one that llama.cpp cannot load.
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
                f"{host} can be reached from other machines, and no key is asked for",
                hint="set FINTUNE_API_KEY, or listen on 127.0.0.1",
            )
        _check_port(host, port)
        self.model = path.stem
        params = self._params(path, context_tokens, parallel, threads)
        params.hostnames, params.port = [host], port
        params.api_keys = [key] if key is not None else []
        self._server = _start(params, path)
        self.url = f"{self._server.listening_address}/v1"
        self.context_tokens = self._room(key)

    def _params(self, path: Path, context_tokens: int, parallel: int, threads: int) -> Any:
        params = _library().CommonParams()
        params.model.path = str(path)
        params.model_alias = {self.model}
        params.n_parallel = parallel
        # Room of a fixed length for each request: a long one cannot make another fail.
        params.n_ctx = context_tokens * parallel
        params.kv_unified = False
        # Both sets: prompts and single tokens are computed by different pools.
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        # Otherwise earlier prompts fill up to 8 GB, and all memory would be measured first.
        params.cache_ram_mib = 0
        params.fit_params = False
        params.ui = params.endpoint_slots = False
        params.cors_origins = ""
        params.verbosity = -1
        return params

    def _room(self, key: str | None) -> int:
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        request = urllib.request.Request(f"{self.url}/models", headers=headers)  # noqa: S310 - our own address
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request) as answer:
            return int(json.load(answer)["data"][0]["meta"]["n_ctx"])

    def close(self) -> None:
        """Stop listening. Never while a request is in flight: the library would wait for it without an end."""
        self._server = None


def check_gguf(path: Path) -> None:
    """Refuse what is no GGUF file.

    Raises:
        ModelError: A folder, nothing there, or another kind of file.
    """
    if path.is_dir():
        raise ModelError(f"{path} is a folder, llama.cpp needs a GGUF file", hint="give the .gguf file")
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ModelError(f"{path}: no GGUF file", hint="give what fintune export wrote")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_port(host: str, port: int) -> None:
    """Where it cannot listen, the library says no reason, or waits for ever."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A server that has just stopped leaves connections behind, which do no harm.
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        raise ResourceError(f"{host} is no address or name of this machine", hint="use --host 127.0.0.1") from None
    except PermissionError:
        raise ResourceError(f"port {port} is not allowed here", hint="take one above 1023: --port 8080") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ResourceError(
            f"cannot listen on {host} port {port}: {reason}", hint="another --port, or 0 for a free one"
        ) from None


def _library() -> Any:
    # OpenMP reads it when it is loaded: idle threads then sleep instead of burning a core that others need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import xllamacpp
    except ImportError as error:
        raise ResourceError(
            "xllamacpp is not installed, so no GGUF file can be served", hint='pip install "fintune[gguf]"'
        ) from error
    return xllamacpp


def _start(params: Any, path: Path) -> Any:
    try:
        return _library().Server(params)
    except RuntimeError as error:
        raise ModelError(
            f"{path}: llama.cpp cannot load it: {error}",
            hint="the file may be truncated, or too large for the memory: lower --context or --parallel",
        ) from error
