"""``fintune serve``: serve a GGUF file, or the last one of a run, at an OpenAI-compatible address."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from fintune.cli.common import echo
from fintune.config.load import load
from fintune.errors import ConfigError, ModelError, ResourceError
from fintune.inference.http_pool import OWN_KEY
from fintune.inference.llama_server import LlamaServer
from fintune.inference.run_models import exported_gguf

_QUESTION = '{"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 200}'
_MAX_THREADS = 512  # llama.cpp aborts with more
_MAX_PARALLEL = 256


@click.command("serve")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--type", "kind", metavar="TYPE", help="GGUF type of a run's file (default: the last of export.types).")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to bind. Any other address than 127.0.0.1 requires an API key.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 picks a free port.")
@click.option(
    "--context",
    type=click.IntRange(min=16),
    default=4096,
    show_default=True,
    help="Maximum tokens of a prompt with its answer.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, _MAX_PARALLEL),
    default=2,
    show_default=True,
    help="Requests at a time; others wait.",
)
@click.option("--threads", type=click.IntRange(1, _MAX_THREADS), help="CPU threads (default: all cores).")
@click.option(
    "--api-key-env",
    "variable",
    metavar="NAME",
    help="Environment variable with the API key that requests must send (default: FINTUNE_API_KEY, if set).",
)
def serve_command(
    model: Path,
    overrides: tuple[str, ...],
    kind: str | None,
    host: str,
    port: int,
    context: int,
    parallel: int,
    threads: int | None,
    variable: str | None,
) -> None:
    """Serve a GGUF file at an OpenAI-compatible address (llama.cpp) until Ctrl-C.

    MODEL is a GGUF file, a run's folder or its YAML file. Without an API key, only this machine can connect.
    """
    try:
        path, key = gguf_of(model, overrides, kind=kind), key_from(variable)
        server = LlamaServer(
            path,
            host=host,
            port=port,
            context_tokens=context,
            threads=threads or min(os.cpu_count() or 1, _MAX_THREADS),
            parallel=parallel,
            key=key,
        )
        key_name = (variable or OWN_KEY) if key else None
        access = f"API key in {key_name}" if key_name else "no API key"
        tokens = f"{server.context_tokens} tokens per request"
        echo(f"Serving {server.model} at {server.url}, {tokens}, {access}. Press Ctrl-C to stop.")
        # To paste into a shell: the key stays in its variable.
        header = f' -H "Authorization: Bearer ${key_name}"' if key_name else ""
        json = f"-H 'Content-Type: application/json'{header} -d '{_QUESTION}'"
        echo(f"To ask it: curl {server.url}/chat/completions {json}")
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        echo("stopped")
    # A normal exit would wait for requests in flight, and the library waits forever. No file is left half written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def gguf_of(reference: Path, overrides: Sequence[str] = (), *, kind: str | None = None) -> Path:
    """Return the GGUF file to serve: the named one, or that of a run's folder or YAML file.

    Args:
        reference: A GGUF file, a run's folder, or a run's YAML file.
        overrides: ``KEY=VALUE`` of the YAML file.
        kind: Type of a run's file, such as "Q4_K_M" (default: the last of ``export.types``).

    Raises:
        FintuneError: There is no such file, or the run has none (of that type); or an argument is left over.
    """
    path = reference.expanduser()
    if path.suffix.lower() in (".yaml", ".yml"):
        return exported_gguf(load(path, overrides).config.folder, kind)
    if overrides:
        raise ConfigError(f"{overrides[0]}: only a YAML file takes overrides", hint="give the YAML file, or remove it")
    if path.is_dir():
        return exported_gguf(path, kind)
    if not path.exists():
        raise ModelError(f"{reference}: no such file or folder", hint="give a GGUF file, a run's folder or its YAML")
    if kind is not None:
        raise ConfigError(f"--type {kind} selects a file of a run", hint="remove it if you name a file")
    return path


def key_from(variable: str | None) -> str | None:
    """Return the key that requests must send, from a variable or else :data:`OWN_KEY`; None if no key is needed.

    Raises:
        ResourceError: The named variable is not set.
    """
    key = os.environ.get(variable or OWN_KEY, "").strip()
    if variable is not None and not key:
        raise ResourceError(f"the environment variable {variable} is not set", hint="set it, or remove --api-key-env")
    return key or None
