"""The folder of ``prepare``: how it is written and read back.

::

    train.jsonl, eval.jsonl    records.Example a line
    gold.json                  the evaluation records in FinQA's official list form; an empty list for conversations
    SPLIT.pairs.jsonl          records.Pair a line, where the data holds preferences
    SPLIT.labelled.jsonl       records.LabelledAnswer a line, where train.objective is kto and answers stand alone
    tokens/train, tokens/eval  datasets folders: id, input_ids, completion_mask; with a preference train.objective also
                               rejected_ids, the answer that stands behind the same prompt in the other's place; where
                               there are answers without another one (rejected_ids is then empty) also label
    not_used.jsonl             source_report.UnusedRow a line: every row that could not be used, where there is one
    report.json                prepare_report.PrepareReport
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from fintune.config import Config
from fintune.config.load import effective
from fintune.data.report import NOT_USED, PrepareReport
from fintune.data.rows_of_tokens import Sequenced
from fintune.data.source_report import UnusedRow
from fintune.errors import ArtifactError
from fintune.records import Example, FinQARecord, LabelledAnswer, Pair, Record
from fintune.util.sampling import file_of_row, stratified_indices

OPTIONS = ("run.seed", "model.name", "model.revision", "data", "prompt", "train.objective")
"""Prefixes of the options that decide the result."""


@dataclass(frozen=True)
class Prepared:
    """What goes into the folder.

    Attributes:
        report: Counts and figures.
        examples: By split.
        rows: Token rows by split.
        gold: Records of the evaluation split; none for conversations.
        unused: Rows that could not be used.
        pairs: Preference pairs by split.
        labelled: Answers with a label, without a partner, by split.
    """

    report: PrepareReport
    examples: Mapping[str, Sequence[Example]]
    rows: Mapping[str, Sequence[Sequenced]]
    gold: Sequence[FinQARecord] = ()
    unused: Sequence[UnusedRow] = ()
    pairs: Mapping[str, Sequence[Pair]] = field(default_factory=dict)
    labelled: Mapping[str, Sequence[LabelledAnswer]] = field(default_factory=dict)


def options_of(config: Config) -> dict[str, str]:
    """The options that decide what is prepared, as JSON text by dotted key."""
    return {key: json.dumps(value) for key, value in effective(config, OPTIONS).items()}


def write(folder: Path, prepared: Prepared) -> None:
    """Fill an empty folder."""
    for name, examples in prepared.examples.items():
        _write_lines(folder / f"{name}.jsonl", examples)
        _write_tokens(folder / "tokens" / name, prepared.rows[name])
    for name, pairs in prepared.pairs.items():
        if pairs:
            _write_lines(folder / f"{name}.pairs.jsonl", pairs)
    for name, labelled in prepared.labelled.items():
        if labelled:
            _write_lines(folder / f"{name}.labelled.jsonl", labelled)
    if prepared.unused:
        _write_lines(folder / NOT_USED, prepared.unused)
    gold = [record.model_dump(mode="json") for record in prepared.gold]
    (folder / "gold.json").write_text(json.dumps(gold, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "report.json").write_text(prepared.report.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _write_lines(path: Path, records: Sequence[Record]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{each.model_dump_json()}\n" for each in records)


def _write_tokens(folder: Path, rows: Sequence[Sequenced]) -> None:
    import datasets

    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "input_ids": datasets.List(datasets.Value("int32")),
            "completion_mask": datasets.List(datasets.Value("int8")),
        }
    )
    columns: dict[str, list[str] | list[bool] | list[list[int]]] = {
        "id": [row.id for row in rows],
        "input_ids": [row.input_ids for row in rows],
        "completion_mask": [row.completion_mask for row in rows],
    }
    if any(row.label is not None for row in rows):
        features["label"] = datasets.Value("bool")
        columns["label"] = [row.label is not False for row in rows]
    if any(row.rejected_ids is not None for row in rows) or "label" in columns:
        features["rejected_ids"] = datasets.List(datasets.Value("int32"))
        columns["rejected_ids"] = [row.rejected_ids or [] for row in rows]
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    finally:
        if shown:
            datasets.enable_progress_bars()


def read_report(folder: Path) -> PrepareReport:
    """The report of a finished folder.

    Raises:
        ArtifactError: It is missing or was written by another version.
    """
    try:
        return PrepareReport.model_validate_json((folder / "report.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(f"{folder / 'report.json'} cannot be read", hint="run `fintune prepare` again") from error


def read_tokens(folder: Path, split: str, num: int) -> list[Sequenced]:
    """``num`` rows of a split, spread over its files and shapes."""
    import datasets

    stored = datasets.load_from_disk(str(folder / "tokens" / split))
    labels = stored["label"] if "label" in stored.column_names else [None] * len(stored)
    rows = stored.select(stratified_indices(list(zip(map(file_of_row, stored["id"]), labels, strict=True)), num))
    return [
        Sequenced(
            str(row["id"]),
            list(row["input_ids"]),
            list(row["completion_mask"]),
            rejected_ids=row.get("rejected_ids") or None,
            label=None if row.get("rejected_ids") else row.get("label"),
        )
        for row in rows
    ]
