"""Preference pairs for tests of preference training: which of two forms an answer has decides."""

from __future__ import annotations

import json
import random
from pathlib import Path

QUESTIONS = ("net revenue", "total assets", "cash", "interest expense", "operating income")


def pair_rows(number: int) -> list[dict[str, str]]:
    """Rows of the trader's shape; the rejected answer names a table operation where a sum is asked for."""
    draw = random.Random(5)
    return [
        {
            "prompt": f"{draw.choice(QUESTIONS)} of {1900 + n} was {draw.randrange(100, 999)} . what is the sum?",
            "chosen": f"add({draw.randrange(99)}, {draw.randrange(99)})",
            "rejected": f"table_max(cash, none) {draw.randrange(9)}",
        }
        for n in range(number)
    ]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
