"""``fintune score``, a command of :mod:`fintune.cli`, and what the older script prints."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fintune.cli_common import FILE, run_stages, stdout


@click.command()
@click.argument("config", type=FILE, required=False, metavar="[CONFIG]")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--predictions", type=FILE, help="JSON, JSONL or .gz of {id, predicted} or {id, program}.")
@click.option("--gold", type=FILE, help="Official FinQA JSON, plain or .gz.")
@click.option("--csv", type=FILE, help="Write one row a prediction here.")
@click.option("--json", type=FILE, help="Write all figures here.")
@click.option("--html", type=FILE, help="Write a page with figures, plots and every example here.")
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

        run_stages(config, overrides, Selection(only=("score",)))
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
    stdout().print(headline_table(done.score, predictions.name), "", views_table(done.score), sep="\n")
