"""The command line, killed without warning right after the so many-th call of a function.

python killed_at.py MODULE:FUNCTION NUMBER ARGUMENT...
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from importlib import import_module


def stop_after(where: str, number: int, signal_number: signal.Signals = signal.SIGKILL) -> None:
    """Let a signal reach this process right behind the so many-th call of ``MODULE:FUNCTION``."""
    module, _, path = where.partition(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, import_module(module))
    original = getattr(owner, name)
    num_calls = 0

    @functools.wraps(original)
    def counted(*args: object, **kwargs: object) -> object:
        nonlocal num_calls
        result = original(*args, **kwargs)
        num_calls += 1
        if num_calls == number:
            os.kill(os.getpid(), signal_number)
        return result

    setattr(owner, name, counted)


def main() -> None:
    where, number, *arguments = sys.argv[1:]
    stop_after(where, int(number))
    from fintune.cli import main as cli

    sys.argv = ["fintune", *arguments]
    cli.main()


if __name__ == "__main__":
    main()
