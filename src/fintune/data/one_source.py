"""An entry of ``data.sources``: its rows read, converted, cleared of exact duplicates and sampled."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fintune.config import DataOptions, SourceOptions
from fintune.data import files, hub, rows
from fintune.data.chance import chance
from fintune.data.duplicates import digest_of
from fintune.data.licences import Licence, licence_of
from fintune.data.rows import BrokenRowError, Row
from fintune.data.shapes import Conversation, convert, is_row
from fintune.data.source_report import UnusedRow
from fintune.data.wanted import Wanted, left_out, said
from fintune.errors import DataError

_EXACT, _LIMIT = "exact duplicate", "beyond max_rows"
_NOT_STRICT = "or leave out --strict (data.strict: false) to drop and count such rows"


@dataclass(frozen=True)
class Entry:
    """A conversation with where it comes from.

    Attributes:
        id: Label of its file, and its row.
        place: Its file, or the split of a dataset.
        row: Its number there, as messages tell it.
        source: Place in ``data.sources``.
        digest: Of all that is said.
    """

    id: str
    place: str
    row: int
    source: int
    conversation: Conversation
    digest: bytes


@dataclass
class Found:
    """What a source gave.

    Attributes:
        entries: What is wanted, in the order of the rows.
        num_rows: Rows that it holds.
        shapes: Usable rows by shape.
        files: The same by file.
        dropped: Rows that were left out, by reason.
        num_trailing: Turns behind the last answer of their conversation, which were left out.
        num_thoughts: Thoughts in a field of their own, which were left out.
    """

    entries: list[Entry] = field(default_factory=list)
    num_rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    files: dict[str, Counter[str]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    num_trailing: int = 0
    num_thoughts: int = 0


def read(
    source: SourceOptions,
    number: int,
    data: DataOptions,
    seed: int,
    seen: set[bytes],
    problems: list[tuple[str, UnusedRow]],
    wanted: Wanted,
) -> Found:
    """Read, convert and sample.

    Args:
        source: An entry of ``data.sources``.
        number: Its place there.
        data: What holds for all sources.
        seed: Of the sample.
        seen: Digests of what earlier sources gave; those of what this one gives are added.
        problems: Gets each row that cannot be used, with the reason to count it by.
        wanted: Which rows the objective learns from.

    Raises:
        DataError: No row can be used, or with ``data.strict`` one cannot.
        ResourceError: A hub dataset that cannot be fetched.
    """
    found = Found()
    sample: list[tuple[int, int, Entry]] = []  # a heap of what was drawn so far, the last to be drawn first
    own: set[bytes] = set()
    shape = None if source.format == "auto" else source.format
    for label, row in _rows(source, number):
        found.num_rows += 1
        shapes = found.files.setdefault(label, Counter())
        try:
            kind, conversation = convert(row.value, shape, source.columns, labelled=wanted == "labels")
        except BrokenRowError as broken:
            found.dropped[broken.reason] += 1
            problems.append((broken.reason, _unused(row, broken, strict=data.strict)))
            continue
        found.shapes[kind] += 1
        shapes[kind] += 1
        if reason := left_out(kind, conversation, wanted):
            found.dropped[reason] += 1
            continue
        found.num_trailing += conversation.num_trailing
        found.num_thoughts += conversation.num_thoughts
        digest = digest_of(said(conversation, wanted))
        entry = Entry(f"{label}:{row.number}", row.place, row.number, number, conversation, digest)
        if data.duplicates != "off":
            if digest in seen or digest in own:
                found.dropped[_EXACT] += 1
                continue
            own.add(digest)
        heapq.heappush(sample, (-chance(entry.digest, f"draw {seed}"), -found.num_rows, entry))
        if source.max_rows is not None and len(sample) > source.max_rows:
            heapq.heappop(sample)
            found.dropped[_LIMIT] += 1
    if not found.shapes:
        counts = ", ".join(f"{reason}: {times}" for reason, times in found.dropped.most_common())
        first = f"; the first: {problems[-sum(found.dropped.values())][1].told()}" if found.dropped else ""
        raise DataError(f"no row can be used ({counts or 'it holds none'}){first}", path=source.path)
    found.entries = [entry for _, _, entry in sorted(sample, key=lambda item: -item[1])]
    if data.duplicates != "off":
        seen.update(entry.digest for entry in found.entries)  # a copy of what was not drawn may still come
    return found


def _rows(source: SourceOptions, number: int) -> Iterator[tuple[str, Row]]:
    """Rows with the label of where each stands; labels of different sources differ."""
    before = f"{number + 1}/" if number else ""
    if source.path.startswith(hub.PREFIX):
        wanted = hub_split(source)
        label = f"{before}{wanted.name}/{source.split or 'train'}"
        yield from ((label, row) for row in hub.read(wanted))
        return
    found = files.find(source.path)
    root = Path(source.path).expanduser()
    stands_alone = partial(is_row, columns=source.columns)
    for path in found:
        below = path.relative_to(root).as_posix() if root.is_dir() and path != root else path.name
        below = path.as_posix() if len(found) > 1 and not root.is_dir() else below  # names alone may be the same
        yield from ((f"{before}{below}", row) for row in rows.read_rows(path, split=source.split, is_row=stands_alone))


def hub_split(source: SourceOptions) -> hub.HubSplit:
    """What an entry of ``data.sources`` asks of the hub."""
    name = source.path.removeprefix(hub.PREFIX)
    return hub.HubSplit(name, source.split, source.subset, source.revision)


def licence(source: SourceOptions) -> Licence:
    """What a source may be used for: as the user says, else as it says itself."""
    if not source.path.startswith(hub.PREFIX):
        return licence_of(source.license, path=Path(source.path).expanduser(), files=files.local_files(source))
    wanted = hub_split(source)
    known = licence_of(source.license, hub_name=wanted.name)
    return known if known.origin else licence_of("", card=hub.licence(wanted))


def _unused(row: Row, broken: BrokenRowError, *, strict: bool) -> UnusedRow:
    unused = UnusedRow(file=row.place, row=row.number, field=broken.field, reason=broken.why, hint=broken.hint or "")
    if strict:
        raise unused.model_copy(update={"hint": with_way_out(broken.hint)}).error() from None
    return unused


def fields_that_hold(source: SourceOptions, texts: Mapping[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """Which field of a row holds a text, as ``messages[1].content``; the rows are read again for it.

    Args:
        source: An entry of ``data.sources``.
        texts: What is looked for, by place and number of the row.

    Raises:
        DataError: It cannot be read any more.
        ResourceError: Likewise, of the hub.
    """
    found: dict[tuple[str, int], str] = {}
    for _, row in _rows(source, 0):
        text = texts.get((row.place, row.number))
        if text is not None:
            found[row.place, row.number] = next((name for name, each in _texts(row.value) if text in each), "")
            if len(found) == len(texts):
                break
    return found


def _texts(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _texts(each, f"{name}[{place}]")


def with_way_out(hint: str | None) -> str:
    """What to do about a row that stops a strict run."""
    if not hint:
        return f"mend or remove it, {_NOT_STRICT}"
    return f"{hint} Mend it, {_NOT_STRICT}" if hint.endswith("?") else f"{hint}; {_NOT_STRICT}"
