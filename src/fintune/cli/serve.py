"""``fintune serve``, a command of :mod:`fintune.cli.main`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

_QUESTION = '{"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 200}'
_TOKENS = click.IntRange(min=16)
_SOME = click.IntRange(min=1)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--type", "kind", metavar="TYPE", help="Which file of a run; the last of export.types.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; another asks for a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--context", type=_TOKENS, default=4096, show_default=True, help="Tokens of a prompt and its answer.")
@click.option("--parallel", type=_SOME, default=2, show_default=True, help="Requests at a time; others wait.")
@click.option("--threads", type=_SOME, help="CPU threads; all cores if left out.")
@click.option(
    "--api-key-env",
    "variable",
    metavar="NAME",
    help="Variable with the key to ask for; FINTUNE_API_KEY if that is set.",
)
def serve(
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
    """Serve a GGUF file at an OpenAI-style address (llama.cpp), until Ctrl-C.

    MODEL is a GGUF file, a run's folder or its YAML file. Without a key it listens on this machine alone.
    """
    from fintune.cli.commands.serve import key_from
    from fintune.cli.commands.serve import serve as stage
    from fintune.inference.http_pool import OWN_KEY

    try:
        server = stage(
            model,
            overrides,
            kind=kind,
            host=host,
            port=port,
            context_tokens=context,
            threads=threads,
            parallel=parallel,
            key_variable=variable,
        )
        name = (variable or OWN_KEY) if key_from(variable) else None
        key = f"the key of {name}" if name else "no key"
        click.echo(f"{server.model} at {server.url}, {server.context_tokens} tokens a request, {key}; Ctrl-C stops it")
        click.echo(f"To ask it: {_curl(server.url, name)}")
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        click.echo("stopped")
    # An ordinary end would wait for requests in flight, and the library waits for ever. Nothing is left half written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _curl(url: str, key_name: str | None) -> str:
    """A request that can be pasted into a shell; the key stays in its variable."""
    key = f' -H "Authorization: Bearer ${key_name}"' if key_name else ""
    return f"curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{_QUESTION}'"
