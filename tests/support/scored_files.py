"""Gold records and predictions of the tests that score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fintune.records import Prediction

PROGRAMS = {"a": "add(1, 2)", "b": "divide(1, 4)", "c": "greater(1, 2)"}
ANSWERS: dict[str, float | str] = {"a": 3.0, "b": 0.25, "c": "no"}


def gold_row(name: str) -> dict[str, Any]:
    """A gold record as FinQA's files hold it."""
    qa = {"question": "what?", "program": PROGRAMS[name], "exe_ans": ANSWERS[name]}
    return {"id": name, "pre_text": ["x"], "post_text": [], "table": [["", "y"], ["r", "1"]], "qa": qa}


def official_row(name: str) -> dict[str, Any]:
    """The gold program as a prediction in official tokens."""
    operation, arguments = PROGRAMS[name][:-1].split("(")
    return {"id": name, "predicted": [f"{operation}(", *arguments.split(", "), ")", "EOF"]}


def text_row(name: str) -> dict[str, Any]:
    """The gold program as a prediction in linear form."""
    return {"id": name, "program": PROGRAMS[name]}


def run_row(name: str) -> dict[str, Any]:
    """The gold program as a line of a run's predictions.jsonl."""
    program = PROGRAMS[name]
    return Prediction(
        id=name, text=program, program=program, finish_reason="stop", seconds=1, num_prompt_tokens=9
    ).model_dump(mode="json")


def write_gold(folder: Path) -> Path:
    """Write the gold file."""
    path = folder / "gold.json"
    path.write_text(json.dumps([gold_row(name) for name in PROGRAMS]))
    return path


def write_rows(folder: Path, rows: list[Any]) -> Path:
    """Write predictions as one JSON list."""
    path = folder / "predictions.json"
    path.write_text(json.dumps(rows))
    return path
