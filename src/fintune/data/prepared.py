"""The folder of ``prepare``: write it and read it back.

::

    train.jsonl, eval.jsonl    records.Example, one a line
    gold.json                  the evaluation records in FinQA's official list form; an empty list for conversations
    SPLIT.pairs.jsonl          records.Pair, one a line, if the data has preference pairs
    SPLIT.labelled.jsonl       records.LabelledAnswer, one a line, if train.objective is kto and answers have labels
    tokens/train, tokens/eval  datasets folders with the columns id, input_ids and completion_mask. With preference
                               pairs also rejected_ids, the other answer, which comes after the same prompt. With
                               labelled answers also label; rejected_ids is then empty for them
    not_used.jsonl             tokenize.DroppedRow, one a line: every row that could not be used, if there is one
    report.json                report.PrepareReport
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from fintune.config import Config
from fintune.config.load import effective
from fintune.data.report import NOT_USED, PrepareReport
from fintune.data.tokenize import DroppedRow, TokenizedExample, TokenRow
from fintune.errors import ArtifactError
from fintune.records import FinQARecord, LabelledAnswer, Pair, Record
from fintune.util.sampling import file_of_row, stratified_indices

if TYPE_CHECKING:
    import pyarrow

OPTIONS = ("run.seed", "model.name", "model.revision", "data", "prompt", "train.objective")
"""Prefixes of the options that decide the result."""


@dataclass(frozen=True)
class Prepared:
    """The content of the folder.

    Attributes:
        report: The report.
        examples: Tokenized examples by split.
        gold: Records of the evaluation split; none for conversations.
        unused: Rows that could not be used.
        pairs: Preference pairs by split.
        labelled: Answers with a label, without a partner, by split.
    """

    report: PrepareReport
    examples: Mapping[str, Sequence[TokenizedExample]]
    gold: Sequence[FinQARecord] = ()
    unused: Sequence[DroppedRow] = ()
    pairs: Mapping[str, Sequence[Pair]] = field(default_factory=dict)
    labelled: Mapping[str, Sequence[LabelledAnswer]] = field(default_factory=dict)

    def rows(self, split: str) -> list[TokenRow]:
        """Return the token rows of a split."""
        return [row for result in self.examples[split] for row in result.rows]


def deciding_options(config: Config) -> dict[str, str]:
    """Return the options that decide what is prepared, as JSON text by dotted key."""
    return {key: json.dumps(value) for key, value in effective(config, OPTIONS).items()}


def write_prepared(folder: Path, prepared: Prepared) -> None:
    """Fill an empty folder."""
    for name, results in prepared.examples.items():
        _write_lines(folder / f"{name}.jsonl", (result.example for result in results))
        _write_tokens(folder / "tokens" / name, prepared.rows(name))
    for name, pairs in prepared.pairs.items():
        if pairs:
            _write_lines(folder / f"{name}.pairs.jsonl", pairs)
    for name, labelled in prepared.labelled.items():
        if labelled:
            _write_lines(folder / f"{name}.labelled.jsonl", labelled)
    if prepared.unused:
        lines = (row.model_dump_json(exclude={"category"}) for row in prepared.unused)
        (folder / NOT_USED).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    gold = [record.model_dump(mode="json") for record in prepared.gold]
    (folder / "gold.json").write_text(json.dumps(gold, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "report.json").write_text(prepared.report.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _write_lines(path: Path, records: Iterable[Record]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{record.model_dump_json()}\n" for record in records)


def _write_tokens(folder: Path, rows: Sequence[TokenRow]) -> None:
    import datasets
    import pyarrow

    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "input_ids": datasets.List(datasets.Value("int32")),
            "completion_mask": datasets.List(datasets.Value("int8")),
        }
    )
    columns: dict[str, list[str] | list[bool] | pyarrow.Array] = {
        "id": [row.id for row in rows],
        "input_ids": _list_array([row.input_ids for row in rows], pyarrow.int32()),
        "completion_mask": _list_array([row.completion_mask for row in rows], pyarrow.int8()),
    }
    if any(row.label is not None for row in rows):
        features["label"] = datasets.Value("bool")
        columns["label"] = [row.label is not False for row in rows]
    if any(row.rejected_ids is not None for row in rows) or "label" in columns:
        features["rejected_ids"] = datasets.List(datasets.Value("int32"))
        columns["rejected_ids"] = _list_array([row.rejected_ids or () for row in rows], pyarrow.int32())
    is_shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    finally:
        if is_shown:
            datasets.enable_progress_bars()


def _list_array(values: Sequence[Sequence[int]], type_: pyarrow.DataType) -> pyarrow.Array:
    """Return lists of numbers as an Arrow array, without a Python object for every number."""
    import numpy as np
    import pyarrow

    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = np.empty(int(offsets[-1]), dtype=type_.to_pandas_dtype())
    for value, start, stop in zip(values, offsets[:-1], offsets[1:], strict=True):
        flat[start:stop] = value
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat))


def read_report(folder: Path) -> PrepareReport:
    """Read the report of a finished folder.

    Raises:
        ArtifactError: It is missing, or another version wrote it.
    """
    try:
        return PrepareReport.model_validate_json((folder / "report.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(f"{folder / 'report.json'} cannot be read", hint="run `fintune prepare` again") from error


def read_tokens(folder: Path, split: str, number: int) -> list[TokenRow]:
    """Read some rows of a split, with rows of all its files and labels."""
    import datasets

    stored = datasets.load_from_disk(str(folder / "tokens" / split))
    labels = stored["label"] if "label" in stored.column_names else [None] * len(stored)
    rows = stored.select(stratified_indices(list(zip(map(file_of_row, stored["id"]), labels, strict=True)), number))
    return [
        TokenRow(
            str(row["id"]),
            list(row["input_ids"]),
            list(row["completion_mask"]),
            rejected_ids=row.get("rejected_ids") or None,
            label=None if row.get("rejected_ids") else row.get("label"),
        )
        for row in rows
    ]
