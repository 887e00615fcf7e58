"""The command line: verb to stage. Heavy imports stay inside the verbs, so that help and scoring need no torch."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click

from fintune import __version__
from fintune.cli.ask import CONSTRAIN, ENGINES, STRATEGY, ask
from fintune.cli.audit import audit
from fintune.cli.common import (
    FILE,
    STRICT,
    config_arguments,
    dry_run_option,
    optional_config_arguments,
    redo_flag,
    redo_option,
    run_stage,
    run_stages,
    strict_option,
)
from fintune.cli.config import config_group
from fintune.cli.convert import export, merge
from fintune.cli.extras import not_installed
from fintune.cli.help import Verbs, as_override
from fintune.cli.inspect import inspect
from fintune.cli.plan import plan
from fintune.cli.predict import predict_plain
from fintune.cli.publish import publish
from fintune.cli.score import score
from fintune.cli.serve import serve
from fintune.errors import FintuneError
from fintune.util import signals as stopping
from fintune.util.signals import sigterm_as_interrupt
from fintune.util.system import configure_environment
from fintune.util.text import escape_control_chars

if TYPE_CHECKING:
    from fintune.inference.open_model import EngineChoice

USER_ERROR = 2
INTERRUPTED, TERMINATED = 130, 143

_OUTSIDE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}
"""Errors of the file system that are the outside world's; any other is a bug of ours and keeps its traceback."""

F = TypeVar("F", bound=Callable[..., object])


def main(command: click.Command | None = None, name: str = "fintune") -> None:
    """Run a command, fintune's own unless told; a user's mistake becomes one line on standard error, exit status 2."""
    configure_environment()
    try:
        with sigterm_as_interrupt():
            (command or app)(prog_name=name, standalone_mode=False)
    except FintuneError as error:
        _stop(str(error), USER_ERROR)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(USER_ERROR)
    except click.UsageError as error:
        if command is None and (instead := as_override(error, sys.argv[1:])):
            _stop(instead, USER_ERROR)
        verb = error.ctx.command_path if error.ctx is not None else "fintune"
        _stop(f"{error.format_message().rstrip('.')}; see {verb} --help", USER_ERROR)
    except click.ClickException as error:
        _stop(error.format_message(), USER_ERROR)
    except (KeyboardInterrupt, click.Abort) as error:
        told = error.__cause__ if isinstance(error, click.Abort) else error  # click's own stands before the first
        status = TERMINATED if isinstance(told, stopping.Terminated) else INTERRUPTED
        _stop(str(told or "") or "interrupted", status)
    except ModuleNotFoundError as error:
        missing = not_installed(error)
        if missing is None:
            raise
        _stop(str(missing), USER_ERROR)
    except BrokenPipeError:
        # The reader went away (`fintune ... | head`); Python would complain again while it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in _OUTSIDE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _stop(f"{place}{os.strerror(error.errno).lower()}", USER_ERROR)


def _stop(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"fintune: {escape_control_chars(' '.join(message.split()))}\n")
    sys.exit(status)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="fintune", message="fintune %(version)s")
def app() -> None:
    """Fine-tune, measure and ship language models for finance.

    CONFIG is one YAML file; KEY=VALUE overrides its options, as in train.learning_rate=1e-4.
    """


@app.command()
@config_arguments
@click.option("--skip", multiple=True, metavar="STAGE", help="Leave a stage as it lies.")
@click.option("--from", "start", metavar="STAGE", help="Leave what comes before a stage as it lies.")
@click.option("--only", multiple=True, metavar="STAGE", help="Leave all other stages as they lie.")
@redo_option
@strict_option
@dry_run_option
def run(
    config: Path,
    overrides: tuple[str, ...],
    skip: tuple[str, ...],
    start: str | None,
    only: tuple[str, ...],
    redo: tuple[str, ...],
    strict: bool,
    dry_run: bool,
) -> None:
    """Every stage, from data to a measured GGUF and one HTML page.

    What is up to date is skipped. STAGE is a verb (predict) or one step of it (predict/merged).
    """
    from fintune.pipeline.step import Selection

    overrides = (*overrides, *(STRICT if strict else ()))
    run_stages(config, overrides, Selection(skip=skip, start=start, only=only, redo=redo), dry_run=dry_run)


@app.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@redo_option
@dry_run_option
def demo(overrides: tuple[str, ...], redo: tuple[str, ...], dry_run: bool) -> None:
    """The whole chain on the built-in model and generated pages, on a CPU."""
    from fintune.config.yaml_file import packaged_config
    from fintune.pipeline.step import Selection

    run_stages(packaged_config("demo.yaml"), overrides, Selection(redo=redo), dry_run=dry_run)


def _as_it_is(command: F) -> F:
    return command


def _verb(name: str, doc: str) -> None:
    reads_data = strict_option if name == "prepare" else _as_it_is

    @app.command(name, help=doc)
    @config_arguments
    @redo_flag
    @reads_data
    @dry_run_option
    def command(config: Path, overrides: tuple[str, ...], redo: bool, dry_run: bool, strict: bool = False) -> None:
        run_stage(name, config, (*overrides, *(STRICT if strict else ())), redo=redo, dry_run=dry_run)


_verb("preflight", "Does llama.cpp split text as the model does?")
_verb("prepare", "Data to examples and tokens.")
_verb("train", "Fine-tune an adapter; an interrupted run goes on from its last checkpoint.")
_verb("guard", "A fixed set of finance questions and FinQA pages before and after training: what got worse.")
_verb("replay", "Is each file the model that was trained?")
_verb("report", "One HTML page of the run.")


@app.command()
@optional_config_arguments
@redo_flag
@dry_run_option
@click.option("--model", metavar="MODEL", help="Instead of a run's models: folder, hub id, GGUF file or URL#NAME.")
@click.option("--adapter", type=FILE, metavar="DIR", help="PEFT adapter of --model.")
@click.option("--engine", type=ENGINES, default="auto", show_default=True, help="What runs --model; auto: its name.")
@click.option("--load-in-4bit", is_flag=True, help="Quantise the weights of --model while they load (bitsandbytes).")
@click.option("--data", type=FILE, help="FinQA file whose questions --model is asked.")
@click.option("--train", type=FILE, help="FinQA file that predict.num_fewshot come from; else the one beside --data.")
@click.option("--out", type=FILE, help="JSON file for the predictions of --model.")
@click.option(
    "--num", type=click.IntRange(min=1), metavar="N", help="Ask --model N of the questions, drawn with run.seed."
)
@click.option("--constrain", type=CONSTRAIN, help="What --model may write: as predict.constrain.")
@click.option("--strategy", type=STRATEGY, help="How the answer of --model is chosen, as predict.strategy.")
@click.option("--num-candidates", type=int, metavar="N", help="Completions, for execution_guided and vote.")
def predict(
    config: Path | None,
    overrides: tuple[str, ...],
    redo: bool,
    dry_run: bool,
    model: str | None,
    adapter: Path | None,
    engine: EngineChoice,
    load_in_4bit: bool,
    data: Path | None,
    train: Path | None,
    out: Path | None,
    num: int | None,
    constrain: str | None,
    strategy: str | None,
    num_candidates: int | None,
) -> None:
    """Answer the evaluation questions with each kind of model, or those of --data with --model.

    An interrupted command goes on from where it stopped.
    """
    flags = {"constrain": constrain, "strategy": strategy, "num_candidates": num_candidates}
    given = [f"predict.{flag}={value}" for flag, value in flags.items() if value is not None]
    if model is None and data is None and out is None and config is not None:
        if num is not None or given:
            told = "--num" if num is not None else f"--{given[0][8:].partition('=')[0].replace('_', '-')}"
            raise click.UsageError(f"{told} goes with --model; a run has data.max_eval_samples and predict. options")
        run_stage("predict", config, overrides, redo=redo, dry_run=dry_run)
        return
    if model is None or data is None or out is None:
        raise click.UsageError("give a CONFIG, or --model, --data and --out together")
    predict_plain(
        model,
        data,
        out,
        (*overrides, *given),
        config=config,
        adapter=adapter,
        train=train,
        engine=engine,
        load_in_4bit=load_in_4bit,
        max_questions=num,
    )


for command in (merge, export, score, inspect, ask, plan, audit, publish, serve, config_group):
    app.add_command(command)


if __name__ == "__main__":
    main()
