"""``fintune config`` and ``fintune init``: show the options, write a configuration file."""

from __future__ import annotations

from pathlib import Path

import click

from fintune.cli.common import FILE, config_arguments, echo, print_tables
from fintune.config.load import load
from fintune.config.reference import options_page
from fintune.config.yaml_file import TEMPLATES, write_template


@click.group("config")
def config_group() -> None:
    """Show the options."""


@config_group.command("show")
@config_arguments
@click.option("--changed", is_flag=True, help="Print only options that differ from their defaults.")
def show_command(config: Path, overrides: tuple[str, ...], changed: bool) -> None:
    """Print every option with its value and where it was set."""
    from fintune.report.tables import config_table

    loaded = load(config, overrides)
    print_tables(config_table(loaded, loaded.changed() if changed else None))


@config_group.command("reference")
def reference_command() -> None:
    """Print the reference of all options, docs/options.md, as Markdown."""
    click.echo(options_page(), nl=False)


@click.command("init")
@click.argument("template", type=click.Choice(TEMPLATES))
@click.option("--out", type=FILE, metavar="FILE", help="File to write (default: TEMPLATE.yaml).")
def init_command(template: str, out: Path | None) -> None:
    """Write a configuration file to start from. An existing file is never overwritten.

    chat: conversations (messages, ShareGPT, Alpaca, question and answer, CSV). finqa: FinQA files. preference: pairs of
    chosen and rejected answers.
    """
    path = out or Path(f"{template}.yaml")
    write_template(template, path)
    echo(f"{path}: written. Edit it, then check your data: fintune inspect {path}")
