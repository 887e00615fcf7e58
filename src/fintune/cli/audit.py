"""``fintune audit``: audit FinQA files, and split them so that no two share a report or company."""

from __future__ import annotations

import json as json_module
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from fintune.cli.common import FILE, echo, print_tables
from fintune.data.finqa_json import WITHOUT_STRICT, read_finqa, read_objects
from fintune.errors import DataError, FintuneError
from fintune.evaluation.audit import FINDINGS, NEAR, Overlap, SplitAudit, Splits, audit_split, find_overlaps
from fintune.finqa.evidence import Agreement
from fintune.finqa.page import Level, group_of
from fintune.records import FinQARecord, Record
from fintune.report.tables import plain_table
from fintune.util.files import check_outputs, make_folder, write_output
from fintune.util.text import abridge_remarks

_SIZES = {"records": "num_records", "pages": "num_pages", "reports": "num_reports", "companies": "num_companies"}
_SHARED = {
    "id": "ids",
    "page": "pages",
    "report": "reports",
    "company": "companies",
    "page_text": "pages of the same text",
    "question": "questions of the same words",
    "near_question": f"pairs of questions that share {NEAR:.0%} of their words",
}
_AGREEMENT: Mapping[Agreement, str] = {
    "exact": "the same",
    "covers": "all of it and more",
    "within": "a part of it",
    "overlaps": "a part of it and other units",
    "apart": "other units",
}


@click.command("audit")
@click.argument("files", type=FILE, nargs=-1, required=True, metavar="FILE...")
@click.option("--json", type=FILE, help="Write all figures, and the ids of every finding, to this file.")
@click.option("--write-splits", type=FILE, metavar="DIR", help="Write the records to DIR, split by --by.")
@click.option(
    "--by",
    type=click.Choice(["report", "company"]),
    default="report",
    show_default=True,
    help="What no two of the written files may share.",
)
@click.option("--strict", is_flag=True, help="Stop at the first record that cannot be used.")
def audit_command(files: tuple[Path, ...], write_splits: Path | None, by: Level, **options: Any) -> None:
    """Report data problems in FinQA files and the overlap between them. Needs no torch."""
    result = audit_files(files, write_splits=write_splits, by=by, **options)
    for problem in abridge_remarks(result.problems):
        sys.stderr.write(f"fintune: {problem}\n")
    splits, new = result.audit.splits, result.resplit
    tables = [_findings_table(splits), _evidence_table(splits), *map(_overlap_table, result.audit.overlaps)]
    print_tables(*tables, *([_resplit_table(new)] if new is not None else []))
    if new is not None:
        repeated = new.num_repeated
        left_out = f"; {repeated} repeated ids are left out" if repeated else ""
        echo(f"\n{write_splits}: no two of these files share a {by}{left_out}")


class Audit(Record):
    """The content of the ``--json`` file: meaning of the findings, audits by file name, and overlaps."""

    kinds: dict[str, str]
    splits: dict[str, SplitAudit]
    overlaps: tuple[Overlap, ...]


@dataclass(frozen=True)
class Resplit:
    """A new division of the records of several files; all mappings are by file name.

    Attributes:
        num_moved: Number of records of each file that come from another file.
        num_repeated: Number of records that are left out because an earlier one has their id.
        groups: Reports or companies of each file, sorted.
    """

    splits: dict[str, list[FinQARecord]]
    num_before: dict[str, int]
    num_moved: dict[str, int]
    num_repeated: int
    groups: dict[str, list[str]]


@dataclass(frozen=True)
class AuditResult:
    """The audit, a line for each unusable record, and the new division if one was written."""

    audit: Audit
    problems: tuple[str, ...]
    resplit: Resplit | None = None


def audit_files(
    files: Sequence[Path],
    *,
    json: Path | None = None,
    write_splits: Path | None = None,
    by: Level = "report",
    strict: bool = False,
) -> AuditResult:
    """Audit FinQA files (JSON or lines, plain or gzip). A file's name without endings is the name of its split.

    Args:
        files: The files.
        json: Write all figures to this file.
        write_splits: Write ``NAME.json`` for each file to this folder, and ``splits.json`` about them: the same records
            with all their keys, split so that no two files share a report or company. Nothing is overwritten.
        by: What no two written files may share.
        strict: Stop at the first record that cannot be used.

    Raises:
        DataError: A file cannot be read or has no usable record, or ``strict`` is set and a record is broken.
        FintuneError: Two files have one name, there is only one file to split, or an output cannot be written.
    """
    paths = _name_splits(files)
    check_outputs((json,), inputs=files)
    if write_splits is not None:
        _check_folder(write_splits, paths)
    read = {name: read_finqa(path, strict=strict, instead=WITHOUT_STRICT) for name, path in paths.items()}
    records = {name: result.records for name, result in read.items()}
    new = resplit(records, by) if write_splits is not None else None
    audit = Audit(
        kinds=dict(FINDINGS),
        splits={name: audit_split(result.records, result.dropped) for name, result in read.items()},
        overlaps=tuple(find_overlaps(records)),
    )
    if json is not None:
        write_output(json, audit.model_dump_json(indent=2) + "\n")
    if write_splits is not None and new is not None:
        _write_splits(write_splits, new, by, files)
    return AuditResult(audit, tuple(line for result in read.values() for line in result.problems), new)


def resplit(splits: Splits, by: Level) -> Resplit:
    """Give every report or company to one split; no chance is involved.

    A group that is in a single split stays there. The other groups, the largest first, each go to that of their splits
    that is the furthest below its old number of records.

    Raises:
        DataError: A split would be empty.
    """
    origin: dict[str, str] = {}
    groups: dict[str, list[FinQARecord]] = defaultdict(list)
    for name, records in splits.items():
        for record in records:
            if record.id not in origin:
                origin[record.id] = name
                groups[group_of(record.id, by)].append(record)
    homes = {group: list(dict.fromkeys(origin[record.id] for record in records)) for group, records in groups.items()}
    split_of = {group: names[0] for group, names in homes.items() if len(names) == 1}
    size = Counter(dict.fromkeys(splits, 0))
    for group, name in split_of.items():
        size[name] += len(groups[group])
    target = Counter(origin.values())
    shared = (group for group in groups if group not in split_of)
    for group in sorted(shared, key=lambda group: (-len(groups[group]), group)):
        split_of[group] = min(homes[group], key=lambda name: size[name] / target[name])
        size[split_of[group]] += len(groups[group])
    new: dict[str, list[FinQARecord]] = {name: [] for name in splits}
    for group, records in groups.items():
        new[split_of[group]] += records
    if empty := [name for name, records in new.items() if not records]:
        raise DataError(f"split by {by}, {empty[0]} has no records left", hint=f"every {by} must be in one file")
    return Resplit(
        new,
        num_before={name: len(records) for name, records in splits.items()},
        num_moved={name: sum(origin[record.id] != name for record in records) for name, records in new.items()},
        num_repeated=sum(map(len, splits.values())) - len(origin),
        groups={name: sorted(group for group in split_of if split_of[group] == name) for name in splits},
    )


def _name_splits(files: Sequence[Path]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in files:
        name = re.sub(r"(?<=.)(\.gz|\.jsonl?)+$", "", path.name)
        if name in paths:
            raise FintuneError(f"{paths[name]} and {path} would both be called {name!r}", hint="rename one of them")
        paths[name] = path
    return paths


def _check_folder(folder: Path, names: Collection[str]) -> None:
    if len(names) < 2:
        raise FintuneError("--write-splits needs several files", hint="name the training and the evaluation file")
    if "splits" in names:
        raise FintuneError("a file called 'splits' would overwrite splits.json", hint="rename it")
    for path in (folder, *(folder / f"{name}.json" for name in (*names, "splits"))):
        if path.exists() and not (path == folder and path.is_dir()):
            raise FintuneError(f"{path} exists", hint="name another folder for --write-splits")


def _write_splits(folder: Path, new: Resplit, by: Level, files: Sequence[Path]) -> None:
    make_folder(folder)
    objects: dict[str, dict[str, object]] = {}
    for path in files:
        objects = read_objects(path) | objects
    for name, records in new.splits.items():
        rows = [objects[record.id] for record in records]
        write_output(folder / f"{name}.json", json_module.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    names = ("num_before", "num_records", "num_moved", "groups")
    summary = {
        name: dict(zip(names, (new.num_before[name], len(rows), new.num_moved[name], new.groups[name]), strict=True))
        for name, rows in new.splits.items()
    }
    # splits.json comes last: if it exists, all other files do.
    content = {"by": by, "num_repeated": new.num_repeated, "splits": summary}
    write_output(folder / "splits.json", json_module.dumps(content, indent=2) + "\n")


def _findings_table(splits: Mapping[str, SplitAudit]) -> Table:
    """Findings by kind, one column for each file, and an example id."""
    table = plain_table("", *splits, "example", left=["example"])
    for name, attribute in _SIZES.items():
        table.add_row(name, *(f"{getattr(audit, attribute)}" for audit in splits.values()), "")
    for reason in sorted({reason for audit in splits.values() for reason in audit.dropped}):
        table.add_row(f"dropped: {reason}", *(str(audit.dropped.get(reason, 0)) for audit in splits.values()), "")
    table.add_section()
    for kind, meaning in FINDINGS.items():
        ids = [audit.findings[kind] for audit in splits.values()]
        example = next((found[0] for found in ids if found), "")
        table.add_row(meaning, *(str(len(found)) for found in ids), example, style="" if example else "dim")
    return table


def _evidence_table(splits: Mapping[str, SplitAudit]) -> Table:
    """Derived evidence compared with the annotated, one column for each file."""
    table = plain_table("evidence derived from the operands", *splits)
    audits = [audit.evidence for audit in splits.values()]
    table.add_row("records with gold_inds", *(str(audit.num_annotated) for audit in audits))
    for kind, meaning in _AGREEMENT.items():
        shares = (_format_share(audit.agreement[kind], audit.num_annotated) for audit in audits)
        table.add_row(f"  derived: {meaning}", *shares)
    table.add_row("every operand in one place", *(str(audit.num_unambiguous) for audit in audits))
    foreign = [audit.unambiguous["overlaps"] + audit.unambiguous["apart"] for audit in audits]
    shares = (_format_share(number, audit.num_unambiguous) for number, audit in zip(foreign, audits, strict=True))
    table.add_row("  derived: with other units", *shares)
    table.add_row("records without gold_inds", *(str(audit.num_derived + audit.num_without) for audit in audits))
    table.add_row("  derived for every operand", *(str(audit.num_derived) for audit in audits))
    return table


def _overlap_table(overlap: Overlap) -> Table:
    first, second = overlap.first, overlap.second
    columns = (f"{first} and {second} share", "number", f"records of {first}", f"of {second}", "example")
    table = plain_table(*columns, left=["example"])
    for name, meaning in _SHARED.items():
        shared = overlap.shared[name]
        example = shared.second_ids[0] if shared.second_ids else ""
        counts = (shared.num, shared.num_first, shared.num_second)
        table.add_row(meaning, *map(str, counts), example, style="" if shared.num else "dim")
    return table


def _resplit_table(new: Resplit) -> Table:
    table = plain_table("written", "records before", "now", "from another file", "groups")
    for name, records in new.splits.items():
        numbers = (new.num_before[name], len(records), new.num_moved[name], len(new.groups[name]))
        table.add_row(f"{name}.json", *map(str, numbers))
    return table


def _format_share(number: int, total: int) -> str:
    return f"{number} ({number / total:.1%})" if total else str(number)
