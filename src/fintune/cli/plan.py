"""``fintune plan``, a command of :mod:`fintune.cli.main`."""

from __future__ import annotations

from pathlib import Path

import click

from fintune.cli.common import config_arguments


@click.command()
@config_arguments
@click.option("--gib", type=click.FloatRange(min=0, min_open=True), help="Memory of the GPU; that of this machine's.")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of the longest example; prompt.max_length.")
def plan(config: Path, overrides: tuple[str, ...], gib: float | None, tokens: int | None) -> None:
    """What training would do with a GPU's memory: layers recomputed, passes, 4 bits or not; nothing is trained.

    Only the model's configuration is read, so that it also answers for a GPU that is not here: --gib 24.
    """
    from fintune.cli.commands.plan import plan as stage
    from fintune.config.load import load

    for line in stage(load(config, overrides).config, gib=gib, longest=tokens):
        click.echo(line)
