"""A row's values under the names that the shapes know: lower case, mapped columns, aliases, lists of turns."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Final

from fintune.sources.rows import BrokenRowError

Fields = Mapping[str, object]
"""A row's values by name in lower case."""

TURNS: Final = ("messages", "conversations")
"""Fields that hold turns, also as JSON text."""
ALIASES: Final = {"response": "completion", "conversation": "messages", "system_prompt": "system"}
"""Other names of fields."""


def fields_of(row: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """The row's values by name; of ``messages`` and ``conversations`` only that which fits the turns is there.

    Args:
        row: As it was parsed.
        columns: Names of fields in the row; a dot goes into an object.

    Raises:
        BrokenRowError: A mapped column is not in the row, with the one that may have been meant.
    """
    fields = {str(name).strip().lower(): value for name, value in row.items()}
    mapped = {field.lower(): _column(row, column) for field, column in columns.items()}
    fields |= mapped
    for name, known in ALIASES.items():
        if name in fields and known not in mapped and fields.get(known) in (None, "", []):
            fields[known] = fields[name]
    turns = fields.get("messages") if fields.get("messages") is not None else fields.get("conversations")
    first = _first(turns)
    if isinstance(first, dict) and "role" not in first and "from" in first:
        fields["conversations"], fields["messages"] = turns, None
    elif turns is not None:
        fields["messages"], fields["conversations"] = turns, None
    return {name: value for name, value in fields.items() if name not in TURNS or value is not None}


def _first(turns: object) -> object:
    if isinstance(turns, str):  # a list as text in a cell
        try:
            turns = json.loads(turns)
        except ValueError:
            return None
    return turns[0] if isinstance(turns, list) and turns else None


def _column(row: Mapping[str, object], column: str) -> object:
    if column in row:
        return row[column]
    value: object = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            near = difflib.get_close_matches(column, list(map(str, row)), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(map(str, row))}"
            raise BrokenRowError("no such column", "the column is not in the row", field=column, hint=hint)
        value = value[part]
    return value
