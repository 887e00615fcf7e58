"""A saved dataset folder (``datasets.save_to_disk``) as the data of a run: what the older training script is given."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fintune.errors import DataError, ResourceError

_RECORDS = "records.jsonl"
_TRAIN, _EVAL = ("train", "training"), ("validation", "valid", "dev", "eval", "test")
_COLUMNS = ("id", "question", "program", "exe_ans", "pre_text", "table", "post_text")


def split_folders(folder: Path) -> tuple[Path, Path | None]:
    """The folders to train and to evaluate on.

    Args:
        folder: One dataset, or one folder a split: a saved DatasetDict, or what ``scripts/preprocess.py`` wrote.

    Returns:
        To train on; to evaluate on, None where there is none.

    Raises:
        DataError: It is no such folder.
    """
    if _is_dataset(folder):
        return folder, None
    train = next((folder / name for name in _TRAIN if _is_dataset(folder / name)), None)
    if train is None:
        what = "no such folder" if not folder.exists() else "no saved dataset in it, nor in a folder train of it"
        raise DataError(what, path=folder, hint="give what scripts/preprocess.py or datasets.save_to_disk wrote")
    return train, next((folder / name for name in _EVAL if _is_dataset(folder / name)), None)


def _is_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / _RECORDS).is_file()


def finqa_file(folder: Path, beside: Path) -> Path | None:
    """The FinQA records of a dataset folder as a file that ``data.train`` and ``data.eval`` can name.

    Args:
        folder: Of one split.
        beside: Written where the folder does not hold the records themselves but has all columns that make one.

    Returns:
        None where its rows are no FinQA records.

    Raises:
        DataError: The folder cannot be read.
        ResourceError: The package datasets is missing.
    """
    if (folder / _RECORDS).is_file():
        return folder / _RECORDS
    try:
        import datasets
    except ImportError:
        raise ResourceError(
            "a dataset folder needs the package datasets", hint="pip install 'fintune[train]'"
        ) from None
    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"not a saved dataset ({str(error).splitlines()[0]})", path=folder) from None
    if any(name not in rows.column_names for name in _COLUMNS):
        return None
    beside.parent.mkdir(parents=True, exist_ok=True)
    part = beside.with_name(f".{beside.name}.tmp")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in _records(rows))
    part.replace(beside)
    return beside


def _records(rows: Any) -> Iterator[dict[str, Any]]:
    row: Mapping[str, Any]
    for row in rows:
        qa = {"question": row["question"], "program": row["program"], "exe_ans": _number(row["exe_ans"])}
        yield {name: row[name] for name in ("id", "pre_text", "post_text", "table")} | {"qa": qa}


def _number(text: object) -> object:
    try:
        return float(str(text))
    except ValueError:
        return text  # yes or no
