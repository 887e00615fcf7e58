"""``data.sources`` to the conversations of both splits: read, converted, cleared of duplicates, divided and mixed.

Everything that is chosen (a sample, the held-out share, a fractional weight) is chosen by a hash of the conversation,
so that another order of the rows or further rows change nothing about those that were there.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fintune.config import DataOptions
from fintune.data import one_source
from fintune.data.chance import NUM_CHANCES, chance
from fintune.data.duplicates import NearDuplicates, digest
from fintune.data.files import unread
from fintune.data.one_source import Entry, Found
from fintune.data.source_report import SourceReport, UnusedRow
from fintune.data.wanted import Wanted, nothing_wanted, said
from fintune.errors import DataError
from fintune.util.console import track

_NEAR = "near duplicate"
_TRIES = 100
"""Conversations that are tried in the place of held-out ones: where so many fail, it is not for one bad row."""


@dataclass(frozen=True)
class Mixture:
    """Conversations of both splits.

    Attributes:
        train: To train on, weights applied; ids are unique.
        eval: Held out; at least one.
        reports: One for each source.
        unused: The rows that could not be used, in their order.
        problems: A line for each of them, the first of every reason before all others.
    """

    train: list[Entry]
    eval: list[Entry]
    reports: list[SourceReport]
    unused: list[UnusedRow]
    problems: list[str]


def load(
    data: DataOptions,
    seed: int,
    *,
    limit: int | None = None,
    wanted: Wanted = "answers",
    usable: Callable[[Entry], bool] | None = None,
) -> Mixture:
    """Read all sources.

    Args:
        data: ``sources`` and what belongs to them.
        seed: Of samples and fractional weights.
        limit: At most so many conversations a split, on top of ``data.max_train_samples`` and
            ``data.max_eval_samples``.
        wanted: Which rows the objective learns from; others are counted as dropped. A rejected answer or a label that
            is learned from belongs to what tells duplicates.
        usable: Whether a conversation can be encoded; where no held-out one can, the next one by its hash that can is
            held out as well.

    Raises:
        DataError: A source that cannot be read or gives nothing; with ``data.strict``, a row that cannot be used; no
            wanted row in any source.
        ResourceError: A hub dataset that cannot be fetched.
    """
    problems: list[tuple[str, UnusedRow]] = []
    seen: set[bytes] = set()
    found = [
        one_source.read(source, number, data, seed, seen, problems, wanted)
        for number, source in enumerate(data.sources)
    ]
    if not any(each.entries for each in found):
        dropped = sum((each.dropped for each in found), Counter())
        paths, num_rows = [source.path for source in data.sources], sum(each.num_rows for each in found)
        raise nothing_wanted(paths, num_rows, dict(dropped.most_common()), wanted)
    if data.duplicates == "near":
        _drop_near(found, data.near_similarity, wanted)
    train, evaluation = _divide(found, data, usable)
    reports = [
        SourceReport(
            path=source.path,
            licence=one_source.licence(source),
            num_rows=each.num_rows,
            shapes=dict(each.shapes.most_common()),
            files={file: dict(shapes) for file, shapes in each.files.items()} if len(each.files) > 1 else {},
            dropped=dict(each.dropped.most_common()),
            num_trailing=each.num_trailing,
            num_thoughts=each.num_thoughts,
            unread=unread(source.path),
            num_train=sum(entry.source == number for entry in train),
            num_eval=sum(entry.source == number for entry in evaluation),
            weight=source.weight,
        )
        for number, (source, each) in enumerate(zip(data.sources, found, strict=True))
    ]
    weighted = [copy for entry in train for copy in _copies(entry, data.sources[entry.source].weight, seed)]
    return Mixture(
        train=_draw(weighted, _least(data.max_train_samples, limit), seed),
        eval=_draw(evaluation, _least(data.max_eval_samples, limit), seed),
        reports=reports,
        unused=[row for _, row in problems],
        problems=_firsts_first([(reason, row.told()) for reason, row in problems]),
    )


def _firsts_first(problems: Sequence[tuple[str, str]]) -> list[str]:
    firsts: dict[str, str] = {}
    for reason, line in problems:
        firsts.setdefault(reason, line)
    return [*firsts.values(), *(line for reason, line in problems if firsts[reason] is not line)]


def _drop_near(found: Sequence[Found], similarity: float, wanted: Wanted) -> None:
    num = sum(len(each.entries) for each in found)
    known = NearDuplicates(similarity, num)
    everything = track([(each, entry) for each in found for entry in each.entries], "near duplicates", num)
    kept: list[tuple[Found, Entry]] = []
    for each, entry in everything:
        if known.repeats(said(entry.conversation, wanted)) is None:
            kept.append((each, entry))
        else:
            each.dropped[_NEAR] += 1
    for each in found:
        each.entries = [entry for owner, entry in kept if owner is each]


def _divide(
    found: Sequence[Found], data: DataOptions, usable: Callable[[Entry], bool] | None
) -> tuple[list[Entry], list[Entry]]:
    """Train and eval: held out is whose first question's hash is below the share, at the least the lowest."""
    hashed = [(chance(digest([_question(entry)]), "hold out"), entry) for each in found for entry in each.entries]
    open_ones = [value for value, entry in hashed if data.sources[entry.source].hold_out == "split"]
    held = any(data.sources[entry.source].hold_out == "all" for _, entry in hashed)
    bound = max(int(data.eval_share * NUM_CHANCES), 0 if held or not open_ones else min(open_ones) + 1)
    train, evaluation = _below(bound, hashed, data)
    if not train or not evaluation:
        which, other = ("trained on", "all") if not train else ("held out", "none")
        if not train and open_ones:
            few = "add conversations: one at least is held out, and one trained on"
            raise DataError(
                f"data.sources: of {len(hashed)} conversations none is left to be {which}",
                hint=few if len(open_ones) == 1 else f"lower data.eval_share, which is {data.eval_share:g}",
                option="data.sources",
            )
        raise DataError(
            f"data.sources: of {len(hashed)} conversations none is left to be {which}",
            hint=f"add conversations, or set hold_out of a source to something else than {other}",
            option="data.sources",
        )
    if usable is not None and not any(map(usable, evaluation)):
        further = [each for each in hashed if data.sources[each[1].source].hold_out == "split" and each[0] >= bound]
        tried = heapq.nsmallest(_TRIES, further, key=lambda each: each[0])
        bound = next((value + 1 for value, entry in tried if usable(entry)), bound)
        rest, more = _below(bound, hashed, data)
        if rest:
            return rest, more
    return train, evaluation


def _below(bound: int, hashed: Sequence[tuple[int, Entry]], data: DataOptions) -> tuple[list[Entry], list[Entry]]:
    train: list[Entry] = []
    evaluation: list[Entry] = []
    for value, entry in hashed:
        rule = data.sources[entry.source].hold_out
        (evaluation if rule == "all" or (rule == "split" and value < bound) else train).append(entry)
    return train, evaluation


def _question(entry: Entry) -> str:
    return next(message.content for message in entry.conversation.messages if message.role == "user")


def _copies(entry: Entry, weight: float, seed: int) -> Iterator[Entry]:
    whole = int(weight)
    times = whole + (chance(entry.digest, f"weight {seed}") < (weight - whole) * NUM_CHANCES)
    for number in range(1, times + 1):
        yield entry if number == 1 else replace(entry, id=f"{entry.id}#{number}")


def _draw(entries: list[Entry], number: int | None, seed: int) -> list[Entry]:
    if number is None or number >= len(entries):
        return entries
    chosen = heapq.nsmallest(number, enumerate(entries), key=lambda item: chance(item[1].id.encode(), f"split {seed}"))
    return [entry for _, entry in sorted(chosen, key=lambda item: item[0])]


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
