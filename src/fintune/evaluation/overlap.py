"""What two FinQA files share, so that a score over one would flatter a model trained on the other."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import combinations

from fintune.evaluation.audit import question_words
from fintune.finqa.identity import LEVELS, Level, group_of, page_content
from fintune.records import FinQARecord, Record

NEAR = 0.8
"""Questions are nearly the same where they share this part of their words (Jaccard index of the sets)."""

SHARED = ("id", *LEVELS, "page_text", "question", "near_question", "question_and_program")
"""What is compared: the id and its parts, the page's text and table whatever its id, the question's words, the
same up to `NEAR`, and question and program together."""


class Shared(Record):
    """Something that two files share.

    Attributes:
        num: Distinct things; for ``near_question`` pairs of questions that are not the same.
        num_first: Records of the first file that have one of them.
        num_second: Records of the second.
        second_ids: Their ids.
    """

    num: int
    num_first: int
    num_second: int
    second_ids: tuple[str, ...]


class Overlap(Record):
    """What two files share, by `SHARED`.

    Attributes:
        first: Name of the first file.
        second: Name of the second.
        shared: Everything in `SHARED`, also where it is nothing.
    """

    first: str
    second: str
    shared: dict[str, Shared]


def overlaps(splits: Mapping[str, Sequence[FinQARecord]]) -> list[Overlap]:
    """Compare all files with one another, in their order."""
    return [
        Overlap(first=first, second=second, shared=_compare(splits[first], splits[second]))
        for first, second in combinations(splits, 2)
    ]


def near_pairs(first: Sequence[Sequence[str]], second: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """Pairs of questions that are nearly, but not wholly, the same.

    Args:
        first: Words of each question of one file (`question_words`).
        second: Likewise of the other.

    Returns:
        (index in ``first``, index in ``second``).
    """
    frequency = Counter(word for words in (*first, *second) for word in set(words))
    ordered = [[sorted(set(w), key=lambda word: (frequency[word], word)) for w in side] for side in (first, second)]
    # Sets that share at least NEAR of their words share one of their rarest (prefix filter, Chaudhuri et al. 2006).
    by_word: dict[str, list[int]] = defaultdict(list)
    for k, words in enumerate(ordered[0]):
        for word in _prefix(words):
            by_word[word].append(k)
    pairs = []
    for m, words in enumerate(ordered[1]):
        own = set(words)
        for k in sorted({k for word in _prefix(words) for k in by_word.get(word, ())}):
            other = ordered[0][k]
            common = len(own.intersection(other))
            if common >= NEAR * (len(own) + len(other) - common) and tuple(first[k]) != tuple(second[m]):
                pairs.append((k, m))
    return pairs


def _prefix(words: Sequence[str]) -> Sequence[str]:
    # A hair less than NEAR, as 0.8 * 5 is more than 4 in binary floats on some lengths.
    return words[: len(words) - math.ceil((NEAR - 1e-9) * len(words)) + 1]


def _compare(first: Sequence[FinQARecord], second: Sequence[FinQARecord]) -> dict[str, Shared]:
    keys: dict[str, Callable[[FinQARecord], Hashable]] = {
        "id": lambda record: record.id,
        **{level: partial(_group, level=level) for level in LEVELS},
        "page_text": page_content,
        "question": lambda record: question_words(record.qa.question),
        "question_and_program": lambda record: (question_words(record.qa.question), record.qa.program),
    }
    shared = {name: _shared(first, second, key) for name, key in keys.items()}
    pairs = near_pairs(*([question_words(record.qa.question) for record in side] for side in (first, second)))
    near = {m for _, m in pairs}
    shared["near_question"] = Shared(
        num=len(pairs),
        num_first=len({k for k, _ in pairs}),
        num_second=len(near),
        second_ids=tuple(second[m].id for m in sorted(near)),
    )
    return {name: shared[name] for name in SHARED}


def _group(record: FinQARecord, *, level: Level) -> str:
    return group_of(record.id, level)


def _shared(
    first: Sequence[FinQARecord], second: Sequence[FinQARecord], key: Callable[[FinQARecord], Hashable]
) -> Shared:
    ours, theirs = [key(record) for record in first], [key(record) for record in second]
    both = set(ours) & set(theirs)
    ids = tuple(record.id for record, value in zip(second, theirs, strict=True) if value in both)
    return Shared(num=len(both), num_first=sum(value in both for value in ours), num_second=len(ids), second_ids=ids)
