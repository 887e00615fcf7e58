"""FinQA files as folders for ``datasets.load_from_disk``: written by ``scripts/preprocess.py``, read to train.

Beside the Arrow files ``records.jsonl`` has one ``records.FinQARecord`` a line, for ``data.train`` and ``data.eval``.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fintune.config import PromptOptions
from fintune.data.finqa_json import WITHOUT_STRICT, FinqaFile, read_finqa
from fintune.errors import DataError, FintuneError
from fintune.finqa.evidence import derive
from fintune.finqa.program import tokenize
from fintune.finqa.prompt import build_messages
from fintune.records import FinQARecord
from fintune.util.files import make_folder

_RECORDS = "records.jsonl"
_OURS = {_RECORDS, "dataset_info.json", "state.json"}
_ARROW = re.compile(r"(?:data|cache)-[\w.-]+\.arrow")
_TRAIN, _EVAL = ("train", "training"), ("validation", "valid", "dev", "eval", "test")
_QA, _PAGE = ("question", "program", "exe_ans"), ("id", "pre_text", "table", "post_text")


def preprocess(source: Path, folder: Path, *, strict: bool = False) -> FinqaFile:
    """Write the dataset folder of a FinQA file. An earlier one is replaced when the new one is complete."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # What `datasets` computed from our files may go, a file that someone put beside them may not.
    others = {name for name in names - _OURS if not _ARROW.fullmatch(name)}
    if folder.is_symlink() or folder.is_file() or (names and (others or not names >= _OURS)):
        what = f"{folder} exists and holds more than a dataset that this command wrote"
        raise FintuneError(what, hint="move it elsewhere or name another folder")
    read = read_finqa(source, strict=strict, instead=WITHOUT_STRICT)
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        new = Path(work) / "new"
        _save(read.records, new)
        _write_lines(new / _RECORDS, (record.model_dump(mode="json") for record in read.records))
        if folder.exists():
            folder.rename(Path(work) / "old")
        new.rename(folder)
    return read


def split_folders(folder: Path) -> tuple[Path, Path | None]:
    """Return the folders of a dataset, or of a folder with one dataset per split, to train on and to evaluate on."""
    names = (".", *_TRAIN, *_EVAL)
    found = [name for name in names if any((folder / name / file).is_file() for file in ("state.json", _RECORDS))]
    train = next((folder / name for name in found if name not in _EVAL), None)
    if train is None:
        what = "no saved dataset here or in a folder named train" if folder.exists() else "no such folder"
        raise DataError(what, path=folder, hint="name what scripts/preprocess.py or datasets.save_to_disk wrote")
    return train, next((folder / name for name in found if name in _EVAL and "." not in found), None)


def finqa_file(folder: Path, copy: Path) -> Path | None:
    """Return a file of a dataset folder's FinQA records (written to ``copy`` if there is none); None for other rows."""
    if (folder / _RECORDS).is_file():
        return folder / _RECORDS
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"not a saved dataset ({str(error).splitlines()[0]})", path=folder) from None
    if not {*_QA, *_PAGE} <= set(rows.column_names):
        return None
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_name(f".{copy.name}.part")
    _write_lines(part, map(_record, rows))
    return part.replace(copy)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    answer = row["exe_ans"] if row["exe_ans"] in ("yes", "no") else float(row["exe_ans"])
    return {name: row[name] for name in _PAGE} | {"qa": {name: row[name] for name in _QA} | {"exe_ans": answer}}


def _save(records: Sequence[FinQARecord], folder: Path) -> None:
    import datasets

    text = datasets.Value("string")
    texts, turns = datasets.List(text), datasets.List({"role": text, "content": text})
    kinds = dict.fromkeys(("evidence", "derived_evidence", "pre_text", "post_text"), texts)
    kinds |= {"table": datasets.List(texts), "prompt": turns, "completion": turns}
    rows = [_row(record) for record in records]
    features = datasets.Features({name: kinds.get(name, text) for name in rows[0]})
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(folder))


def _row(record: FinQARecord) -> dict[str, Any]:
    qa, sentences = record.qa, [*record.pre_text, *record.post_text]
    # The prompt holds the whole page, because only a tokenizer can tell what fits.
    prompt = build_messages(record, system=PromptOptions().system, budget=2**62, count_tokens=len).messages
    derived = derive(tokenize(qa.program), record.table, sentences, qa.question).units if qa.gold_inds is None else None
    columns = {name: getattr(record, name) for name in _PAGE} | {name: getattr(qa, name) for name in _QA}
    return columns | {
        "exe_ans": str(qa.exe_ans),  # a number for most questions, yes or no for the others
        "answer": qa.answer,
        "evidence": qa.gold_inds,
        "derived_evidence": derived,
        "prompt": [turn.model_dump() for turn in prompt],
        "completion": [{"role": "assistant", "content": qa.program.strip()}],
    }
