"""A FinQA file to a Hugging Face dataset folder, without a model: what ``scripts/preprocess.py`` calls.

::

    *.arrow, dataset_info.json, state.json   for datasets.load_from_disk; the columns are `features`
    records.jsonl                            records.FinQARecord a line, which data.train and data.eval read

``prompt`` and ``completion`` are conversations as TRL's trainers take them. The prompt holds the whole page: what fits
depends on a tokenizer, and is cut by ``fintune prepare``.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fintune.config import PromptOptions
from fintune.data.finqa_json import WITHOUT_STRICT, read_finqa
from fintune.errors import FintuneError, ResourceError
from fintune.finqa.evidence import derive
from fintune.finqa.program import tokenize
from fintune.finqa.prompt import build_messages
from fintune.records import FinQARecord
from fintune.util import files as outputs

if TYPE_CHECKING:
    from datasets import Features

RECORDS = "records.jsonl"
_ARROW = re.compile(r"(?:data|cache)-[\w.-]+\.arrow")

_Messages: TypeAlias = list[dict[str, str]]
_Column: TypeAlias = str | Sequence[str] | Sequence[Sequence[str]] | _Messages | None


@dataclass(frozen=True)
class Preprocessed:
    """What became of a file.

    Attributes:
        num_records: Rows of the dataset.
        dropped: Records that were left out, by reason.
        problems: One line for each record that was left out: file, row, id, why.
    """

    num_records: int
    dropped: Mapping[str, int]
    problems: list[str]


def preprocess(source: Path, folder: Path, *, strict: bool = False, system: str | None = None) -> Preprocessed:
    """Write the dataset folder of a FinQA file; one that was written before is replaced when the new one is whole.

    Args:
        source: FinQA JSON list or lines, plain or gzip.
        folder: Does not exist, is empty, or was written by this function.
        strict: Refuse a file with a record that cannot be used instead of leaving that record out.
        system: System message of the prompts, ``prompt.system``'s default where None; none where empty.

    Raises:
        DataError: The file cannot be read, no record of it can be used, or, with ``strict``, one cannot.
        FintuneError: Something else is at ``folder`` or in it, ``source`` is in it, or it cannot be written.
        ResourceError: The package datasets is missing.
    """
    if not _may_replace(folder):
        raise FintuneError(
            f"{folder}: exists and holds more than a dataset that this command wrote",
            hint="move it away or name another folder",
        )
    if folder.resolve() in source.resolve().parents:
        raise FintuneError(f"{source}: stands in the folder that would be replaced", hint="name another folder")
    read = read_finqa(source, strict=strict, instead=WITHOUT_STRICT)
    message = PromptOptions().system if system is None else system
    outputs.make_folder(folder.parent)
    # In a folder of its own beside the target, so that a stop half-way leaves what was there.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        made, old = Path(work) / "made", Path(work) / "old"
        made.mkdir()
        _save(read.records, made, message)
        with (made / RECORDS).open("w", encoding="utf-8") as file:
            file.writelines(record.model_dump_json() + "\n" for record in read.records)
        if folder.exists():
            folder.rename(old)
        made.rename(folder)
    return Preprocessed(len(read.records), dict(read.dropped.most_common()), read.problems)


def row(record: FinQARecord, system: str) -> dict[str, _Column]:
    """A record as one row of the dataset."""
    built = build_messages(record, system=system, budget=2**62, count_tokens=len)
    qa = record.qa
    return {
        "id": record.id,
        "question": qa.question,
        "program": qa.program,
        "exe_ans": str(qa.exe_ans),
        "answer": qa.answer,
        "evidence": None if qa.gold_inds is None else list(qa.gold_inds),
        "derived_evidence": _derived(record) if qa.gold_inds is None else None,
        "pre_text": record.pre_text,
        "table": record.table,
        "post_text": record.post_text,
        "prompt": [turn.model_dump() for turn in built.messages],
        "completion": [{"role": "assistant", "content": qa.program.strip()}],
    }


def _derived(record: FinQARecord) -> list[str]:
    sentences = [*record.pre_text, *record.post_text]
    return list(derive(tokenize(record.qa.program), record.table, sentences, record.qa.question).units)


def features() -> Features:
    """The columns of the dataset; ``exe_ans`` is text, since it is a number for most questions, else yes or no."""
    from datasets import Features, List, Value

    text = Value("string")
    turns = List({"role": text, "content": text})
    return Features(
        {
            "id": text,
            "question": text,
            "program": text,
            "exe_ans": text,
            "answer": text,
            "evidence": List(text),
            "derived_evidence": List(text),
            "pre_text": List(text),
            "table": List(List(text)),
            "post_text": List(text),
            "prompt": turns,
            "completion": turns,
        }
    )


def _save(records: Sequence[FinQARecord], folder: Path, system: str) -> None:
    try:
        import datasets
    except ImportError:
        raise ResourceError(
            "a dataset folder needs the package datasets", hint="pip install 'fintune[train]'"
        ) from None
    rows = [row(record, system) for record in records]
    columns = {name: [each[name] for each in rows] for name in rows[0]}
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_dict(columns, features=features()).save_to_disk(str(folder))
    finally:
        if shown:
            datasets.enable_progress_bars()


def _may_replace(folder: Path) -> bool:
    if not folder.exists():
        return not folder.is_symlink()
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    own = {RECORDS, "dataset_info.json", "state.json"}
    # A file that someone put beside is kept, and so is the folder; what `datasets` computed from ours is not theirs.
    return not names or (own <= names and all(_ARROW.fullmatch(name) for name in names - own))
