"""The command line in tests: in this process, or in one of its own."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

KILLED_AT = Path(__file__).with_name("killed_at.py")


@dataclass(frozen=True)
class Done:
    """What a command left: its exit status, standard output and standard error."""

    status: int
    out: str
    err: str


def fintune(*arguments: object, command: click.Command | None = None) -> Done:
    """Run a command in this process; that of a script where one is given."""
    from fintune.cli.main import main

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["fintune", *map(str, arguments)]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(command)
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = before
    return Done(status, out.getvalue(), err.getvalue())


def fintune_process(*arguments: object) -> Done:
    """Run a command as a user does; what native libraries write is caught, too."""
    return _process([sys.executable, "-m", "fintune.cli.main", *map(str, arguments)])


def fintune_killed(where: str, number: int, *arguments: object) -> Done:
    """Run a command in a process that is killed at the so many-th call of ``module:function``."""
    return _process([sys.executable, str(KILLED_AT), where, str(number), *map(str, arguments)])


def _process(command: list[str]) -> Done:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"})
    return Done(done.returncode, done.stdout, done.stderr)
