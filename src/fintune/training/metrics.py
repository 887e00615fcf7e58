"""metrics.jsonl: one JSON object a line, in order of steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a torn last one is left out. An absent file has none."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def cut(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop the lines behind a step, atomically.

    Returns:
        The lines that stay.
    """
    kept = [line for line in read(path) if line["step"] <= last_step]
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    beside.replace(path)
    return kept


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line and hand it to the operating system at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
