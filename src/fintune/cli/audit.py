"""``fintune audit``, a command of :mod:`fintune.cli.main`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from fintune.cli.common import FILE, stdout


@click.command()
@click.argument("files", type=FILE, nargs=-1, required=True, metavar="FILE...")
@click.option("--json", type=FILE, help="Write all figures and the ids of every finding here.")
@click.option("--write-splits", type=FILE, metavar="DIR", help="Write the files anew, divided by --by.")
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
    from fintune.cli.commands.audit import audit_files
    from fintune.util.text import abridge_remarks

    done = audit_files(files, json=json, write_splits=write_splits, by=by, strict=strict)
    for problem in abridge_remarks(done.problems):
        sys.stderr.write(f"fintune: {problem}\n")
    done.show(stdout())
