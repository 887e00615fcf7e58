"""Tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from fintune.config.load import DEFAULT, Loaded, told

if TYPE_CHECKING:
    from fintune.evaluation.metrics import Rates


def plan_table(lines: Sequence[tuple[str, str, Sequence[str]]]) -> Table:
    """What a run would do: name, what, and the stages that are read."""
    table = Table("stage", "what", "reads", box=None, pad_edge=False)
    for name, what, inputs in lines:
        style = "dim" if what.startswith(("up to date", "skipped")) else ""
        table.add_row(name, what, ", ".join(inputs) if len(inputs) < 4 else "all of them", style=style)
    return table


def config_table(loaded: Loaded) -> Table:
    """Every option, its value and where that came from."""
    table = Table("option", "value", "from", box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"  # a cut value or place would be no answer
    for key, value in told(loaded.config).items():
        origin = _origin(key, loaded.origin)
        table.add_row(key, json.dumps(value), origin, style="dim" if origin == DEFAULT else "")
    return table


def _origin(key: str, origins: Mapping[str, str]) -> str:
    return origins.get(key, DEFAULT)


def score_table(scores: Mapping[str, Rates], what: str = "predictions") -> Table:
    """Official figures, a row a set of predictions; and completions without a program where there are any."""
    columns = (what, "n", "execution accuracy", "95 % interval", "program accuracy", "invalid")
    without = any(score.no_program_rate for score in scores.values())
    table = Table(*columns, *(["no program"] if without else []), box=None, pad_edge=False)
    for name, score in scores.items():
        low, high = score.execution_accuracy_interval
        table.add_row(
            name,
            str(score.num_predictions),
            f"{score.execution_accuracy:.2%}",
            f"{100 * low:.1f} to {high:.1%}",
            f"{score.program_accuracy:.2%}",
            f"{score.invalid_rate:.2%}",
            *([f"{score.no_program_rate:.2%}"] if without else []),
        )
    for column in table.columns[1:]:
        column.justify = "right"
    return table
