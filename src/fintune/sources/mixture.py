"""``data.sources`` to the conversations of both splits: read, converted, cleared of duplicates, divided and mixed.

Everything that is chosen (a sample, the held-out share, a fractional weight) is chosen by a hash of the conversation,
so that another order of the rows or further rows change nothing about those that were there.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import Field

from fintune.errors import DataError
from fintune.options import DataOptions, SourceOptions
from fintune.progress import track
from fintune.records import Record
from fintune.sources import hub, rows
from fintune.sources.duplicates import NearDuplicates, digest, digest_of
from fintune.sources.licences import Licence, licence_of
from fintune.sources.rows import BrokenRowError, Row
from fintune.sources.shapes import Conversation, convert
from fintune.sources.wanted import Wanted, left_out, nothing_wanted, said

EXACT, NEAR, LIMIT = "exact duplicate", "near duplicate", "beyond max_rows"
_NOT_STRICT = "mend or remove it, or leave out --strict (data.strict: false) to drop and count such rows"


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
    num_train: int
    num_eval: int
    weight: float

    def told(self) -> list[str]:
        """What was found, for the user: a line, and one for each file where there are several."""
        shapes = ", ".join(f"{number} {shape}" for shape, number in self.shapes.items())
        dropped = ", ".join(f"{number} {reason}" for reason, number in self.dropped.items())
        times = f", each {self.weight:g} times" if self.weight != 1 else ""
        lines = [
            f"{self.path}: {self.num_rows} rows: {shapes}"
            + (f"; dropped {dropped}" if dropped else "")
            + (f"; {self.num_trailing} turns without an answer left out" if self.num_trailing else "")
            + f"; {self.num_train} to train on{times}, {self.num_eval} held out; licence {self.licence.name}"
        ]
        for file, found in self.files.items():
            lines.append(f"  {file}: " + (", ".join(f"{n} {shape}" for shape, n in found.items()) or "no usable row"))
        return lines


@dataclass(frozen=True)
class Entry:
    """A conversation with where it comes from.

    Attributes:
        id: Label of its file, and its row.
        source: Place in ``data.sources``.
        digest: Of all that is said.
    """

    id: str
    source: int
    conversation: Conversation
    digest: bytes


@dataclass(frozen=True)
class Mixture:
    """Conversations of both splits.

    Attributes:
        train: To train on, weights applied; ids are unique.
        eval: Held out; at least one.
        reports: One for each source.
        problems: A line for each row that could not be used, the first of every reason before all others.
    """

    train: list[Entry]
    eval: list[Entry]
    reports: list[SourceReport]
    problems: list[str]


@dataclass
class _Found:
    entries: list[Entry] = field(default_factory=list)
    num_rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    files: dict[str, Counter[str]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    num_trailing: int = 0


def load(data: DataOptions, seed: int, *, limit: int | None = None, wanted: Wanted = "answers") -> Mixture:
    """Read all sources.

    Args:
        data: ``sources`` and what belongs to them.
        seed: Of samples and fractional weights.
        limit: At most so many conversations a split, on top of ``data.max_train`` and ``data.max_eval``.
        wanted: Which rows the objective learns from; others are counted as dropped. A rejected answer or a label that
            is learned from belongs to what tells duplicates.

    Raises:
        DataError: A source that cannot be read or gives nothing; with ``data.strict``, a row that cannot be used; no
            wanted row in any source.
        ResourceError: A hub dataset that cannot be fetched.
    """
    problems: list[tuple[str, str]] = []
    seen: set[bytes] = set()
    found = [_read(source, number, data, seed, seen, problems, wanted) for number, source in enumerate(data.sources)]
    if not any(each.entries for each in found):
        dropped = sum((each.dropped for each in found), Counter())
        paths, num_rows = [source.path for source in data.sources], sum(each.num_rows for each in found)
        raise nothing_wanted(paths, num_rows, dict(dropped.most_common()), wanted)
    if data.duplicates == "near":
        _drop_near(found, data.near_similarity, wanted)
    train, evaluation = _divide(found, data)
    reports = [
        SourceReport(
            path=source.path,
            licence=_licence(source),
            num_rows=each.num_rows,
            shapes=dict(each.shapes.most_common()),
            files={file: dict(shapes) for file, shapes in each.files.items()} if len(each.files) > 1 else {},
            dropped=dict(each.dropped.most_common()),
            num_trailing=each.num_trailing,
            num_train=sum(entry.source == number for entry in train),
            num_eval=sum(entry.source == number for entry in evaluation),
            weight=source.weight,
        )
        for number, (source, each) in enumerate(zip(data.sources, found, strict=True))
    ]
    weighted = [copy for entry in train for copy in _copies(entry, data.sources[entry.source].weight, seed)]
    return Mixture(
        train=_draw(weighted, _least(data.max_train, limit), seed),
        eval=_draw(evaluation, _least(data.max_eval, limit), seed),
        reports=reports,
        problems=_firsts_first(problems),
    )


def _firsts_first(problems: Sequence[tuple[str, str]]) -> list[str]:
    firsts: dict[str, str] = {}
    for reason, line in problems:
        firsts.setdefault(reason, line)
    return [*firsts.values(), *(line for reason, line in problems if firsts[reason] is not line)]


def _read(
    source: SourceOptions,
    number: int,
    data: DataOptions,
    seed: int,
    seen: set[bytes],
    problems: list[tuple[str, str]],
    wanted: Wanted,
) -> _Found:
    found = _Found()
    sample: list[tuple[int, int, Entry]] = []  # a heap of what was drawn so far, the last to be drawn first
    shape = None if source.shape == "auto" else source.shape
    for label, row in _rows(source, number):
        found.num_rows += 1
        shapes = found.files.setdefault(label, Counter())
        try:
            kind, conversation = convert(row.value, shape, source.columns, labelled=wanted == "labels")
        except BrokenRowError as broken:
            found.dropped[broken.reason] += 1
            problems.append((broken.reason, _problem(row, broken, strict=data.strict)))
            continue
        found.shapes[kind] += 1
        shapes[kind] += 1
        if reason := left_out(kind, conversation, wanted):
            found.dropped[reason] += 1
            continue
        found.num_trailing += conversation.num_trailing
        entry = Entry(f"{label}:{row.number}", number, conversation, digest_of(said(conversation, wanted)))
        if data.duplicates != "keep":
            if entry.digest in seen:
                found.dropped[EXACT] += 1
                continue
            seen.add(entry.digest)
        heapq.heappush(sample, (-_hash(entry.digest, f"draw {seed}"), -found.num_rows, entry))
        if source.max_rows is not None and len(sample) > source.max_rows:
            heapq.heappop(sample)
            found.dropped[LIMIT] += 1
    if not found.shapes:
        counts = ", ".join(f"{reason}: {times}" for reason, times in found.dropped.most_common())
        first = f"; the first: {problems[-sum(found.dropped.values())][1]}" if found.dropped else ""
        raise DataError(f"no row can be used ({counts or 'it holds none'}){first}", path=source.path)
    found.entries = [entry for _, _, entry in sorted(sample, key=lambda item: -item[1])]
    return found


def _rows(source: SourceOptions, number: int) -> Iterator[tuple[str, Row]]:
    """Rows with the label of where each stands; labels of different sources differ."""
    before = f"{number + 1}/" if number else ""
    if source.path.startswith(hub.PREFIX):
        wanted = hub_split(source)
        label = f"{before}{wanted.name}/{source.split or 'train'}"
        yield from ((label, row) for row in hub.read(wanted))
        return
    found = rows.find(source.path)
    root = Path(source.path).expanduser()
    for path in found:
        below = path.relative_to(root).as_posix() if root.is_dir() and path != root else path.name
        below = path.as_posix() if len(found) > 1 and not root.is_dir() else below  # names alone may be the same
        yield from ((f"{before}{below}", row) for row in rows.read_rows(path, split=source.split))


def hub_split(source: SourceOptions) -> hub.HubSplit:
    """What an entry of ``data.sources`` asks of the hub."""
    name = source.path.removeprefix(hub.PREFIX)
    return hub.HubSplit(name, source.split, source.subset, source.revision)


def _licence(source: SourceOptions) -> Licence:
    if not source.path.startswith(hub.PREFIX):
        return licence_of(source.licence, path=Path(source.path).expanduser())
    wanted = hub_split(source)
    known = licence_of(source.licence, hub_name=wanted.name)
    return known if known.origin else licence_of("", card=hub.licence(wanted))


def _problem(row: Row, broken: BrokenRowError, *, strict: bool) -> str:
    what = f"{broken.field}: {broken.why}" if broken.field else broken.why
    error = DataError(what, path=row.place, row=row.number, hint=broken.hint)
    if strict:
        error.hint = f"{broken.hint}; {_NOT_STRICT}" if broken.hint else _NOT_STRICT
        raise error from None
    return str(error)


def _drop_near(found: Sequence[_Found], similarity: float, wanted: Wanted) -> None:
    num = sum(len(each.entries) for each in found)
    known = NearDuplicates(similarity, num)
    everything = track([(each, entry) for each in found for entry in each.entries], "near duplicates", num)
    kept: list[tuple[_Found, Entry]] = []
    for each, entry in everything:
        if known.repeats(said(entry.conversation, wanted)) is None:
            kept.append((each, entry))
        else:
            each.dropped[NEAR] += 1
    for each in found:
        each.entries = [entry for owner, entry in kept if owner is each]


def _divide(found: Sequence[_Found], data: DataOptions) -> tuple[list[Entry], list[Entry]]:
    """Train and eval: held out is whose first question's hash is below the share, at the least the lowest."""
    hashed = [(_hash(digest([_question(entry)]), "hold out"), entry) for each in found for entry in each.entries]
    open_ones = [value for value, entry in hashed if data.sources[entry.source].hold_out == "share"]
    held = any(data.sources[entry.source].hold_out == "all" for _, entry in hashed)
    bound = max(int(data.eval_share * 2**64), 0 if held or not open_ones else min(open_ones) + 1)
    train: list[Entry] = []
    evaluation: list[Entry] = []
    for value, entry in hashed:
        rule = data.sources[entry.source].hold_out
        (evaluation if rule == "all" or (rule == "share" and value < bound) else train).append(entry)
    if not train or not evaluation:
        which, other = ("trained on", "all") if not train else ("held out", "none")
        raise DataError(
            f"data.sources: of {len(hashed)} conversations none is left to be {which}",
            hint=f"add conversations, or set hold_out of a source to something else than {other}",
        )
    return train, evaluation


def _question(entry: Entry) -> str:
    return next(message.content for message in entry.conversation.messages if message.role == "user")


def _copies(entry: Entry, weight: float, seed: int) -> Iterator[Entry]:
    whole = int(weight)
    times = whole + (_hash(entry.digest, f"weight {seed}") < (weight - whole) * 2**64)
    for number in range(1, times + 1):
        yield entry if number == 1 else replace(entry, id=f"{entry.id}#{number}")


def _draw(entries: list[Entry], number: int | None, seed: int) -> list[Entry]:
    if number is None or number >= len(entries):
        return entries
    chosen = heapq.nsmallest(number, enumerate(entries), key=lambda item: _hash(item[1].id.encode(), f"split {seed}"))
    return [entry for _, entry in sorted(chosen, key=lambda item: item[0])]


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _hash(data: bytes, purpose: str) -> int:
    """64 bits that depend on nothing but these."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=purpose.encode()).digest(), "big")
