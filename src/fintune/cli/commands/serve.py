"""``fintune serve``: a GGUF file, or the last one of a run, behind an OpenAI-style address."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fintune.config.load import load
from fintune.errors import ConfigError, ModelError, ResourceError
from fintune.inference.http_pool import OWN_KEY
from fintune.inference.llama_server import LlamaServer
from fintune.inference.run_models import exported_gguf


def gguf_of(reference: Path, overrides: Sequence[str] = (), *, kind: str | None = None) -> Path:
    """The GGUF file that is meant.

    Args:
        reference: A GGUF file, a run's folder, or a run's YAML file.
        overrides: ``KEY=VALUE`` of the YAML file.
        kind: Type of a run's file, such as "Q4_K_M"; the last of ``export.types`` where None.

    Raises:
        ModelError: No such file.
        ConfigError: A configuration that cannot be used, or overrides without one.
        ArtifactError: A folder without the result of ``export``, or without that type.
    """
    path = reference.expanduser()
    if path.suffix.lower() in (".yaml", ".yml"):
        return exported_gguf(load(path, overrides).config.folder, kind)
    if overrides:
        raise ConfigError(f"{overrides[0]} belongs to a run's YAML file", hint="give the YAML file, or leave it out")
    if path.is_dir():
        return exported_gguf(path, kind)
    if not path.exists():
        raise ModelError(f"{reference}: no such file or folder", hint="give a GGUF file, a run's folder or its YAML")
    if kind is not None:
        raise ConfigError(f"--type {kind} chooses among the files of a run", hint="leave it out for a file")
    return path


def key_from(variable: str | None) -> str | None:
    """The key that requests must bring.

    Args:
        variable: Environment variable that holds it; :data:`OWN_KEY` where None, and no key where that is not set.

    Raises:
        ResourceError: The variable was named and is not set.
    """
    key = os.environ.get(variable or OWN_KEY, "").strip()
    if variable is not None and not key:
        raise ResourceError(f"the environment variable {variable} is not set", hint="set it, or leave it out")
    return key or None


def serve(
    reference: Path,
    overrides: Sequence[str] = (),
    *,
    kind: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    context_tokens: int = 4096,
    threads: int | None = None,
    parallel: int = 2,
    key_variable: str | None = None,
) -> LlamaServer:
    """Start a server, which answers until its process ends.

    Args:
        reference: See :func:`gguf_of`, as ``overrides`` and ``kind``.
        overrides: ``KEY=VALUE``.
        kind: Type of a run's file.
        host: Address to listen on.
        port: Port, or 0 for a free one.
        context_tokens: Longest prompt with its completion.
        threads: Threads of the arithmetic; all cores where None.
        parallel: Requests in flight.
        key_variable: See :func:`key_from`.

    Raises:
        FintuneError: See :func:`gguf_of`, :func:`key_from` and
            :class:`~fintune.inference.llama_server.LlamaServer`.
    """
    path, key = gguf_of(reference, overrides, kind=kind), key_from(key_variable)
    return LlamaServer(
        path,
        host=host,
        port=port,
        context_tokens=context_tokens,
        threads=threads or os.cpu_count() or 1,
        parallel=parallel,
        key=key,
    )
