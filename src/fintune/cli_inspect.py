"""``fintune inspect``, a command of :mod:`fintune.cli`."""

from __future__ import annotations

from pathlib import Path

import click

from fintune.cli_common import FILE, config_arguments


@click.command()
@config_arguments
@click.option("--examples", type=click.IntRange(min=0), default=3, show_default=True, help="Examples to show in full.")
@click.option("--html", type=FILE, help="Write all of it as one self-contained page, too.")
def inspect(config: Path, overrides: tuple[str, ...], examples: int, html: Path | None) -> None:
    """Counts, drops by reason, token lengths, and examples with the trained tokens in colour."""
    from rich.console import Console

    from fintune import outputs
    from fintune.config import load
    from fintune.stages.inspect import inspect as stage

    outputs.check([html], [config])
    stage(load(config, overrides).config, Console(), num_examples=examples, html=html)
