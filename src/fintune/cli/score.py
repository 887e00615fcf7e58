"""``fintune score``: the score stage of a run, or predictions against gold. scripts/score_finqa.py prints the same."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fintune.cli.common import FILE, optional_config_arguments, print_tables, run_stages
from fintune.evaluation.scoring import score_predictions
from fintune.pipeline.step import Selection
from fintune.report.score_page import render_score
from fintune.report.tables import ScoredSet, headline_table, score_tables, views_table
from fintune.util.files import check_outputs, sha256_file, write_output
from fintune.util.text import abridge_remarks, escape_control_chars


@click.command("score")
@optional_config_arguments
@click.option(
    "--predictions",
    "files",
    multiple=True,
    metavar="[NAME=]FILE",
    help="JSON, JSONL or .gz of {id, predicted} or {id, program}. Several files give one table with a row each; "
    "names such as NAME+none and NAME+page are also compared.",
)
@click.option("--gold", type=FILE, help="FinQA file with the gold programs, plain or .gz.")
@click.option("--csv", type=FILE, help="Write one row for each prediction to this file.")
@click.option(
    "--escape-formulas", is_flag=True, help="Put an apostrophe before CSV cells that a spreadsheet would compute."
)
@click.option("--json", type=FILE, help="Write all figures to this file.")
@click.option("--html", type=FILE, help="Write a page with figures, plots and all examples to this file.")
@click.option("--strict", is_flag=True, help="Stop if a row is broken, or has a duplicate or unknown id.")
def score_command(
    config: Path | None,
    overrides: tuple[str, ...],
    files: tuple[str, ...],
    gold: Path | None,
    strict: bool,
    **outputs: Any,
) -> None:
    """Score a run, or --predictions against --gold, with the official FinQA verdicts. Needs no torch."""
    if config is not None and not files and gold is None:
        run_stages(config, overrides, Selection(only=("score",)))
        return
    if config is not None or overrides or not files or gold is None:
        raise click.UsageError("give a CONFIG, or both --predictions and --gold")
    if outputs["escape_formulas"] and outputs["csv"] is None:
        raise click.UsageError("--escape-formulas needs --csv")
    named = [_split_name(file) for file in files]
    if len(named) == 1:
        print_score(named[0][1], gold, strict=strict, **outputs)
        return
    if any(outputs.values()):
        raise click.UsageError("--csv, --json and --html take one file of predictions")
    repeated = next((name for index, (name, _) in enumerate(named) if name in dict(named[:index])), None)
    if repeated is not None:
        raise click.UsageError(f"two files of predictions are called {repeated}. Use --predictions NAME=FILE")
    print_scores(dict(named), gold, strict=strict)


def _split_name(text: str) -> tuple[str, Path]:
    """Split ``NAME=FILE``. A file without a name is called by its path; so is a file whose path contains "="."""
    name, equals, file = text.partition("=")
    if not equals or not name or Path(text).exists():
        return text, Path(text)
    return name, Path(file)


def print_scores(paths: Mapping[str, Path], gold: Path, *, strict: bool = False) -> None:
    """Score several files: tables to standard output, the number of unscored rows to standard error."""
    scored = {}
    for name, path in paths.items():
        result = score_predictions(path, gold, strict=strict)
        scored[name] = ScoredSet(result.score, result.correct, result.seconds)
        _print_unscored(name, result.num_unscored)
    print_tables(*score_tables(scored, "predictions"))


def print_score(
    predictions: Path,
    gold: Path,
    *,
    csv: Path | None = None,
    json: Path | None = None,
    html: Path | None = None,
    escape_formulas: bool = False,
    strict: bool = False,
) -> None:
    """Score one file: remarks go to standard error, figures to standard output and to the named files."""
    check_outputs((csv, json, html), inputs=(predictions, gold))
    result = score_predictions(predictions, gold, strict=strict)
    if csv is not None:
        write_output(csv, result.to_csv(escape_formulas=escape_formulas))
    if json is not None:
        write_output(json, result.to_json())
    if html is not None:
        path = predictions.resolve()
        # In a run, every file is called predictions.jsonl, and its folders tell which it is.
        name = "/".join(path.parts[-4 if path.parent.parent.name == "predict" else -1 :])
        digests = {path.name: sha256_file(path) for path in (predictions, gold)}
        write_output(html, render_score(result, name, gold.name, digests))
    for problem in abridge_remarks(result.problems, "--json writes all of them"):
        sys.stderr.write(f"fintune: {problem}\n")
    _print_unscored(predictions, result.num_unscored)
    print_tables(headline_table(result.score, predictions.name), views_table(result.score))


def _print_unscored(name: object, num_unscored: Mapping[str, int]) -> None:
    if num_unscored:
        reasons = ", ".join(f"{number} {reason}" for reason, number in num_unscored.items())
        sys.stderr.write(escape_control_chars(f"fintune: {name}: not scored: {reasons}\n"))
