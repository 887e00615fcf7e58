"""``fintune publish``: push the results of a run to the Hugging Face hub."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.table import Table

from fintune.cli.common import config_arguments, run_stages, stdout
from fintune.config.load import load
from fintune.errors import ConfigError, FintuneError
from fintune.manifest import MANIFEST
from fintune.pipeline.run_folder import overrides_of
from fintune.pipeline.runner import Pipeline
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
    given, given_overrides = config, overrides
    if config is not None and config.is_dir():
        overrides, config = (*overrides_of(config, with_data=True), *overrides), None
    loaded = load(config, overrides).config
    if not loaded.publish.repo_id:
        raise ConfigError(
            "publish.repo_id is empty",
            hint="name the repository: publish.repo_id=OWNER/NAME",
            option="publish.repo_id",
        )
    with _hints_with_arguments(given, given_overrides):
        if dry_run:
            _preview(config, overrides)
        else:
            earlier = (loaded.folder / "publish" / MANIFEST).is_file()
            run_stages(config, overrides, Selection(only=("publish",), redo=("publish",) if earlier else ()))


@contextmanager
def _hints_with_arguments(given: Path | None, overrides: tuple[str, ...]) -> Iterator[None]:
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
            pattern = r"\bfintune (?:run|prepare) CONFIG(?: --skip publish)?( --redo \w+)?$"
            error.hint = re.sub(
                pattern, lambda found: f"{command}{f', with{found[1]}' if found[1] else ''}", error.hint
            )
        else:
            arguments = shlex.join([str(given), *overrides])
            error.hint = re.sub(r"\bCONFIG\b", lambda _: arguments, error.hint)
        raise


def _preview(path: Path | None, overrides: tuple[str, ...]) -> None:
    from fintune.pipeline.stages.publish import preview

    config = load(path, overrides).config
    pipeline = Pipeline(config, build_steps(config), Selection(only=("publish",)))
    (step,) = (step for step in pipeline.steps if step.verb == "publish")
    finished = [name for name in step.inputs if pipeline.manifest(name) is not None]
    folder = config.folder / "publish-preview"
    files = preview(config, {name: pipeline.slot(name).folder for name in finished}, folder)
    table = Table("file", "bytes", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, num_bytes in files:
        table.add_row(name, f"{num_bytes:,}")
    table.add_row("total", f"{sum(num_bytes for _, num_bytes in files):,}", style="bold")
    access = "private" if config.publish.private else "public"
    out = stdout()
    out.print(f"Would be pushed to {config.publish.repo_id}, branch {config.publish.branch} ({access}):", markup=False)
    out.print(table)
    out.print(f"Model card: {folder / 'README.md'}", markup=False, soft_wrap=True)
