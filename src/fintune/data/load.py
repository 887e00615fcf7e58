"""Load one entry of ``data.sources``: its rows are read, converted, cleared of exact duplicates and sampled.

Samples are drawn by a hash of the conversation. Another order of the rows, or further rows, change nothing about the
rows that were there before.
"""

from __future__ import annotations

import difflib
import hashlib
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fintune.config import DataOptions, SourceOptions
from fintune.data import files, hub
from fintune.data.dedup import digest_messages
from fintune.data.formats import FIELDS, Conversation, Converted, convert_row, find_text, is_row
from fintune.data.licences import Licence, licence_of
from fintune.data.messages import read_truth
from fintune.data.objective_filter import RowKind, dedup_messages, skip_reason
from fintune.data.readers import BrokenRowError, Row, read_rows
from fintune.data.tokenize import DroppedRow
from fintune.errors import ConfigError, DataError

HASH_LIMIT = 2**64
_EXACT, _LIMIT = "exact duplicate", "beyond max_rows"
_NOT_STRICT = "or leave out --strict (data.strict: false) to drop and count such rows"
_EMPTY_WORDS = ("nan", "none", "null", "nat", "<na>")
_OTHER_TEMPLATE = re.compile(
    r"\[/?INST\]|<</?SYS>>|<\|im_(?:start|end)\|>|<\|(?:start|end)_header_id\|>|<(?:start|end)_of_turn>|"
    r"<\|(?:user|assistant|system)\|>|### (?:Instruction|Response):|</s>"
)
"""Marks of chat templates, where they are no special tokens of the tokenizer in use."""
EMPTY_ANSWERS = "answers are nan, None or null: empty cells that became text? Remove those rows"
OTHER_TEMPLATE = "rows carry the marks of another chat template (such as [INST]): write the turns without them"


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
        test_files: Files that are splits for evaluation by their names.
        dropped: Rows that were left out, by reason.
        broken: Rows that cannot be used, in order.
        num_trailing: Turns after the last answer of their conversation, which were left out.
        columns: For each column, and what it was read as, the number of usable rows in which it is filled.
        warnings: What is odd about usable rows, with their number.
    """

    conversations: list[Conversation] = field(default_factory=list)
    num_rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    files: dict[str, Counter[str]] = field(default_factory=dict)
    test_files: dict[str, None] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    broken: list[DroppedRow] = field(default_factory=list)
    num_trailing: int = 0
    columns: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    warnings: Counter[str] = field(default_factory=Counter)


class _FileRow(NamedTuple):
    """A row with the label of its file, and whether the file is a split for evaluation."""

    label: str
    is_test: bool
    row: Row


class _SourceReader:
    """Reads and converts the rows of one source, as the options and the objective say."""

    def __init__(self, data: DataOptions, index: int, row_kind: RowKind) -> None:
        self._source, self._index = data.sources[index], index
        self._columns = {**data.columns, **self._source.columns}
        if unknown := next((name for name in self._columns if name.lower() not in FIELDS), None):
            near = difflib.get_close_matches(unknown.lower(), FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(FIELDS)}"
            raise ConfigError(f"data.columns: {unknown!r} is no field", hint=hint, option="data.columns")
        self._is_labelled = row_kind == "labels"
        is_named = "label" in self._columns or self._source.format == "unpaired_preference"
        is_named = is_named or bool(self._source.instruction)
        self._reads_label = True if is_named or row_kind != "answers" or self._source.format != "auto" else None

    def convert(self, value: object) -> Converted:
        """Convert a row. Whether a column called ``label`` holds verdicts is found out at the first one."""
        if self._reads_label is None and _label_of(value) is not None:
            self._reads_label = self._has_verdicts()
        return convert_row(
            value,
            None if self._source.format == "auto" else self._source.format,
            self._columns,
            is_labelled=self._is_labelled,
            reads_label=self._reads_label is not False,
            roles=self._source.roles,
            instruction=self._source.instruction,
        )

    def _has_verdicts(self) -> bool:
        """Whether the labels of the source say if answers are good, so that only good ones are trained.

        Raises:
            DataError: They are 0 and 1, and may be classes.
        """
        answers: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        words, others = 0, 0
        for _, _, row in self.rows():
            label = _label_of(row.value)
            truth = read_truth(label)
            if truth is None:
                others += label is not None
            elif isinstance(label, bool) or (isinstance(label, str) and label.strip().isalpha()):
                words += 1
            elif isinstance(row.value, Mapping):
                try:
                    converted = convert_row(row.value, None, self._columns, reads_label=False, roles=self._source.roles)
                except BrokenRowError:
                    continue
                answers[truth][converted.conversation.messages[-1].content.strip().casefold()] += 1
        distinct = len(answers[True]) + len(answers[False])
        if words or others or not distinct:
            return words > 0 or not others
        if 2 * distinct <= answers[True].total() + answers[False].total() and not answers[True] & answers[False]:
            return False  # each answer has one label, as the names of classes have
        raise DataError(
            "the column label holds 0 and 1, which may be verdicts about the answers, or classes",
            path=self._source.path,
            hint="set data.columns.label=label to train only the answers with 1; for classes, name the format of the "
            "rows in data.sources, such as format: prompt_completion",
        )

    def rows(self) -> Iterator[_FileRow]:
        """Yield the rows with the label of their file. Labels of different sources differ.

        Raises:
            DataError: A file cannot be read, or there is no such split.
        """
        source, prefix = self._source, f"{self._index + 1}/" if self._index else ""
        if source.path.startswith(hub.PREFIX):
            split = hub.HubSplit.of_source(source)
            label = f"{prefix}{split.name}/{source.split or 'train'}"
            yield from (_FileRow(label, False, row) for row in hub.read_split(split))
            return
        root = Path(source.path).expanduser()
        found = files.find_split_files(source.path, source.split)
        is_only_row = partial(is_row, columns=self._columns)
        for path, is_test in found:
            label = path.relative_to(root).as_posix() if root.is_dir() and path != root else path.name
            label = path.as_posix() if len(found) > 1 and not root.is_dir() else label  # names alone may be the same
            split_name = source.split if len(found) == 1 and files.is_saved_dataset(path) else ""
            for row in read_rows(path, split=split_name, is_row=is_only_row, has_header=source.header):
                yield _FileRow(f"{prefix}{label}", is_test, row)


def _label_of(value: object) -> object:
    if not isinstance(value, Mapping):
        return None
    return next((item for name, item in value.items() if str(name).strip().lower() == "label"), None)


def load_source(
    data: DataOptions,
    index: int,
    seed: int,
    digests: set[bytes],
    row_kind: RowKind,
    special_tokens: re.Pattern[str] | None = None,
) -> LoadedSource:
    """Read, convert and sample the rows of one source.

    Args:
        data: All data options.
        index: Index of the source in ``data.sources``.
        seed: Seed of the sample.
        digests: Digests of the conversations of earlier sources. Those of this source are added.
        row_kind: What the objective trains on.
        special_tokens: Finds the special tokens of the tokenizer, which no text may hold.

    Raises:
        DataError: No row can be used, or with ``data.strict`` one of them cannot.
        ResourceError: A hub dataset cannot be fetched.
    """
    source = data.sources[index]
    loaded = LoadedSource()
    sample: list[tuple[int, int, Conversation]] = []  # a heap; its top is the last in the order of the draw
    own_digests: set[bytes] = set()
    reader = _SourceReader(data, index, row_kind)
    for label, is_test, row in reader.rows():
        loaded.num_rows += 1
        formats = loaded.files.setdefault(label, Counter())
        if is_test:
            loaded.test_files[label] = None
        try:
            detected, conversation, columns = reader.convert(row.value)
            _refuse_special_tokens(conversation, row.value, special_tokens)
        except BrokenRowError as broken:
            loaded.dropped[broken.reason] += 1
            loaded.broken.append(_broken_row(row, broken, strict=data.strict))
            continue
        loaded.formats[detected] += 1
        formats[detected] += 1
        for column, what in columns.items():
            loaded.columns[column][what] += 1
        if reason := skip_reason(detected, conversation, row_kind):
            loaded.dropped[reason] += 1
            continue
        loaded.num_trailing += conversation.num_trailing
        _warn(conversation, loaded.warnings)
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
            is_test=is_test,
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


def _refuse_special_tokens(conversation: Conversation, value: object, pattern: re.Pattern[str] | None) -> None:
    rejected = (conversation.rejected,) if conversation.rejected is not None else ()
    for message in (*conversation.messages, *rejected) if pattern else ():
        assert pattern is not None
        found = pattern.search(message.content) or pattern.search(message.reasoning_content or "")
        if found:
            why = f"the text contains {found[0]}, a special token of the model"
            raise BrokenRowError("special token", why, field=find_text(value, found[0]), hint="remove it from the data")


def _warn(conversation: Conversation, warnings: Counter[str]) -> None:
    answer = conversation.messages[-1]
    warnings[EMPTY_ANSWERS] += answer.content.strip().casefold() in _EMPTY_WORDS
    warnings[OTHER_TEMPLATE] += any(_OTHER_TEMPLATE.search(message.content) for message in conversation.messages)


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
