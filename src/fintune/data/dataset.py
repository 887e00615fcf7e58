"""The data of a run before it is tokenized: conversations of ``data.sources``, or FinQA records, of both splits.

Conversations are loaded, cleared of duplicates, split, weighted and drawn. Every choice is made by a hash of the
conversation, so another order of the rows or further rows change nothing about the rows that were there before.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace

from fintune.config import Config, DataOptions
from fintune.data.dedup import NearDuplicates, digest_texts
from fintune.data.files import describe_unread
from fintune.data.finqa_json import FinqaFile, read_finqa
from fintune.data.formats import Conversation
from fintune.data.load import HASH_LIMIT, LoadedSource, load_source, source_licence, stable_hash
from fintune.data.objective_filter import RowKind, dedup_messages, no_rows_error
from fintune.data.report import NEAR_DUPLICATE, SourceReport
from fintune.data.tokenize import DroppedRow
from fintune.errors import DataError
from fintune.finqa.page import page_content
from fintune.records import FinQARecord
from fintune.util.console import track
from fintune.util.sampling import draw_indices


def load_sources(
    data: DataOptions, seed: int, *, row_kind: RowKind = "answers", special_tokens: re.Pattern[str] | None = None
) -> list[LoadedSource]:
    """Load all sources and drop duplicates.

    Args:
        data: ``sources`` and the options about them.
        seed: Seed of the samples.
        row_kind: What the objective trains on. Other rows are counted as dropped.
        special_tokens: Finds special tokens; see :func:`fintune.data.load.load_source`.

    Raises:
        DataError: A source cannot be read or has no usable row; with ``data.strict``, a row cannot be used; or no
            source has a row that the objective trains on.
        ResourceError: A hub dataset cannot be fetched.
    """
    digests: set[bytes] = set()
    loaded = [load_source(data, index, seed, digests, row_kind, special_tokens) for index in range(len(data.sources))]
    if not any(source.conversations for source in loaded):
        dropped = sum((source.dropped for source in loaded), Counter())
        paths, num_rows = [source.path for source in data.sources], sum(source.num_rows for source in loaded)
        raise no_rows_error(paths, num_rows, dict(dropped.most_common()), row_kind)
    if data.duplicates == "near":
        _drop_near_duplicates(loaded, data.near_similarity, row_kind)
    return loaded


def _drop_near_duplicates(loaded: Sequence[LoadedSource], similarity: float, row_kind: RowKind) -> None:
    num_conversations = sum(len(source.conversations) for source in loaded)
    finder = NearDuplicates(similarity)
    everything = ((source, conversation) for source in loaded for conversation in source.conversations)
    kept: dict[int, list[Conversation]] = {id(source): [] for source in loaded}
    for source, conversation in track(everything, "near duplicates", num_conversations):
        if finder.find(dedup_messages(conversation, row_kind)) is None:
            kept[id(source)].append(conversation)
        else:
            source.dropped[NEAR_DUPLICATE] += 1
    for source in loaded:
        source.conversations = kept[id(source)]


@dataclass(frozen=True)
class Holdout:
    """Which conversations are held out for evaluation.

    A conversation is held out if the hash of its question is below a bound. So the same question is never in both
    splits.

    Attributes:
        hashed: All conversations with their hash, which is None for those that are never held out.
        bound: The bound of the hash.
    """

    hashed: Sequence[tuple[int | None, Conversation]]
    bound: int

    @property
    def train(self) -> list[Conversation]:
        """Conversations to train on."""
        return [conversation for value, conversation in self.hashed if value is None or value >= self.bound]

    @property
    def eval(self) -> list[Conversation]:
        """Conversations that are held out."""
        return [conversation for value, conversation in self.hashed if value is not None and value < self.bound]

    def widen(self, usable: Set[str]) -> Holdout:
        """Hold out the next conversations by their hash, up to the first usable one. Some are left to train on.

        Args:
            usable: Ids of conversations that could be tokenized.
        """
        candidates = [
            value
            for value, conversation in self.hashed
            if value is not None and value >= self.bound and conversation.id in usable
        ]
        wider = replace(self, bound=min(candidates) + 1) if candidates else self
        return wider if wider.train else self


def split_holdout(conversations: Sequence[Conversation], data: DataOptions) -> Holdout:
    """Hold out a share of the conversations, and one at least.

    What is asked before the first answer decides, the system message included. If one such beginning is that of more
    than twice the share, all that the user says decides.

    Raises:
        DataError: Nothing is left to train on, or to hold out.
    """
    with_tests = {conversation.source for conversation in conversations if conversation.is_test}
    rules = [_hold_out_rule(conversation, data, with_tests) for conversation in conversations]
    values: list[int | None] = [-1 if rule == "all" else None for rule in rules]
    shared = [index for index, rule in enumerate(rules) if rule == "split"]
    begins = {index: _asked(conversations[index], whole=False) for index in shared}
    sizes, limit = Counter(begins.values()), max(4.0, 2 * data.eval_share * len(shared))
    wholes = {
        index: _asked(conversations[index], whole=True)
        for index, begin in begins.items()
        if sizes[begin] > limit or sizes[begin] == len(shared)
    }
    whole_sizes = Counter(wholes.values())
    for index in shared:
        # A question that is asked this often would take the place of all others.
        is_popular = whole_sizes[wholes.get(index, b"")] > limit
        values[index] = None if is_popular else stable_hash(wholes.get(index, begins[index]), "hold out")
    usable = [values[index] for index in shared if values[index] is not None]
    at_least = 0 if -1 in values or not usable else min(value for value in usable if value is not None) + 1
    bound = max(int(data.eval_share * HASH_LIMIT), at_least)
    holdout = Holdout(list(zip(values, conversations, strict=True)), bound)
    has_train = bool(holdout.train)
    if has_train and holdout.eval:
        return holdout
    if (shared and not usable) or (len(shared) > 1 and len(set(usable)) == 1):
        hint = (
            "they all ask the same; add a source with hold_out: all and set hold_out: none for this one, as "
            "data.sources='[{path: TRAIN, hold_out: none}, {path: EVAL, hold_out: all}]'"
        )
    elif not has_train and len(shared) == 1:
        hint = "add conversations: one at least is held out, and one trained on"
    elif not has_train and shared:
        hint = f"lower data.eval_share, which is {data.eval_share:g}"
    else:
        hint = f"add conversations, or set hold_out of a source to something else than {'none' if has_train else 'all'}"
    what = "held out" if has_train else "trained on"
    message = f"data.sources: of {len(conversations)} conversations none is left to be {what}"
    raise DataError(message, hint=hint, option="data.sources")


def _hold_out_rule(conversation: Conversation, data: DataOptions, with_tests: Set[int]) -> str:
    rule = data.sources[conversation.source].hold_out
    if rule == "split" and conversation.source in with_tests:
        return "all" if conversation.is_test else "none"  # the source says itself what is for evaluation
    return rule


def _asked(conversation: Conversation, *, whole: bool) -> bytes:
    """Return the digest of what comes before the first answer, or of everything that is not an answer."""
    messages = conversation.messages
    first = next((index for index, message in enumerate(messages) if message.role == "user"), 0)
    asked = [
        message.content for message in (messages if whole else messages[: first + 1]) if message.role != "assistant"
    ]
    return digest_texts(asked)


@dataclass(frozen=True)
class Copy:
    """A conversation of a split. A weight above 1 makes several copies, with different ids."""

    id: str
    conversation: Conversation


def draw_train(holdout: Holdout, data: DataOptions, seed: int, limit: int | None = None) -> list[Copy]:
    """Repeat or thin the conversations by the weight of their source, and draw at most ``data.max_train_samples``.

    Args:
        holdout: The split.
        data: The data options.
        seed: Seed of the draw and of weights that are no integers.
        limit: A further maximum.
    """
    copies: list[Copy] = []
    for conversation in holdout.train:
        weight = data.sources[conversation.source].weight
        whole = int(weight)
        rest = (weight - whole) * HASH_LIMIT
        number = whole + (stable_hash(conversation.digest, f"weight {seed}") < rest)
        copies += (
            Copy(conversation.id if k == 1 else f"{conversation.id}#{k}", conversation) for k in range(1, number + 1)
        )
    return _draw_copies(copies, smallest(data.max_train_samples, limit), seed)


def draw_eval(holdout: Holdout, data: DataOptions, seed: int, limit: int | None = None) -> list[Copy]:
    """Draw ``data.max_eval_samples`` of the conversations that are held out; arguments as for :func:`draw_train`."""
    copies = [Copy(conversation.id, conversation) for conversation in holdout.eval]
    return _draw_copies(copies, smallest(data.max_eval_samples, limit), seed)


def _draw_copies(copies: list[Copy], number: int | None, seed: int) -> list[Copy]:
    if number is None or number >= len(copies):
        return copies
    drawn = heapq.nsmallest(
        number, enumerate(copies), key=lambda item: stable_hash(item[1].id.encode(), f"split {seed}")
    )
    return [copy for _, copy in sorted(drawn, key=lambda item: item[0])]


def smallest(*limits: int | None) -> int | None:
    """Return the smallest limit that is not None; None if all are."""
    return min((limit for limit in limits if limit is not None), default=None)


def report_sources(data: DataOptions, loaded: Sequence[LoadedSource], holdout: Holdout) -> list[SourceReport]:
    """Report what became of every source."""
    num_train = Counter(conversation.source for conversation in holdout.train)
    num_eval = Counter(conversation.source for conversation in holdout.eval)
    return [
        SourceReport(
            path=source.path,
            licence=source_licence(source),
            num_rows=result.num_rows,
            shapes=dict(result.formats.most_common()),
            files={file: dict(formats) for file, formats in result.files.items()} if len(result.files) > 1 else {},
            dropped=dict(result.dropped.most_common()),
            num_trailing=result.num_trailing,
            columns={column: dict(counts) for column, counts in result.columns.items()},
            warnings=dict(+result.warnings),
            test_files=tuple(result.test_files),
            hold_out=source.hold_out,
            unread=describe_unread(source.path),
            num_train=num_train[index],
            num_eval=num_eval[index],
            weight=source.weight,
        )
        for index, (source, result) in enumerate(zip(data.sources, loaded, strict=True))
    ]


@dataclass(frozen=True)
class FinqaSplit:
    """The FinQA records of a split.

    Attributes:
        records: The drawn records, in the source's order.
        num_read: Usable records of the source.
        dropped: Records that cannot be used, by reason.
        broken: Those records.
    """

    records: list[FinQARecord]
    num_read: int
    dropped: Counter[str] = field(default_factory=Counter)
    broken: list[DroppedRow] = field(default_factory=list)


def load_finqa_splits(config: Config, *, limit: int | None = None) -> dict[str, FinqaSplit]:
    """Read or generate the FinQA records of ``train`` and ``eval``.

    Args:
        config: The configuration, of which ``data`` and ``run.seed`` are read.
        limit: Maximum number of records of a split, besides ``data.max_train_samples`` and ``data.max_eval_samples``.

    Raises:
        DataError: A file cannot be used, or with ``data.strict`` one of its records.
    """
    data, seed = config.data, config.run.seed
    if data.source == "builtin:statements":
        train, evaluation = _generate_pages(data, seed)
    elif data.train is None or data.eval is None:
        raise DataError("data.source: finqa needs data.train and data.eval", option="data.source")
    else:
        train = read_finqa(data.train, strict=data.strict)
        evaluation = train if data.eval == data.train else read_finqa(data.eval, strict=data.strict)
    limits = {"train": smallest(data.max_train_samples, limit), "eval": smallest(data.max_eval_samples, limit)}
    return {
        name: FinqaSplit(
            draw_records(source.records, limits[name], seed), len(source.records), source.dropped, source.broken
        )
        for name, source in (("train", train), ("eval", evaluation))
    }


def _generate_pages(data: DataOptions, seed: int) -> tuple[FinqaFile, FinqaFile]:
    """Generate pages of some companies to train on, and of others to evaluate on."""
    from fintune.data.synthetic import generate, split_by_company

    pages = data.statements
    records = generate(
        pages.train_companies + pages.eval_companies,
        pages_per_company=pages.pages_per_company,
        questions_per_page=pages.questions_per_page,
        seed=seed,
        size=pages.size,
    )
    train, evaluation = split_by_company(records, num_train=pages.train_companies)
    return FinqaFile(train), FinqaFile(evaluation)


def draw_records(records: Sequence[FinQARecord], number: int | None, seed: int) -> list[FinQARecord]:
    """Draw a number of records with a seed, in their order; all if the number is None."""
    return [records[index] for index in draw_indices(len(records), number, seed)]


def group_by_page(records: Sequence[FinQARecord]) -> Iterator[list[int]]:
    """Yield the indices of the records of each page, in the order of the first record of a page."""
    pages: dict[Hashable, list[int]] = {}
    for index, record in enumerate(records):
        pages.setdefault(page_content(record), []).append(index)
    yield from pages.values()
