"""What the verbs of the command line have in common: CONFIG and its overrides, flags, running the stages."""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from fintune.errors import ConfigError
from fintune.util.signals import RESUME_MESSAGE, interrupt_message

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fintune.pipeline.step import Selection

FILE = click.Path(path_type=Path)
STRICT = ("data.strict=true",)
"""The override that --strict stands for."""

_PIPE_COLUMNS = 400

F = TypeVar("F", bound=Callable[..., object])


class _ConfigFile(click.Path):
    """CONFIG; an override in its place is told as it was written, which a path would not keep."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Path:
        word = os.fspath(value)
        if is_override(word) and not Path(word).exists():
            raise ConfigError(
                f"{word}: no such configuration file",
                hint="the first argument is the configuration file, overrides come after it",
            )
        return Path(word)


def config_arguments(command: F) -> F:
    """CONFIG and its overrides."""
    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
    return click.argument("config", type=_ConfigFile(), metavar="CONFIG")(command)


def optional_config_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """CONFIG, None where it is left out, and overrides."""

    @functools.wraps(command)
    def split(*, words: tuple[str, ...], **options: object) -> None:
        is_left_out = not words or is_override(words[0])
        config = None if is_left_out else Path(words[0])
        command(config=config, overrides=words if is_left_out else words[1:], **options)

    return click.argument("words", nargs=-1, metavar="[CONFIG] [KEY=VALUE]...")(split)


def is_override(word: str) -> bool:
    """Whether a word is ``key=value``: a key has no folder before it, and its value may be a path or an address."""
    return re.match(r"[\w.-]+=", word) is not None


redo_flag = click.option("--redo", is_flag=True, help="Even if it is up to date.")
redo_option = click.option(
    "--redo", multiple=True, metavar="STAGE", help="Make a stage anew, and what follows where its result changes."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, do nothing.")
strict_option = click.option("--strict", is_flag=True, help="Stop at the first row of the data that cannot be used.")


def run_stage(name: str, config: Path, overrides: tuple[str, ...], *, redo: bool, dry_run: bool) -> None:
    """Run one stage of a run, as the verb of its name does."""
    from fintune.pipeline.step import Selection

    run_stages(config, overrides, Selection(only=(name,), redo=(name,) if redo else ()), dry_run=dry_run)


def run_stages(path: Path | None, overrides: tuple[str, ...], selection: Selection, *, dry_run: bool = False) -> None:
    """Run what is selected of a run, or say what would be run; then the table of scores and where the page lies."""
    from fintune.config.load import load
    from fintune.pipeline.runner import Pipeline
    from fintune.pipeline.steps import build_steps
    from fintune.report.tables import plan_table, read_scored, score_tables

    loaded = load(path, overrides)
    called = shlex.join([*([str(path)] if path is not None else []), *overrides])
    pipeline = Pipeline(loaded.config, build_steps(loaded.config), selection, called=called)
    out = stdout()
    if dry_run:
        out.print(plan_table([(step.name, what, step.inputs) for step, what in pipeline.preview()]))
        return
    folder = loaded.config.folder
    with interrupt_message(RESUME_MESSAGE):
        looked_at = [outcome.step for outcome in pipeline.run() if outcome.what != "skipped"]
    scored = [step for step in looked_at if step.startswith("score/")]
    if scored:
        scores = read_scored(folder, [step.removeprefix("score/") for step in scored])
        out.print()
        print_tables(score_tables(scores, "model", first=loaded.config.predict.decoding_modes[0]))
        out.print()
    if loaded.config.data.source == "chat":
        # Nothing was scored: what the run is for are its files.
        for line in _made(folder, looked_at):
            out.print(line, markup=False, soft_wrap=True)
    if "report" in looked_at:
        out.print(f"The run's page: {folder / 'report' / 'index.html'}", markup=False, soft_wrap=True)


def _made(run: Path, looked_at: Collection[str]) -> Iterator[str]:
    """The models of a run, and what to do with them."""
    if "merge" in looked_at and (run / "merge" / "config.json").is_file():
        yield f"Merged model {run / 'merge'}"
    found = sorted((run / "export").glob("*.gguf")) if "export" in looked_at else []
    files = [file for file in found if not file.name.endswith("-imatrix.gguf")]  # a matrix is no model
    for file in files:
        yield f"GGUF {file}"
    if files:
        yield f"To serve it: fintune serve {shlex.quote(str(run))}"


def print_tables(tables: Sequence[Table]) -> None:
    """Tables to standard output, an empty line between two."""
    out = stdout()
    for place, table in enumerate(tables):
        out.print(*([""] if place else []), table, sep="\n")


def stdout() -> Console:
    """Where tables go; a file or pipe takes lines of any length."""
    from rich.console import Console

    out = Console()
    return out if out.is_terminal else Console(width=_PIPE_COLUMNS)
