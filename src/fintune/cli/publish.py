"""``fintune publish``: push the results of a run to the Hugging Face hub."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
from rich.table import Table

from fintune.cli.common import config_arguments, echo, print_tables, run_stages
from fintune.config import Config
from fintune.config.load import load
from fintune.errors import ConfigError, FintuneError
from fintune.manifest import MANIFEST
from fintune.pipeline.run_folder import overrides_of
from fintune.pipeline.runner import Pipeline
from fintune.pipeline.stages.publish import preview
from fintune.pipeline.step import Selection
from fintune.pipeline.steps import build_steps


@click.command("publish")
@config_arguments
@click.option(
    "--dry-run", is_flag=True, help="Write the model card and list the files with their sizes, without pushing."
)
def publish_command(config: Path | None, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Push publish.artifacts to publish.repo_id on the Hugging Face hub, with a model card.

    CONFIG may also be a run's folder, such as the run/ folder of an older command's output. Unchanged files are not
    uploaded again, so an interrupted push can be resumed.
    """
    given = config
    arguments = shlex.join([str(config), *overrides])
    if config is not None and config.is_dir():
        overrides, config = (*overrides_of(config, with_data=True), *overrides), None
        arguments = ""
    loaded = load(config, overrides).config
    if not loaded.publish.repo_id:
        raise ConfigError(
            "publish.repo_id is empty",
            hint="name the repository: publish.repo_id=OWNER/NAME",
            option="publish.repo_id",
        )
    try:
        if dry_run:
            _preview(loaded)
        else:
            earlier = (loaded.folder / "publish" / MANIFEST).is_file()
            run_stages(config, overrides, Selection(only=("publish",), redo=("publish",) if earlier else ()))
    except FintuneError as error:
        # Hints name CONFIG, which is what the user typed, or for a run's folder the command that made it.
        command = re.compile(r"\bfintune (?:run|prepare) CONFIG(?: --skip publish)?( --redo \w+)?$")
        if error.hint is not None and arguments:
            error.hint = re.sub(r"\bCONFIG\b", lambda _: arguments, error.hint)
        elif error.hint is not None:
            error.hint = command.sub(
                lambda found: f"the command that made {given}{f', with{found[1]}' if found[1] else ''}", error.hint
            )
        raise


def _preview(config: Config) -> None:
    pipeline = Pipeline(config, build_steps(config), Selection(only=("publish",)))
    (step,) = (step for step in pipeline.steps if step.verb == "publish")
    finished = {name: pipeline.slot(name).folder for name in step.inputs if pipeline.manifest(name) is not None}
    folder = config.folder / "publish-preview"
    files = preview(config, finished, folder)
    table = Table("file", "bytes", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, num_bytes in files:
        table.add_row(name, f"{num_bytes:,}")
    table.add_row("total", f"{sum(num_bytes for _, num_bytes in files):,}", style="bold")
    access = "private" if config.publish.private else "public"
    echo(f"Would be pushed to {config.publish.repo_id}, branch {config.publish.branch} ({access}):")
    print_tables(table)
    echo(f"Model card: {folder / 'README.md'}")
