"""``fintune config``, a group of commands of :mod:`fintune.cli.main`."""

from __future__ import annotations

from pathlib import Path

import click

from fintune.cli.common import config_arguments, stdout


@click.group("config")
def config_group() -> None:
    """Look at the options."""


@config_group.command("show")
@config_arguments
def config_show(config: Path, overrides: tuple[str, ...]) -> None:
    """Every option with its value and where the value came from."""
    from fintune.config.load import load
    from fintune.report.tables import config_table

    stdout().print(config_table(load(config, overrides)))


@config_group.command("reference")
def config_reference() -> None:
    """The page of all options, docs/options.md, as Markdown."""
    from fintune.config.reference import options_page

    click.echo(options_page(), nl=False)
