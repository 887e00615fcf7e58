"""What the verbs share: CONFIG and its overrides, flags, running stages, printing tables."""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from fintune.errors import ConfigError, ModelError
from fintune.util.signals import RESUME_MESSAGE, interrupt_message
from fintune.util.text import escape_control_chars

if TYPE_CHECKING:
    from rich.table import Table

    from fintune.pipeline.step import Selection

FILE = click.Path(path_type=Path)
STRICT = ("data.strict=true",)
"""The override that --strict stands for."""
_PIPE_COLUMNS = 400

F = TypeVar("F", bound=Callable[..., object])


class _ConfigFile(click.Path):
    """CONFIG. An override in its position is quoted as it was written, which a path would not keep."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Path:
        word = os.fspath(value)
        if is_override(word) and not Path(word).exists():
            raise ConfigError(
                f"{word}: no such configuration file",
                hint="the first argument is the configuration file (`fintune init` writes one), then come overrides",
            )
        return Path(word)


def config_arguments(command: F) -> F:
    """Add the arguments CONFIG and KEY=VALUE."""
    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
    return click.argument("config", type=_ConfigFile(), metavar="CONFIG")(command)


def optional_config_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """Add the arguments CONFIG (None if left out) and KEY=VALUE."""

    @functools.wraps(command)
    def split(*, words: tuple[str, ...], **options: object) -> None:
        has_config = bool(words) and not is_override(words[0])
        config = Path(words[0]) if has_config else None
        command(config=config, overrides=words[1:] if has_config else words, **options)

    return click.argument("words", nargs=-1, metavar="[CONFIG] [KEY=VALUE]...")(split)


def is_override(word: str) -> bool:
    """Whether a word is ``key=value``. The key contains no folder; the value may be a path or an address."""
    return re.match(r"[\w.-]+=", word) is not None


redo_flag = click.option("--redo", is_flag=True, help="Rerun even if up to date.")
redo_option = click.option(
    "--redo", multiple=True, metavar="STAGE", help="Rerun this stage, and later stages whose inputs change."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Print the plan without running it.")
strict_option = click.option("--strict", is_flag=True, help="Stop at the first row of the data that cannot be used.")
page_mode_option = click.option(
    "--constrain",
    type=click.Choice(["none", "general", "page"]),
    help="Allow only programs (general), or only programs of the page's numbers and rows (page).",
)
strategy_option = click.option(
    "--strategy",
    type=click.Choice(["greedy", "sample", "execution_guided", "vote"]),
    help="How the answer is chosen; see predict.strategy.",
)
candidates_option = click.option(
    "--num-candidates", type=int, metavar="N", help="Completions per question, for execution_guided and vote."
)
engine_option = click.option(
    "--engine",
    type=click.Choice(["auto", "transformers", "llama.cpp", "vllm", "openai"]),
    default="auto",
    show_default=True,
    help="What runs the model (auto: chosen from its name).",
)
four_bit_option = click.option(
    "--load-in-4bit", is_flag=True, help="Quantize the weights to 4 bits while they load (bitsandbytes)."
)


def predict_overrides(constrain: str | None, strategy: str | None, num_candidates: int | None) -> list[str]:
    """Return the flags of a verb that asks a model as overrides of ``predict``."""
    flags = {"constrain": constrain, "strategy": strategy, "num_candidates": num_candidates}
    return [f"predict.{name}={value}" for name, value in flags.items() if value is not None]


def resolve_run_model(name: str, *, with_adapter: bool = False) -> tuple[str, list[str]]:
    """Resolve a run's folder to its last GGUF file, else its merged folder. Any other name stays as it is.

    Args:
        name: What the user typed.
        with_adapter: Whether the user also named an adapter.

    Returns:
        The name of the model and, for a run, the prompt options that it was trained with, as overrides.

    Raises:
        ModelError: The name is an adapter, or a run together with an adapter.
        ArtifactError: The run has no model, or has lost it.
    """
    from fintune.inference.run_models import find_run_model, is_run_folder
    from fintune.pipeline.run_folder import overrides_of
    from fintune.util.console import say

    folder = Path(name).expanduser()
    if not is_run_folder(folder):
        return name, []
    if with_adapter:
        raise ModelError(f"{name} is a run's folder, which needs no adapter", hint="name the adapter's base model")
    model, options = find_run_model(folder), overrides_of(folder)
    say(f"using {model}, the model of {name}")
    if 'data.source="chat"' in options:
        say(
            f"{name} was trained on conversations, not on programs, so its answers here mean little. "
            f"To chat with it: fintune serve {shlex.quote(name)}"
        )
    return str(model), [option for option in options if option.startswith("prompt.")]


def run_stage(name: str, config: Path | None, overrides: tuple[str, ...], *, redo: bool, dry_run: bool) -> None:
    """Run one stage of a run."""
    from fintune.pipeline.step import Selection

    run_stages(config, overrides, Selection(only=(name,), redo=(name,) if redo else ()), dry_run=dry_run)


def run_stages(path: Path | None, overrides: tuple[str, ...], selection: Selection, *, dry_run: bool = False) -> None:
    """Run the selected stages of a run, then print the scores and where the results are; or print the plan only."""
    from fintune.config.load import load
    from fintune.pipeline.runner import Pipeline
    from fintune.pipeline.steps import build_steps
    from fintune.report.tables import plan_table, read_scored, score_tables

    config = load(path, overrides).config
    called = shlex.join([*([str(path)] if path is not None else []), *overrides])
    pipeline = Pipeline(config, build_steps(config), selection, called=called)
    if dry_run:
        print_tables(plan_table([(step.name, state, step.inputs) for step, state in pipeline.preview()]))
        return
    with interrupt_message(RESUME_MESSAGE):
        steps = [outcome.step for outcome in pipeline.run() if outcome.what != "skipped"]
    if scored := [step.removeprefix("score/") for step in steps if step.startswith("score/")]:
        first = config.predict.decoding_modes[0]
        echo("")
        print_tables(*score_tables(read_scored(config.folder, scored), "model", first=first))
        echo("")
    if config.data.source == "chat":
        # Nothing was scored: the results are the files.
        for line in _result_lines(config.folder, steps):
            echo(line)
    if "report" in steps:
        echo(f"The run's page: {config.folder / 'report' / 'index.html'}")


def _result_lines(run: Path, steps: Collection[str]) -> Iterator[str]:
    """Yield a line for each model of a run, and how to use them."""
    if "merge" in steps and (run / "merge" / "config.json").is_file():
        yield f"Merged model: {run / 'merge'}"
    files = sorted((run / "export").glob("*.gguf")) if "export" in steps else []
    files = [file for file in files if not file.name.endswith("-imatrix.gguf")]
    for file in files:
        yield f"GGUF: {file}"
    if files:
        yield f"To serve it: fintune serve {shlex.quote(str(run))}"
        modelfile = run / "export" / "Modelfile"
        if modelfile.is_file():
            yield f"To use it in Ollama: ollama create {shlex.quote(run.name)} -f {shlex.quote(str(modelfile))}"


def echo(text: str, *, err: bool = False) -> None:
    """Print a line to standard output (or error); control characters of names do not steer the terminal."""
    click.echo(escape_control_chars(text), err=err)


def print_tables(*tables: Table) -> None:
    """Print tables to standard output, with an empty line between two. A file or pipe gets lines of any length."""
    from fintune.util.console import make_console

    out = make_console()
    out = out if out.is_terminal else make_console(width=_PIPE_COLUMNS)
    for index, table in enumerate(tables):
        out.print(*([""] if index else []), table, sep="\n")
