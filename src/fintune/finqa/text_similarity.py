"""How much a line of a page has to do with a question, by words alone (BM25: Robertson and Zaragoza 2009)."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

_WORD = re.compile(r"[a-z]+|\d+(?:[.,]\d+)*")
_ENDINGS = (("ies", "y"), ("sses", "ss"), ("ing", ""), ("ed", ""), ("es", ""), ("s", ""))
_STOP = frozenset(
    """a an and are as at be been between by did do does during for from had has have how if in into is it its many much
    of on or than that the their then there these this to was were what when which who will with would""".split()  # noqa: SIM905
)

SATURATION, LENGTH = 1.2, 0.75
"""BM25's k1 and b, at their usual values."""

TABLE_BONUS = 4.0
"""What a table row has ahead of a sentence: two thirds of FinQA's evidence are rows, and rows are short."""

NEIGHBOUR = 0.1
"""Share of its neighbours' scores that a line gains, so that of equals the one beside a good line stays.

The last two were chosen on every other training record with evidence, at 512 and 768 tokens.
"""


def content_words(text: str) -> list[str]:
    """Words and numbers in lower case, endings of plural and verb cut, without stop words."""
    return [_stem(word) for word in _WORD.findall(text.lower()) if word not in _STOP]


def _stem(word: str) -> str:
    for ending, new in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending) + new
    return word


def rank_lines(question: str, lines: Sequence[str], rows: Collection[int], *, first: Collection[int] = ()) -> list[int]:
    """Indices of ``lines``, the most relevant to the question first; of equals, the order of the page.

    Args:
        question: The question; its years count as words.
        lines: The page.
        rows: Indices of the lines that are table rows.
        first: Indices that go before all others.
    """
    found = [Counter(content_words(line)) for line in lines]
    frequency = Counter(word for each in found for word in each)
    wanted = sorted(set(content_words(question)))
    mean_length = sum(each.total() for each in found) / max(1, len(found)) or 1.0
    own = []
    for k, each in enumerate(found):
        length = 1 - LENGTH + LENGTH * each.total() / mean_length
        score = TABLE_BONUS if k in rows else 0.0
        for word in wanted:
            weight = math.log(1 + len(lines) / frequency[word]) if each[word] else 0.0
            score += weight * each[word] * (SATURATION + 1) / (each[word] + SATURATION * length)
        own.append(score)
    padded = [0.0, *own, 0.0]
    score_with = [own[k] + NEIGHBOUR * (padded[k] + padded[k + 2]) for k in range(len(own))]
    return sorted(range(len(own)), key=lambda k: (k not in first, -score_with[k], k))


class SimilarTexts:
    """Texts to compare with.

    Args:
        texts: None, or as many as wanted; a text without a word is similar to none.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(content_words(text)) for text in texts]
        frequency = Counter(word for each in counts for word in each)
        # Smoothed, so that a word of every text still counts a little.
        self._weights = {word: 1 + math.log((1 + len(texts)) / (1 + number)) for word, number in frequency.items()}
        self._places: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for place, each in enumerate(counts):
            for word, weight in self._vector(each).items():
                self._places[word].append((place, weight))

    def nearest(self, text: str) -> Iterator[tuple[int, float]]:
        """Index and cosine of every text that shares a word, the most similar first; of equals, the earlier one."""
        cosines: dict[int, float] = defaultdict(float)
        for word, weight in self._vector(Counter(content_words(text))).items():
            for place, other in self._places[word]:
                cosines[place] += weight * other
        yield from sorted(cosines.items(), key=lambda found: (-round(found[1], 9), found[0]))

    def _vector(self, counts: Counter[str]) -> dict[str, float]:
        """Weight of each known word; the vector's length is 1."""
        raw = {word: number * self._weights[word] for word, number in counts.items() if word in self._weights}
        length = math.sqrt(math.fsum(value * value for value in raw.values())) or 1.0
        return {word: value / length for word, value in raw.items()}
