"""The command line: verb to stage. Heavy imports stay inside the verbs, so that help and scoring need no torch."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar

import click

from fintune import __version__, machine
from fintune.cli_ask import ENGINES, ask
from fintune.cli_plan import plan
from fintune.cli_predict import predict_plain
from fintune.errors import FintuneError

if TYPE_CHECKING:
    from rich.console import Console

    from fintune.answerer import AskedEngine
    from fintune.selection import Selection

_PIPE_COLUMNS = 400

USER_ERROR = 2
INTERRUPTED = 130

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
_FILE = click.Path(path_type=Path)


def main(command: click.Command | None = None, name: str = "fintune") -> None:
    """Run a command, fintune's own unless told; a user's mistake becomes one line on standard error, exit status 2."""
    machine.share_cores()
    try:
        (command or app)(prog_name=name, standalone_mode=False)
    except FintuneError as error:
        _stop(str(error), USER_ERROR)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(USER_ERROR)
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx is not None else "fintune"
        _stop(f"{error.format_message().rstrip('.')}; see {verb} --help", USER_ERROR)
    except click.ClickException as error:
        _stop(error.format_message(), USER_ERROR)
    except (KeyboardInterrupt, click.Abort):
        _stop("interrupted; the same command goes on from here", INTERRUPTED)
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
    sys.stderr.write(f"fintune: {' '.join(message.split())}\n")
    sys.exit(status)


def _config(command: F) -> F:
    """CONFIG and its overrides."""
    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
    return click.argument("config", type=_FILE, metavar="CONFIG")(command)


_redo = click.option(
    "--redo", multiple=True, metavar="STAGE", help="Make a stage anew, and what follows where its result changes."
)
_dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done, do nothing.")
_strict = click.option("--strict", is_flag=True, help="Stop at the first row of the data that cannot be used.")
_STRICT = ("data.strict=true",)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="fintune", message="fintune %(version)s")
def app() -> None:
    """Fine-tune, measure and ship language models for finance.

    CONFIG is one YAML file; KEY=VALUE overrides its options, as in train.learning_rate=1e-4.
    """


@app.command()
@_config
@click.option("--skip", multiple=True, metavar="STAGE", help="Leave a stage as it lies.")
@click.option("--from", "start", metavar="STAGE", help="Leave what comes before a stage as it lies.")
@click.option("--only", multiple=True, metavar="STAGE", help="Leave all other stages as they lie.")
@_redo
@_strict
@_dry_run
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
    from fintune.selection import Selection

    overrides = (*overrides, *(_STRICT if strict else ()))
    _run(config, overrides, Selection(skip=skip, start=start, only=only, redo=redo), dry_run)


@app.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_redo
@_dry_run
def demo(overrides: tuple[str, ...], redo: tuple[str, ...], dry_run: bool) -> None:
    """The whole chain on the built-in model and generated pages, on a CPU."""
    from fintune.selection import Selection

    _run(packaged_config("demo.yaml"), overrides, Selection(redo=redo), dry_run)


def _as_it_is(command: F) -> F:
    return command


def _verb(name: str, doc: str) -> None:
    reads_data = _strict if name == "prepare" else _as_it_is

    @app.command(name, help=doc)
    @_config
    @click.option("--redo", is_flag=True, help="Even if it is up to date.")
    @reads_data
    @_dry_run
    def command(config: Path, overrides: tuple[str, ...], redo: bool, dry_run: bool, strict: bool = False) -> None:
        from fintune.selection import Selection

        overrides = (*overrides, *(_STRICT if strict else ()))
        _run(config, overrides, Selection(only=(name,), redo=(name,) if redo else ()), dry_run)


_verb("prepare", "Data to examples and tokens.")
_verb("train", "Fine-tune an adapter; an interrupted run goes on from its last checkpoint.")
_verb("merge", "Fold the adapter into the base model: a 16-bit Hugging Face folder.")
_verb("export", "Merged model to GGUF files for llama.cpp.")
_verb("report", "One HTML page of the run.")


@app.command()
@click.argument("config", type=_FILE, required=False, metavar="[CONFIG]")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--redo", is_flag=True, help="Even if it is up to date.")
@_dry_run
@click.option("--model", metavar="MODEL", help="Instead of a run's models: folder, hub id, GGUF file or URL#NAME.")
@click.option("--adapter", type=_FILE, metavar="DIR", help="PEFT adapter of --model.")
@click.option("--engine", type=ENGINES, default="auto", show_default=True, help="What runs --model; auto: its name.")
@click.option("--load-in-4bit", is_flag=True, help="Quantise the weights of --model while they load (bitsandbytes).")
@click.option("--data", type=_FILE, help="FinQA file whose questions --model is asked.")
@click.option("--train", type=_FILE, help="FinQA file that predict.num_shots come from; else the one beside --data.")
@click.option("--out", type=_FILE, help="JSON file for the predictions of --model.")
def predict(
    config: Path | None,
    overrides: tuple[str, ...],
    redo: bool,
    dry_run: bool,
    model: str | None,
    adapter: Path | None,
    engine: AskedEngine,
    load_in_4bit: bool,
    data: Path | None,
    train: Path | None,
    out: Path | None,
) -> None:
    """Answer the evaluation questions with each kind of model, or those of --data with --model.

    An interrupted command goes on from where it stopped.
    """
    if model is None and data is None and out is None and config is not None:
        from fintune.selection import Selection

        _run(config, overrides, Selection(only=("predict",), redo=("predict",) if redo else ()), dry_run)
        return
    if model is None or data is None or out is None:
        raise click.UsageError("give a CONFIG, or --model, --data and --out together")
    if config is not None and "=" in config.name:
        config, overrides = None, (str(config), *overrides)
    predict_plain(
        model,
        data,
        out,
        overrides,
        config=config,
        adapter=adapter,
        train=train,
        engine=engine,
        load_in_4bit=load_in_4bit,
    )


@app.command()
@click.argument("config", type=_FILE, required=False, metavar="[CONFIG]")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--predictions", type=_FILE, help="JSON, JSONL or .gz of {id, predicted} or {id, program}.")
@click.option("--gold", type=_FILE, help="Official FinQA JSON, plain or .gz.")
@click.option("--csv", type=_FILE, help="Write one row a prediction here.")
@click.option("--json", type=_FILE, help="Write all figures here.")
@click.option("--html", type=_FILE, help="Write a page with figures, plots and every example here.")
@click.option("--strict", is_flag=True, help="Refuse files with duplicate, unknown or broken rows.")
def score(
    config: Path | None,
    overrides: tuple[str, ...],
    predictions: Path | None,
    gold: Path | None,
    csv: Path | None,
    json: Path | None,
    html: Path | None,
    strict: bool,
) -> None:
    """Official FinQA verdicts of a run, or of --predictions against --gold. Needs no torch."""
    if config is not None and predictions is None and gold is None:
        from fintune.selection import Selection

        _run(config, overrides, Selection(only=("score",)), False)
        return
    if config is not None or predictions is None or gold is None:
        raise click.UsageError("give a CONFIG, or both --predictions and --gold")

    print_score(predictions, gold, csv=csv, json=json, html=html, strict=strict)


def print_score(
    predictions: Path,
    gold: Path,
    *,
    csv: Path | None = None,
    json: Path | None = None,
    html: Path | None = None,
    strict: bool = False,
) -> None:
    """Score files as `fintune.stages.score.score_files` does: remarks to standard error, figures to standard output."""
    from fintune.outputs import abridged
    from fintune.report.score_table import headline_table, views_table
    from fintune.stages.score import score_files

    done = score_files(predictions, gold, csv=csv, json=json, html=html, strict=strict)
    for problem in abridged(done.problems, "--json writes all of them"):
        sys.stderr.write(f"fintune: {problem}\n")
    if done.num_unscored:
        reasons = ", ".join(f"{number} {reason}" for reason, number in done.num_unscored.items())
        sys.stderr.write(f"fintune: {predictions}: not scored: {reasons}\n")
    _stdout().print(headline_table(done.score, predictions.name), "", views_table(done.score), sep="\n")


app.add_command(ask)
app.add_command(plan)


@app.command()
@_config
@click.option("--examples", type=click.IntRange(min=0), default=3, show_default=True, help="Examples to show in full.")
def inspect(config: Path, overrides: tuple[str, ...], examples: int) -> None:
    """Counts, drops by reason, token lengths, and examples with the trained tokens in colour."""
    from rich.console import Console

    from fintune.config import load
    from fintune.stages.inspect import inspect as stage

    stage(load(config, overrides).config, Console(), num_examples=examples)


@app.command()
@click.argument("files", type=_FILE, nargs=-1, required=True, metavar="FILE...")
@click.option("--json", type=_FILE, help="Write all figures and the ids of every finding here.")
@click.option("--write-splits", type=_FILE, metavar="DIR", help="Write the files anew, divided by --by.")
@click.option(
    "--by",
    type=click.Choice(["report", "company"]),
    default="report",
    show_default=True,
    help="What no two written files share.",
)
@click.option("--strict", is_flag=True, help="Stop at the first record that cannot be used.")
def audit(
    files: tuple[Path, ...],
    json: Path | None,
    write_splits: Path | None,
    by: Literal["report", "company"],
    strict: bool,
) -> None:
    """What is odd about FinQA files and what they share. Needs no torch."""
    from fintune.outputs import abridged
    from fintune.stages.audit import audit_files

    done = audit_files(files, json=json, write_splits=write_splits, by=by, strict=strict)
    for problem in abridged(done.problems):
        sys.stderr.write(f"fintune: {problem}\n")
    done.show(_stdout())


@app.group("config")
def config_group() -> None:
    """Look at the options."""


@config_group.command("show")
@_config
def config_show(config: Path, overrides: tuple[str, ...]) -> None:
    """Every option with its value and where the value came from."""
    from fintune.config import load
    from fintune.report.tables import config_table

    _stdout().print(config_table(load(config, overrides)))


@config_group.command("reference")
def config_reference() -> None:
    """The page of all options, docs/options.md, as Markdown."""
    from fintune.reference import options_page

    click.echo(options_page(), nl=False)


def _stdout() -> Console:
    """Where tables go; a file or pipe takes lines of any length."""
    from rich.console import Console

    out = Console()
    return out if out.is_terminal else Console(width=_PIPE_COLUMNS)


def packaged_config(name: str) -> Path:
    """A configuration that comes with the package: inside it when installed, beside ``src`` in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "configs" / name
    return installed if installed.is_file() else here.parents[1] / "configs" / name


def _run(path: Path, overrides: tuple[str, ...], selection: Selection, dry_run: bool) -> None:
    from fintune.config import load
    from fintune.pipeline import Pipeline
    from fintune.report.metrics import read_score
    from fintune.report.tables import plan_table, score_table
    from fintune.steps import build

    loaded = load(path, overrides)
    pipeline = Pipeline(loaded.config, build(loaded.config), selection)
    out = _stdout()
    if dry_run:
        out.print(plan_table([(step.name, what, step.inputs) for step, what in pipeline.preview()]))
        return
    folder = loaded.config.folder
    looked_at = [outcome.step for outcome in pipeline.run() if outcome.what != "skipped"]
    scored = [step for step in looked_at if step.startswith("score/")]
    if scored:
        scores = {step.removeprefix("score/"): read_score(folder / step / "score.json") for step in scored}
        out.print("", score_table(scores, "model"), "", sep="\n")
    if "report" in looked_at:
        out.print(f"The run's page: {folder / 'report' / 'index.html'}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
