"""``python -m fintune``: the same as the command ``fintune``."""

from __future__ import annotations

from fintune.cli.main import main

main()
