"""The verb ``fintune audit``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from fintune.cli.common import FILE, print_tables, stdout


@click.command()
@click.argument("files", type=FILE, nargs=-1, required=True, metavar="FILE...")
@click.option("--json", type=FILE, help="Write all figures, and the ids of every finding, to this file.")
@click.option("--write-splits", type=FILE, metavar="DIR", help="Write the records to DIR, split by --by.")
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
    """Report unusual records of FinQA files and overlap between them. Needs no torch."""
    from fintune.cli.commands.audit import audit_files
    from fintune.util.text import abridge_remarks

    result = audit_files(files, json=json, write_splits=write_splits, by=by, strict=strict)
    for problem in abridge_remarks(result.problems):
        sys.stderr.write(f"fintune: {problem}\n")
    print_tables(list(result.tables()))
    if result.resplit is not None:
        repeated = result.resplit.num_repeated
        left_out = f"; {repeated} repeated ids are left out" if repeated else ""
        line = f"\n{write_splits}: no two of these files share a {by}{left_out}"
        stdout().print(line, markup=False, highlight=False, soft_wrap=True)
