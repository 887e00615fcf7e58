"""``fintune audit``: what is odd about FinQA files, what they share, and splits that share no report or company."""

from __future__ import annotations

import json as json_
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fintune.data.disjoint import Disjoint, divide
from fintune.data.finqa_json import WITHOUT_STRICT, read_finqa, read_objects
from fintune.errors import DataError, FintuneError
from fintune.evaluation.audit import KINDS, SplitAudit, audit_split
from fintune.evaluation.overlap import Overlap, overlaps
from fintune.finqa.identity import Level
from fintune.records import Record
from fintune.report.audit_table import evidence_table, findings_table, overlap_table, splits_table
from fintune.util import files as outputs
from fintune.util.files import check_outputs, write_output

ENDINGS = (".gz", ".json", ".jsonl")


class Audit(Record):
    """The whole of it, as ``--json`` writes it.

    Attributes:
        kinds: Meaning of the findings.
        splits: By name of the file.
        overlaps: Each two of them.
    """

    kinds: dict[str, str]
    splits: dict[str, SplitAudit]
    overlaps: tuple[Overlap, ...]


@dataclass(frozen=True)
class AuditRun:
    """What `audit_files` did.

    Attributes:
        audit: All figures.
        problems: A line for each record that cannot be used.
        divided: The splits that were written, None where none were asked for.
        by: What the new splits do not share.
        folder: Where they are.
    """

    audit: Audit
    problems: tuple[str, ...]
    divided: Disjoint | None
    by: Level
    folder: Path | None = None

    def show(self, console: Console) -> None:
        """Print the tables."""
        console.print(findings_table(self.audit.splits), "", evidence_table(self.audit.splits), sep="\n")
        for each in self.audit.overlaps:
            console.print("", overlap_table(each), sep="\n")
        if self.divided:
            new = self.divided
            rows = [
                (f"{name}.json", new.num_before[name], len(kept), new.num_came[name], len(new.groups[name]))
                for name, kept in new.splits.items()
            ]
            console.print("", splits_table(rows, self.by), "", sep="\n")
            left_out = f"; {new.num_repeated} repeated ids are left out" if new.num_repeated else ""
            told = f"{self.folder}: no two of these files share a {self.by}{left_out}"
            console.print(told, markup=False, highlight=False, soft_wrap=True)


def audit_files(
    files: Sequence[Path],
    *,
    json: Path | None = None,
    write_splits: Path | None = None,
    by: Level = "report",
    strict: bool = False,
) -> AuditRun:
    """Look at FinQA files.

    Args:
        files: FinQA JSON or JSON lines, plain or gzip; a file's name without endings is its split's.
        json: Write all figures here.
        write_splits: Write ``NAME.json`` for each file here, and ``splits.json`` about them: the same records with all
            their keys, divided so that no two files share a report or company. Nothing there is overwritten.
        by: "report" or "company".
        strict: Stop at the first record that cannot be used.

    Raises:
        DataError: A file cannot be read, holds no usable record, or ``strict`` and a record is broken.
        FintuneError: Two files of one name, one file to divide, or a place that cannot be written.
    """
    names = _names(files)
    check_outputs((json,), inputs=files)
    if write_splits is not None:
        _check_target(write_splits, names)
    read = {
        name: read_finqa(path, strict=strict, instead=WITHOUT_STRICT) for name, path in zip(names, files, strict=True)
    }
    records = {name: result.records for name, result in read.items()}
    divided = divide(records, by) if write_splits is not None else None
    if divided is not None:
        _check_divided(divided, by)
    audit = Audit(
        kinds=dict(KINDS),
        splits={name: audit_split(result.records, result.dropped) for name, result in read.items()},
        overlaps=tuple(overlaps(records)),
    )
    if json is not None:
        write_output(json, audit.model_dump_json(indent=2) + "\n")
    if write_splits is not None and divided is not None:
        _write(write_splits, divided, by, files)
    problems = tuple(line for result in read.values() for line in result.problems)
    return AuditRun(audit, problems, divided, by, write_splits)


def _names(files: Sequence[Path]) -> list[str]:
    names: list[str] = []
    for path in files:
        name = path.name
        while (end := next((end for end in ENDINGS if name.endswith(end) and name != end), None)) is not None:
            name = name.removesuffix(end)
        if name in names:
            other = files[names.index(name)]
            raise FintuneError(f"{other} and {path} would both be called {name!r}", hint="rename one of them")
        names.append(name)
    return names


def _check_target(folder: Path, names: Sequence[str]) -> None:
    if len(names) < 2:
        raise FintuneError("--write-splits divides several files", hint="name the training and the evaluation file")
    if "splits" in names:
        raise FintuneError("a file called 'splits' would overwrite splits.json", hint="rename it")
    if folder.exists() and not folder.is_dir():
        raise FintuneError(f"{folder} is a file", hint="name a folder for --write-splits")
    there = [name for name in (*names, "splits") if (folder / f"{name}.json").exists()]
    if there:
        hint = "name another folder for --write-splits; nothing is overwritten"
        raise FintuneError(f"{folder / there[0]}.json is there already", hint=hint)


def _check_divided(divided: Disjoint, by: Level) -> None:
    if empty := [name for name, records in divided.splits.items() if not records]:
        raise DataError(f"divided by {by}, nothing is left for {empty[0]}", hint=f"each {by} must be in one file")


def _write(folder: Path, divided: Disjoint, by: Level, files: Sequence[Path]) -> None:
    outputs.make_folder(folder)
    objects: dict[str, dict[str, object]] = {}
    for path in files:
        objects = read_objects(path) | objects
    for name, records in divided.splits.items():
        rows = [objects[record.id] for record in records]
        write_output(folder / f"{name}.json", json_.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    told: Mapping[str, object] = {
        "by": by,
        "num_repeated": divided.num_repeated,
        "splits": {
            name: {
                "num_before": divided.num_before[name],
                "num_records": len(records),
                "num_came": divided.num_came[name],
                "groups": divided.groups[name],
            }
            for name, records in divided.splits.items()
        },
    }
    # Last: where it lies, all others do.
    write_output(folder / "splits.json", json_.dumps(told, indent=2) + "\n")
