"""SIGTERM ends a command as Ctrl-C does: with a word, with what it started, and with a status of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fintune.util import signals as stopping
from fintune.util.signals import RESUME_MESSAGE, interrupt_message, sigterm_as_interrupt

COMMAND = """
import subprocess, sys
import click
from fintune.cli.main import main
from fintune.util.signals import RESUME_MESSAGE, interrupt_message

@click.command()
@click.argument("words", nargs=-1)
def convert(words):
    with interrupt_message(RESUME_MESSAGE):
        subprocess.run([sys.executable, "-c", *words])

main(convert)
"""
TOOL = """
import os, pathlib, signal, sys, time
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


def test_sigterm_ends_the_tool_at_work_and_says_how_to_go_on(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    command = [sys.executable, "-c", COMMAND, TOOL, str(file)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (143, f"fintune: {RESUME_MESSAGE}")
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_a_fork_is_ended_by_sigterm_as_ever() -> None:
    with sigterm_as_interrupt():
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_existing_handler_and_other_threads_are_kept() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def look() -> None:
        with sigterm_as_interrupt():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]
    with sigterm_as_interrupt():
        outer = signal.getsignal(signal.SIGTERM)
        look()
    assert found[1:] == [outer] != [before]
    assert signal.getsignal(signal.SIGTERM) is before


def test_interrupt_message_keeps_an_earlier_message() -> None:
    with pytest.raises(stopping.Terminated, match=r"^goes on from step 3$"), interrupt_message("interrupted"):
        raise stopping.Terminated("goes on from step 3")
    with pytest.raises(stopping.Terminated, match=r"^interrupted$"), interrupt_message("interrupted"):
        raise stopping.Terminated
