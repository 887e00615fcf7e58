"""``fintune score``, a command of :mod:`fintune.cli.main`, and what the older script prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import click

from fintune.cli.common import FILE, optional_config_arguments, print_tables, run_stages, stdout


@click.command()
@optional_config_arguments
@click.option(
    "--predictions",
    "files",
    multiple=True,
    metavar="[NAME=]FILE",
    help="JSON, JSONL or .gz of {id, predicted} or {id, program}; several give one table, a row each, and a "
    "column group each where they are named as NAME+none and NAME+example.",
)
@click.option("--gold", type=FILE, help="Official FinQA JSON, plain or .gz.")
@click.option("--csv", type=FILE, help="Write one row a prediction here.")
@click.option("--json", type=FILE, help="Write all figures here.")
@click.option("--html", type=FILE, help="Write a page with figures, plots and every example here.")
@click.option("--strict", is_flag=True, help="Refuse files with duplicate, unknown or broken rows.")
def score(
    config: Path | None,
    overrides: tuple[str, ...],
    files: tuple[str, ...],
    gold: Path | None,
    csv: Path | None,
    json: Path | None,
    html: Path | None,
    strict: bool,
) -> None:
    """Official FinQA verdicts of a run, or of --predictions against --gold. Needs no torch."""
    if config is not None and not files and gold is None:
        from fintune.pipeline.step import Selection

        run_stages(config, overrides, Selection(only=("score",)))
        return
    if config is not None or overrides or not files or gold is None:
        raise click.UsageError("give a CONFIG, or both --predictions and --gold")
    named = [_named(each) for each in files]
    if len(named) == 1:
        print_score(named[0][1], gold, csv=csv, json=json, html=html, strict=strict)
        return
    if csv or json or html:
        raise click.UsageError("--csv, --json and --html are of one file of predictions")
    twice = next((name for at, (name, _) in enumerate(named) if name in dict(named[:at])), None)
    if twice is not None:
        raise click.UsageError(f"two files of predictions are called {twice}: name them, as --predictions base=FILE")
    print_scores(dict(named), gold, strict=strict)


def _named(given: str) -> tuple[str, Path]:
    """``NAME=FILE``; a file is called by itself where it has no name, or where all of it is its path."""
    name, equals, file = given.partition("=")
    if not equals or not name or Path(given).exists():
        return given, Path(given)
    return name, Path(file)


def print_scores(files: Mapping[str, Path], gold: Path, *, strict: bool = False) -> None:
    """Score several files: tables to standard output, how many rows were not scored to standard error."""
    from fintune.pipeline.stages.score import score_files
    from fintune.report.ways import Scored, score_tables

    scored = {}
    for name, path in files.items():
        done = score_files(path, gold, strict=strict)
        scored[name] = Scored(done.score, done.right, done.seconds)
        _tell_unscored(name, done.num_unscored)
    print_tables(score_tables(scored, "predictions"))


def _tell_unscored(name: object, num_unscored: Mapping[str, int]) -> None:
    if num_unscored:
        reasons = ", ".join(f"{number} {reason}" for reason, number in num_unscored.items())
        sys.stderr.write(f"fintune: {name}: not scored: {reasons}\n")


def print_score(
    predictions: Path,
    gold: Path,
    *,
    csv: Path | None = None,
    json: Path | None = None,
    html: Path | None = None,
    strict: bool = False,
) -> None:
    """Score files: remarks go to standard error, figures to standard output."""
    from fintune.pipeline.stages.score import score_files
    from fintune.report.score_table import headline_table, views_table
    from fintune.util.text import abridge_remarks

    done = score_files(predictions, gold, csv=csv, json=json, html=html, strict=strict)
    for problem in abridge_remarks(done.problems, "--json writes all of them"):
        sys.stderr.write(f"fintune: {problem}\n")
    _tell_unscored(predictions, done.num_unscored)
    stdout().print(headline_table(done.score, predictions.name), "", views_table(done.score), sep="\n")
