"""What became of the rows of a source, for the report of the data and for the user."""

from __future__ import annotations

from pydantic import Field

from fintune.data.licences import Licence
from fintune.errors import DataError
from fintune.records import Record


class UnusedRow(Record):
    """A row that could not be used, as ``not_used.jsonl`` of a prepared folder lists it.

    Attributes:
        file: Where it is; of a dataset with the split.
        row: From 1, as `fintune.data.rows.Row` numbers it; None where only the id is known.
        field: Which field, as ``messages[1].role``; empty where the whole row is meant.
        reason: What is wrong with it.
        hint: What to do.
        id: The record's, where it has one.
    """

    file: str
    row: int | None = None
    field: str = ""
    reason: str
    hint: str = ""
    id: str = ""

    def error(self) -> DataError:
        """It as an error."""
        what = f"{self.field}: {self.reason}" if self.field else self.reason
        return DataError(what, path=self.file or None, row=self.row, record_id=self.id or None, hint=self.hint or None)

    def told(self) -> str:
        """It in a line."""
        return str(self.error())


class SourceReport(Record):
    """What became of an entry of ``data.sources``.

    Attributes:
        path: As the user wrote it.
        licence: What it may be used for.
        num_rows: Rows that it holds.
        shapes: Usable rows by shape.
        files: The same by file, where there are several.
        dropped: Rows that were left out, by reason.
        num_trailing: Turns behind the last answer of their conversation, which were left out.
        num_thoughts: Thoughts in a field of their own, which were left out.
        unread: Files of a folder that are no data, in words; empty where there are none.
        num_train: Conversations to train on, before the weight.
        num_eval: Conversations held out.
        weight: How often one pass holds each.
    """

    path: str
    licence: Licence
    num_rows: int
    shapes: dict[str, int]
    files: dict[str, dict[str, int]] = Field(default_factory=dict)
    dropped: dict[str, int]
    num_trailing: int = 0
    num_thoughts: int = 0
    unread: str = ""
    num_train: int
    num_eval: int
    weight: float

    def told(self) -> list[str]:
        """What was found, for the user: a line, one for each file where there are several, one for what is no data."""
        shapes = ", ".join(f"{number} {shape}" for shape, number in self.shapes.items())
        dropped = ", ".join(f"{number} {reason}" for reason, number in self.dropped.items())
        times = f", each {self.weight:g} times" if self.weight != 1 else ""
        lines = [
            f"{self.path}: {self.num_rows} rows: {shapes}"
            + (f"; dropped {dropped}" if dropped else "")
            + (f"; {self.num_trailing} turns without an answer left out" if self.num_trailing else "")
            + (f"; {self.num_thoughts} thoughts in a field of their own left out" if self.num_thoughts else "")
            + f"; {self.num_train} to train on{times}, {self.num_eval} held out; licence {self.licence.name}"
        ]
        for file, found in self.files.items():
            lines.append(f"  {file}: " + (", ".join(f"{n} {shape}" for shape, n in found.items()) or "no usable row"))
        if self.unread:
            lines.append(f"{self.path}: {self.unread}")
        return lines
