"""A row's values under the names that the shapes know: lower case, mapped columns, aliases, lists of turns."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from fintune.data.rows import BrokenRowError

Fields = Mapping[str, object]
"""A row's values by name in lower case."""

TURNS: Final = ("messages", "conversations")
"""Fields that hold turns, also as JSON text."""
ALIASES: Final = {"response": "completion", "conversation": "messages", "system_prompt": "system"}
"""Other names of fields."""


class Named(NamedTuple):
    """A row under the names that the shapes know.

    Attributes:
        fields: The values.
        written: How the row itself names each of them, for messages.
    """

    fields: dict[str, object]
    written: dict[str, str]

    def as_written(self, field: str) -> str:
        """``Antwort`` for ``answer``, ``dialog[1].role`` for ``messages[1].role``."""
        name = re.match(r"\w*", field)
        known = name.group() if name else ""
        return self.written.get(known, known) + field[len(known) :] if known else field


def fields_of(row: Mapping[str, object], columns: Mapping[str, str]) -> Named:
    """The row's values by name; of ``messages`` and ``conversations`` only that which fits the turns is there.

    Args:
        row: As it was parsed.
        columns: Names of fields in the row, in any case where only one fits; a dot goes into an object.

    Raises:
        BrokenRowError: A mapped column is not in the row, with the one that may have been meant.
    """
    fields = {str(name).strip().lower(): value for name, value in row.items()}
    written = {str(name).strip().lower(): str(name) for name in row}
    mapped = {field.lower(): _column(row, column) for field, column in columns.items()}
    fields |= {field: value for field, (_, value) in mapped.items()}
    written |= {field: name for field, (name, _) in mapped.items()}
    for name, known in ALIASES.items():
        if name in fields and known not in mapped and fields.get(known) in (None, "", []):
            fields[known], written[known] = fields[name], written[name]
    held = "messages" if fields.get("messages") is not None else "conversations"
    turns = fields.get(held)
    if turns is not None:
        first = _first(turns)
        is_sharegpt = isinstance(first, dict) and "role" not in first and "from" in first
        known, other = ("conversations", "messages") if is_sharegpt else ("messages", "conversations")
        fields[known], written[known], fields[other] = turns, written[held], None
    return Named({name: value for name, value in fields.items() if name not in TURNS or value is not None}, written)


def key_of(row: Mapping[str, object], column: str) -> str | None:
    """The row's own name of a column: that very name, or the only one that differs in case alone."""
    if column in row:
        return column
    alike = [name for name in row if str(name).strip().lower() == column.strip().lower()]
    return alike[0] if len(alike) == 1 else None


def _first(turns: object) -> object:
    if isinstance(turns, str):  # a list as text in a cell
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            return None
    return turns[0] if isinstance(turns, list) and turns else None


def _column(row: Mapping[str, object], column: str) -> tuple[str, object]:
    """A column's name as the row writes it, and its value."""
    whole = key_of(row, column)
    if whole is not None:
        return whole, row[whole]
    value: object = row
    for part in column.split("."):
        key = key_of(value, part) if isinstance(value, Mapping) else None
        if key is None or not isinstance(value, Mapping):
            names = list(map(str, row))
            near = [name for name in names if name.strip().lower() == column.strip().lower()]
            near = near or difflib.get_close_matches(column, names, n=1)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
            raise BrokenRowError("no such column", "the column is not in the row", field=column, hint=hint)
        value = value[key]
    return column, value
