"""``fintune publish``, a command of :mod:`fintune.cli.main`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from fintune.cli.common import config_arguments, run_stages
from fintune.errors import ConfigError, FintuneError


@click.command()
@config_arguments
@click.option("--dry-run", is_flag=True, help="Write the card, say what would be pushed with bytes, push nothing.")
def publish(config: Path | None, overrides: tuple[str, ...], dry_run: bool) -> None:
    """What publish.artifacts names to publish.repo_id on the Hugging Face hub, with a model card.

    CONFIG may be a run's folder, too, such as the run/ of an older command's output.
    What is there with the same hash is not sent again; so an interrupted push goes on, and a second one only looks.
    """
    from fintune.config.load import load
    from fintune.manifest import MANIFEST
    from fintune.pipeline.run_folder import overrides_of
    from fintune.pipeline.step import Selection

    given, given_overrides = config, overrides
    if config is not None and config.is_dir():
        overrides, config = (*overrides_of(config, with_data=True), *overrides), None
    loaded = load(config, overrides).config
    if not loaded.publish.repo_id:
        raise ConfigError(
            "publish.repo_id is empty",
            hint="say where to push, as publish.repo_id=OWNER/NAME",
            option="publish.repo_id",
        )
    with _told_of(given, given_overrides):
        if dry_run:
            _preview(config, overrides)
        else:
            earlier = (loaded.folder / "publish" / MANIFEST).is_file()
            run_stages(config, overrides, Selection(only=("publish",), redo=("publish",) if earlier else ()))


@contextmanager
def _told_of(given: Path | None, overrides: tuple[str, ...]) -> Iterator[None]:
    """Replace CONFIG in hints by the user's arguments. For a run's folder, name the command that made it.

    Raises:
        FintuneError: The error of the block, with another hint.
    """
    try:
        yield
    except FintuneError as error:
        if error.hint is None or given is None:
            raise
        if given.is_dir():
            command = f"the command that made {given}"
            pattern = r"\bfintune (?:run|prepare) CONFIG( --redo \w+)?$"
            error.hint = re.sub(
                pattern, lambda found: f"{command}{f', with{found[1]}' if found[1] else ''}", error.hint
            )
        else:
            arguments = shlex.join([str(given), *overrides])
            error.hint = re.sub(r"\bCONFIG\b", lambda _: arguments, error.hint)
        raise


def _preview(path: Path | None, overrides: tuple[str, ...]) -> None:
    from rich.table import Table

    from fintune.cli.common import stdout
    from fintune.config.load import load
    from fintune.pipeline.runner import Pipeline
    from fintune.pipeline.stages.publish import preview
    from fintune.pipeline.step import Selection
    from fintune.pipeline.steps import build_steps

    config = load(path, overrides).config
    pipeline = Pipeline(config, build_steps(config), Selection(only=("publish",)))
    (step,) = (each for each in pipeline.steps if each.verb == "publish")
    finished = [name for name in step.inputs if pipeline.manifest(name) is not None]
    folder = config.folder / "publish-preview"
    files = preview(config, {name: pipeline.slot(name).folder for name in finished}, folder)
    table = Table("file", "bytes", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, num_bytes in files:
        table.add_row(name, f"{num_bytes:,}")
    table.add_row("together", f"{sum(num_bytes for _, num_bytes in files):,}", style="bold")
    seen = "private" if config.publish.private else "for everybody to read"
    out = stdout()
    out.print(f"Would go to {config.publish.repo_id}, branch {config.publish.branch}, {seen}:", markup=False)
    out.print(table)
    out.print(f"The card: {folder / 'README.md'}", markup=False, soft_wrap=True)
