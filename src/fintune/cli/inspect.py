"""``fintune inspect``, a command of :mod:`fintune.cli.main`."""

from __future__ import annotations

from pathlib import Path

import click

from fintune.cli.common import FILE, config_arguments


@click.command()
@config_arguments
@click.option("--examples", type=click.IntRange(min=0), default=3, show_default=True, help="Examples to show in full.")
@click.option("--html", type=FILE, help="Write all of it as one self-contained page, too.")
def inspect(config: Path | None, overrides: tuple[str, ...], examples: int, html: Path | None) -> None:
    """Counts, drops by reason, token lengths, and examples with the trained tokens in colour.

    CONFIG may be a run's folder, too, such as financial_lora/run of train_financial_model.py.
    """
    from rich.console import Console

    from fintune.cli.commands.inspect import inspect as stage
    from fintune.config.load import load
    from fintune.pipeline.run_folder import overrides_of
    from fintune.util.files import check_outputs

    if config is not None and config.is_dir():
        overrides, config = (*overrides_of(config, with_data=True), *overrides), None
    check_outputs([html], [config] if config is not None else [])
    stage(load(config, overrides).config, Console(), num_examples=examples, html=html)
