"""Shared prefixes of prompts, which are computed only once: several questions about one page.

All functions here are pure functions of token ids or records. A prompt is split into a head, whose keys and values may
belong to other prompts too, and a tail. All tails of a batch have one length, so they need no padding.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from fintune.errors import PromptError
from fintune.finqa.page import page_content
from fintune.records import FinQARecord

Ids = list[int]

_TAIL_COST = 2
"""A token of a tail costs about as much as so many of a head, because it attends to other tokens through a mask."""

_TOKEN_BYTES = array("I").itemsize
_MAX_TAIL_LENGTHS = 12
"""Number of tail lengths that are compared, so that planning a wide batch takes no noticeable time."""


@dataclass(frozen=True)
class PrefixSplit:
    """How a batch of prompts is computed: first the heads, then each prompt's tail after its head.

    Attributes:
        num_tail: Length of every prompt's tail in tokens; it contains at least the last token.
        heads: Distinct prefixes, none of them a prefix of another.
        head_of: For each prompt, the index of the head whose first ``len(prompt) - num_tail`` tokens are its own.
    """

    num_tail: int
    heads: list[Ids]
    head_of: list[int]


def group_by_prefix(prompts: Sequence[Ids]) -> list[list[int]]:
    """Group the indices of prompts that share most of their tokens, from the shortest to the longest prompt.

    Prompts that are neighbours in sorted order belong together if they share at least half of the longer one. Questions
    about one page do; pages after the same short system message do not.
    """
    order = sorted(range(len(prompts)), key=lambda index: _sort_key(prompts[index]))
    groups: list[list[int]] = []
    for index in order:
        before = prompts[groups[-1][-1]] if groups else []
        if groups and 2 * num_shared_tokens(before, prompts[index]) >= max(len(before), len(prompts[index])):
            groups[-1].append(index)
        else:
            groups.append([index])
    return sorted(groups, key=lambda group: max(len(prompts[index]) for index in group))


def make_batches(
    groups: Sequence[Sequence[int]], size: int, lengths: Sequence[int] = (), max_tokens: int | None = None
) -> list[list[int]]:
    """Put groups into batches in their order. A group is only divided if it is larger than a batch.

    A page whose questions are in two batches is computed twice. On FinQA's dev questions in batches of 16, keeping
    groups whole saves a tenth of the computed tokens.

    A batch has at most ``size`` prompts, and computes at most ``max_tokens`` if each group computes its longest prompt
    once, at the width of the widest. A batch of one group may have more. ``lengths`` are those of the prompts.
    """
    batches: list[list[int]] = [[]]
    num_groups = 0
    for group in groups:
        is_full = len(batches[-1]) + len(group) > size
        if max_tokens is not None:
            is_full |= (num_groups + 1) * max(lengths[index] for index in group) > max_tokens
        if batches[-1] and is_full:
            batches.append([])
            num_groups = 0
        for index in group:
            if len(batches[-1]) == size:
                batches.append([])
                num_groups = 0
            batches[-1].append(index)
        num_groups += 1
    return [batch for batch in batches if batch]


def split_prefixes(prompts: Sequence[Ids]) -> PrefixSplit:
    """Return the cheapest split of a batch: the fewest computed tokens, padding included."""
    width, shortest = max(map(len, prompts)), min(map(len, prompts))
    # A head can be shared up to where two neighbours in sorted order differ.
    keys = [_sort_key(prompt) for prompt in prompts]
    ordered = [prompts[index] for index in sorted(range(len(prompts)), key=keys.__getitem__)]
    shared = [(pair, num_shared_tokens(*pair)) for pair in pairwise(ordered)]
    lengths = {len(prompt) - num_shared for pair, num_shared in shared for prompt in pair}
    tails = sorted({1, *(length for length in lengths if 1 <= length <= shortest)})
    splits = [_split_at(prompts, keys, num_tail) for num_tail in tails[:: 1 + len(tails) // _MAX_TAIL_LENGTHS]]

    def cost(split: PrefixSplit) -> int:
        return len(split.heads) * (width - split.num_tail) + _TAIL_COST * len(prompts) * split.num_tail

    return min(splits, key=cost)


def _split_at(prompts: Sequence[Ids], keys: Sequence[bytes], num_tail: int) -> PrefixSplit:
    own_heads = [key[: _TOKEN_BYTES * (len(prompt) - num_tail)] for prompt, key in zip(prompts, keys, strict=True)]
    heads: list[int] = []
    head_of = [0] * len(prompts)
    # In descending order, a prefix of a head comes directly after it.
    for index in sorted(range(len(prompts)), key=own_heads.__getitem__, reverse=True):
        if not heads or not own_heads[heads[-1]].startswith(own_heads[index]):
            heads.append(index)
        head_of[index] = len(heads) - 1
    return PrefixSplit(num_tail, [prompts[index][: len(prompts[index]) - num_tail] for index in heads], head_of)


def _sort_key(ids: Ids) -> bytes:
    """Return bytes in the order of the ids. Long prompts that share pages take seconds to compare as lists."""
    numbers = array("I", ids)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def num_shared_tokens(first: Ids, second: Ids) -> int:
    """Return the number of tokens with which both begin."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def page_order(records: Sequence[FinQARecord]) -> list[int]:
    """Return the indices of records such that questions about one page follow each other.

    FinQA's files have them far apart. Pages are in the order of their first question, and the questions of a page keep
    their order.
    """
    first: dict[Hashable, int] = {}
    pages = [first.setdefault(page_content(record), index) for index, record in enumerate(records)]
    return sorted(range(len(records)), key=lambda index: (pages[index], index))


@contextmanager
def name_prompts(records: Sequence[FinQARecord]) -> Iterator[None]:
    """Name the question in the error of an engine that cannot take a prompt; there is a record for each prompt.

    Raises:
        ModelError: In place of :class:`fintune.errors.PromptError`.
    """
    try:
        yield
    except PromptError as error:
        raise error.of(records[error.number - 1].id) from None
