"""Load one entry of ``data.sources``: its rows are read, converted, cleared of exact duplicates and sampled.

Samples are drawn by a hash of the conversation. Another order of the rows, or further rows, change nothing about the
rows that were there before.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from fintune.config import DataOptions, SourceOptions
from fintune.data import files, hub
from fintune.data.dedup import digest_messages
from fintune.data.formats import Conversation, convert_row, find_text, is_row
from fintune.data.licences import Licence, licence_of
from fintune.data.objective_filter import RowKind, dedup_messages, skip_reason
from fintune.data.readers import BrokenRowError, Row, read_rows
from fintune.data.tokenize import DroppedRow
from fintune.errors import DataError

HASH_LIMIT = 2**64
_EXACT, _LIMIT = "exact duplicate", "beyond max_rows"
_NOT_STRICT = "or leave out --strict (data.strict: false) to drop and count such rows"


def stable_hash(data: bytes, purpose: str) -> int:
    """Hash bytes to a number below ``HASH_LIMIT``, which takes the place of a random number.

    Args:
        data: What is chosen or not.
        purpose: Another purpose gives another number.
    """
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=purpose.encode()).digest(), "big")


@dataclass
class LoadedSource:
    """The conversations of one source.

    Attributes:
        conversations: Conversations that the objective trains on, in the order of the rows.
        num_rows: All rows of the source.
        formats: Usable rows by format.
        files: Usable rows by file and format.
        dropped: Rows that were left out, by reason.
        broken: Rows that cannot be used, in order.
        num_trailing: Turns after the last answer of their conversation, which were left out.
        num_thoughts: Thoughts in a field of their own, which were left out.
    """

    conversations: list[Conversation] = field(default_factory=list)
    num_rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    files: dict[str, Counter[str]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    broken: list[DroppedRow] = field(default_factory=list)
    num_trailing: int = 0
    num_thoughts: int = 0


def load_source(
    data: DataOptions, index: int, seed: int, digests: set[bytes], row_kind: RowKind, end_token: str = ""
) -> LoadedSource:
    """Read, convert and sample the rows of one source.

    Args:
        data: All data options.
        index: Index of the source in ``data.sources``.
        seed: Seed of the sample.
        digests: Digests of the conversations of earlier sources. Those of this source are added.
        row_kind: What the objective trains on.
        end_token: The end-of-turn token. If a row has it, the conversation carries the name of the field.

    Raises:
        DataError: No row can be used, or with ``data.strict`` one of them cannot.
        ResourceError: A hub dataset cannot be fetched.
    """
    source = data.sources[index]
    loaded = LoadedSource()
    sample: list[tuple[int, int, Conversation]] = []  # a heap; its top is the last in the order of the draw
    own_digests: set[bytes] = set()
    format_ = None if source.format == "auto" else source.format
    for label, row in _read_rows(source, index):
        loaded.num_rows += 1
        formats = loaded.files.setdefault(label, Counter())
        try:
            detected, conversation = convert_row(row.value, format_, source.columns, is_labelled=row_kind == "labels")
        except BrokenRowError as broken:
            loaded.dropped[broken.reason] += 1
            loaded.broken.append(_broken_row(row, broken, strict=data.strict))
            continue
        loaded.formats[detected] += 1
        formats[detected] += 1
        if reason := skip_reason(detected, conversation, row_kind):
            loaded.dropped[reason] += 1
            continue
        loaded.num_trailing += conversation.num_trailing
        loaded.num_thoughts += conversation.num_thoughts
        digest = digest_messages(dedup_messages(conversation, row_kind))
        if data.duplicates != "off":
            if digest in digests or digest in own_digests:
                loaded.dropped[_EXACT] += 1
                continue
            own_digests.add(digest)
        conversation = replace(
            conversation,
            id=f"{label}:{row.number}",
            file=row.file,
            row=row.number,
            source=index,
            digest=digest,
            end_token_field=_end_token_field(conversation, row, end_token) if end_token else "",
        )
        heapq.heappush(sample, (-stable_hash(digest, f"draw {seed}"), -loaded.num_rows, conversation))
        if source.max_rows is not None and len(sample) > source.max_rows:
            heapq.heappop(sample)
            loaded.dropped[_LIMIT] += 1
    if not loaded.formats:
        counts = ", ".join(f"{reason}: {number}" for reason, number in loaded.dropped.most_common())
        first = f"; the first: {loaded.broken[0]}" if loaded.broken else ""
        raise DataError(f"no row can be used ({counts or 'it has none'}){first}", path=source.path)
    loaded.conversations = [conversation for _, _, conversation in sorted(sample, key=lambda item: -item[1])]
    if data.duplicates != "off":
        # A copy of what a limit left out may still come from a later source.
        digests.update(conversation.digest for conversation in loaded.conversations)
    return loaded


def _end_token_field(conversation: Conversation, row: Row, end_token: str) -> str:
    texts = [message.content for message in conversation.messages]
    if any(end_token in text for text in [*texts, conversation.rejected or ""]):
        return find_text(row.value, end_token)
    return ""


def _read_rows(source: SourceOptions, index: int) -> Iterator[tuple[str, Row]]:
    """Yield the rows with the label of their file. Labels of different sources differ."""
    prefix = f"{index + 1}/" if index else ""
    if source.path.startswith(hub.PREFIX):
        split = hub.HubSplit.of_source(source)
        label = f"{prefix}{split.name}/{source.split or 'train'}"
        yield from ((label, row) for row in hub.read_split(split))
        return
    paths = files.find_files(source.path)
    root = Path(source.path).expanduser()
    is_only_row = partial(is_row, columns=source.columns)
    for path in paths:
        label = path.relative_to(root).as_posix() if root.is_dir() and path != root else path.name
        label = path.as_posix() if len(paths) > 1 and not root.is_dir() else label  # names alone may be the same
        yield from ((f"{prefix}{label}", row) for row in read_rows(path, split=source.split, is_row=is_only_row))


def _broken_row(row: Row, broken: BrokenRowError, *, strict: bool) -> DroppedRow:
    dropped = DroppedRow(
        file=row.file,
        row=row.number,
        field=broken.field,
        reason=broken.why,
        hint=broken.hint or "",
        category=broken.reason,
    )
    if strict:
        raise dropped.error(strict_hint(dropped.hint)) from None
    return dropped


def strict_hint(hint: str) -> str:
    """Return what to do about a row that stops a strict run."""
    if not hint:
        return f"repair or remove it, {_NOT_STRICT}"
    return f"{hint} Repair it, {_NOT_STRICT}" if hint.endswith("?") else f"{hint}; {_NOT_STRICT}"


def source_licence(source: SourceOptions) -> Licence:
    """Return the licence of a source: what the configuration says, else what is known or what the source says."""
    if not source.path.startswith(hub.PREFIX):
        return licence_of(source.license, path=Path(source.path).expanduser(), files=files.local_files(source))
    split = hub.HubSplit.of_source(source)
    licence = licence_of(source.license, hub_name=split.name)
    return licence if licence.origin else licence_of("", card=hub.read_licence(split))
